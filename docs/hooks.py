"""What `mkdocs build` adds to the pages: parts that are made from the code, and files from outside of docs/.

A page holds `<!-- made: NAME -->` where a part of MADE goes. Links such as `../CHANGELOG.md` are right in the checkout;
in the site they lead to a page or a copy (OUTSIDE). Nothing of it is written to docs/.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # mkdocs is a command of its own: the workshop's folders are not on its path
    sys.path.insert(0, str(ROOT))

# A file of the checkout -> where the site has it.
OUTSIDE = {
    "BUNDLE.md": "reference/format.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/demo.png": "demo.png",
    "bench/results/compression.png": "compression.png",
    "bench/results/calibration.png": "calibration.png",
    "bench/results/pruning.png": "pruning.png",
    "bench/results/latency.png": "latency.png",
    "bench/results/latency_growth.png": "latency_growth.png",
    "bench/results/tradeoff.png": "tradeoff.png",
}
GROUPS = {
    "gemvg": "gemvg",
    "gemvg_edge": "The native engine",
    "train": "Train",
    "quantize": "Quantise",
    "export": "Export",
    "bench": "Bench and plan",
}
# Shapes of public weights that run here.
PUBLIC = ("qwen2-vl-2b", "qwen2-vl-7b", "qwen2.5-vl-7b", "qwen3-vl-2b", "qwen3-vl-4b", "qwen3-vl-8b")
SCENE = 2, 512  # pictures, and tokens of each: 401,408 pixels
_MADE = re.compile(r"<!-- made: (\w+)(?: ([\w.]+))? -->")
_FIELD = re.compile(r" {4}(\w+): (.+?)(?: = (.+?))?(?:  # (.+))?")
_NORUN = re.compile(r'^(```\w+) norun="([^"]+)"', re.MULTILINE)
_LINK = re.compile(r"\]\(((?:\.\./)*)([^)#:]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Copy what lies outside of docs/ into the site; Markdown becomes a page."""
    for source, place in OUTSIDE.items():
        path = ROOT / source
        content: Any = path.read_text(encoding="utf-8") if path.suffix == ".md" else path.read_bytes()
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill the page's marked places, and lead its links to where the site has things."""
    place = page.file.src_uri
    up = "../" * place.count("/")
    home = next((source for source, there in OUTSIDE.items() if there == place), f"docs/{place}")
    markdown = _LINK.sub(lambda link: _lead(link, home, up), markdown)
    # What stops the tests stops a reader only where something is needed.
    markdown = _NORUN.sub(
        lambda f: f'{f[1]} title="{f[2].capitalize()}; not run here"' if f[2].startswith("needs") else f[1], markdown
    )
    return _MADE.sub(lambda mark: fields_of(mark[2]) if mark[1] == "fields" else MADE[mark[1]](), markdown)


def _lead(link: re.Match[str], home: str, up: str) -> str:
    """The link of a page that lies at `home` in the checkout, as the site needs it."""
    target = (ROOT / home).parent / link[1] / link[2]
    try:
        inside = target.resolve().relative_to(ROOT).as_posix()
    except ValueError:
        return link[0]
    there = OUTSIDE.get(inside)
    if there is None and inside.startswith("docs/") and home in OUTSIDE:
        there = inside.removeprefix("docs/")
    return link[0] if there is None else f"]({up}{there}"


@lru_cache(maxsize=1)
def commands() -> str:
    """The help of every command, a heading each."""
    from bench.commands import help_texts

    lines, group = [], ""
    for name, text in help_texts().items():
        stage = re.split(r"[ .]", name)[0]
        if stage != group:
            group = stage
            lines += [f"## {GROUPS[stage]}", ""]
        lines += [f"### {command_line(name)}", ""]
        if stage != "gemvg":
            lines += [f"The same as `python -m {name}`.", ""]
        lines += ["```text", text.rstrip(), "```", ""]
    return "\n".join(lines)


def command_line(name: str) -> str:
    """`train.data.mix` as one types it: `gemvg train data.mix`."""
    if name == "bench.plan":
        return "gemvg plan"
    return name if name.startswith("gemvg") else "gemvg " + name.replace(".", " ", 1)


def schema() -> str:
    """The fields of docs/reference/grounding.schema.json as a table."""
    content = json.loads((ROOT / "docs" / "reference" / "grounding.schema.json").read_text(encoding="utf-8"))
    rows = [f"| {' | '.join(row)} |" for row in _rows(content, "")]
    return "\n".join(["| field | type | what it is |", "|---|---|---|", *rows])


def _rows(node: Mapping[str, Any], place: str) -> Iterator[tuple[str, str, str]]:
    for name, entry in node["properties"].items():
        here = f"{place}{name}"
        if "const" in entry:
            kind, about = "", f"always `{json.dumps(entry['const'])}`"
        else:
            kinds = entry["type"]
            kind = " or ".join(kinds) if isinstance(kinds, list) else kinds
            about = entry.get("description", "")
        yield f"`{here}`", kind, about if name in node["required"] else f"{about}; may be absent"
        if "properties" in entry:
            yield from _rows(entry, f"{here}.")
        elif "properties" in entry.get("items", {}):
            yield from _rows(entry["items"], f"{here}[].")


def fields_of(place: str) -> str:
    """The fields of a dataclass or named tuple, with the comments beside or above them."""
    module, _, name = place.rpartition(".")
    source = inspect.getsource(getattr(importlib.import_module(module), name))
    rows, above = [("field", "type", "default", "what it is"), ("---",) * 4], list[str]()
    for line in re.split(r"\n    (?:@|def )", source)[0].splitlines():
        if line.startswith("    # "):
            above.append(line.strip(" #"))
        elif found := _FIELD.fullmatch(line):
            field, kind, default, beside = found.groups()
            if default and default.startswith("field("):
                default = re.sub(r".*default=([^,)]+).*", r"\1", default)
            about = " ".join([*above, beside or ""]).strip().replace("<", "&lt;").replace("|", r"\|")
            rows.append((f"`{field}`", f"`{kind}`", f"`{default}`" if default else "", about))
            above = []
    assert len(rows) > 2, place
    used = [column for column in range(4) if any(row[column] for row in rows[2:])]
    return "\n".join(f"| {' | '.join(row[column] for column in used)} |" for row in rows)


def weights() -> str:
    """Memory of public weights, as the planner adds it up."""
    from bench.plan import RECIPES, find_device, find_shape, plan
    from bench.tables.markdown import table

    pictures, tokens = SCENE
    rows = []
    for name in PUBLIC:
        planned = plan(find_shape(name), find_device("jetson-orin-nano-8gb"), pictures, [tokens])
        for recipe in planned["recipes"]:
            size = sum(recipe["weights_gb"].values())
            rows.append([f"`{name}`", recipe["name"], f"{size:.2f}", f"{recipe['budgets'][0]['needed_gb']:.2f}"])
    assert len(rows) == len(PUBLIC) * len(RECIPES)
    return table(["model", "weights", "weights, GB", f"needed with {pictures} pictures of {tokens} tokens, GB"], rows)


MADE: dict[str, Callable[[], str]] = {"commands": commands, "schema": schema, "weights": weights}
