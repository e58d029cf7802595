"""`gemvg train|quantize|export|bench COMMAND ...`: the door to the workshop's commands, where its checkout is.

`gemvg train sft ...` is `python -m train.sft ...`. The workshop's folders are no part of the wheel: their names are too
common for site-packages. Knows their files, imports none of them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import read_text

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("train", "quantize", "export", "bench")
STAGES = (*FOLDERS, "plan")
HIDDEN = ("export.render_template", "bench.gptqmodel_side", "gemvg_edge.serve.nursery")  # processes of other commands
SET_UP = "run `make workshop` in the checkout and use its .venv/bin/gemvg"


def run_workshop(stage: str, arguments: list[str]) -> int:
    """Run one of the workshop's commands in this process; its exit code."""
    if not (ROOT / stage.replace("plan", "bench") / "__init__.py").is_file() or not (ROOT / "Makefile").is_file():
        raise GemvgError(
            f"`{stage}` is part of the workshop, which is gemvg-edge's repository and no part of its wheel; {SET_UP}"
        )
    if stage == "plan":
        module, rest = "bench.plan", arguments
    elif not arguments or arguments[0] in ("-h", "--help"):
        print(_listing(stage))
        return 0
    else:
        module, rest = f"{stage}.{arguments[0].replace('-', '_')}", arguments[1:]
        if module not in commands(stage):
            raise GemvgError(f"`{stage}` has no command {arguments[0]!r}; `gemvg {stage}` lists them")
    _check_ours(module)
    sys.argv = [f"python -m {module}", *rest]
    try:
        return importlib.import_module(module).main() or 0
    except ImportError as error:
        if (error.name or "").split(".")[0] in (*FOLDERS, "gemvg_edge"):
            raise
        raise GemvgError(f"{module} cannot be run ({error}); {SET_UP}") from None
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(bool(ended.code))


def commands(stage: str) -> dict[str, str]:
    """The modules of a stage that are commands, with the first sentence of what they say of themselves."""
    found = {}
    for file in sorted((ROOT / stage).rglob("*.py")):
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        text = read_text(file)
        if '\nif __name__ == "__main__":' in text and module not in HIDDEN:
            found[module] = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    return found


def commands_of(stage: str) -> list[str]:
    """What may follow `gemvg STAGE`; nothing where the checkout is missing."""
    return [module.removeprefix(f"{stage}.") for module in commands(stage)] if stage in FOLDERS else []


def _listing(stage: str) -> str:
    rows = [(module.removeprefix(f"{stage}."), about) for module, about in commands(stage).items()]
    width = max(len(name) for name, _ in rows)
    lines = "\n".join(f"  {name:<{width}}  {about}" for name, about in rows)
    return f"usage: gemvg {stage} COMMAND ... (the same as python -m {stage}.COMMAND ...)\n\n{lines}"


def _check_ours(module: str) -> None:
    """GemvgError where Python would run somebody else's module of the same name, such as the user's own `train`."""
    top = module.split(".")[0]
    spec = importlib.util.find_spec(top)  # of the folder alone: looking for what is in it would run it
    if spec is None:
        raise GemvgError(f"{module} is not installed with this gemvg-edge; {SET_UP}")
    if spec.origin is None or Path(spec.origin).resolve() != ROOT / top / "__init__.py":
        raise GemvgError(f"{top} is found at {spec.origin}, not in {ROOT}; start from another folder")
