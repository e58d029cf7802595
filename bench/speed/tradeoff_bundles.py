"""The bundles that the trade-off compares: exported once from a checkpoint, and the commands that make and use one."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from bench.speed.tradeoff_front import Setting
from bench.stages import checkpoint_digest
from export.to_onnx import main as export
from export.to_tensorrt import read_devices
from gemvg_edge.bundle import FORMAT_VERSION
from gemvg_edge.engines.native.library import find_library
from gemvg_edge.errors import GemvgError
from gemvg_edge.models import DEFAULT_BUNDLE
from gemvg_edge.workshop import ROOT
from quantize.checkpoint import open_checkpoint

TABLETOP = ROOT / "checkpoints" / "tabletop"  # what the shipped bundle was made from
ROUNDED = ("float", "int8", "int4")  # by export.to_onnx --weights
BLOCK = 32
GPTQ = "gptq"
BITS = (*ROUNDED, GPTQ)
ENGINES = ("native", "onnx")
EIGHT = "--vision-bits 8 --head-bits 8 --embedding-bits 8"
# What quantize.gptq is told for each recipe of bench.plan; none where nothing is quantised.
RECIPE_FLAGS = {"float16": None, "int4 decoder, float16 rest": "", "int4 decoder, int8 rest": EIGHT}


def make_bundles(checkpoint: Path, bits: Sequence[str], work: Path) -> dict[str, Path]:
    """A bundle for each way to store the weights; those that are there are kept.

    Codes stay codes, so a GPTQ checkpoint gives one bundle. A float one has a GPTQ bundle only where it is the shipped.
    """
    if open_checkpoint(checkpoint).codes_format:
        return {GPTQ: _export(checkpoint, "", work)} if GPTQ in bits else {}
    found = {name: _export(checkpoint, name, work) for name in ROUNDED if name in bits}
    if GPTQ in bits and checkpoint.resolve() == TABLETOP:
        found[GPTQ] = DEFAULT_BUNDLE
    return found


def _export(checkpoint: Path, weights: str, work: Path) -> Path:
    name = f"{checkpoint.resolve().name}-{checkpoint_digest(checkpoint)[:12]}-v{FORMAT_VERSION}"
    bundle = work / name / (weights or GPTQ)
    if not bundle.is_dir():
        bundle.parent.mkdir(parents=True, exist_ok=True)
        if export([str(checkpoint), str(bundle), *_flags(weights)]):
            raise GemvgError(f"{checkpoint} cannot be exported; see above")
    return bundle


def _flags(weights: str) -> list[str]:
    return ["--weights", weights, "--block-size", str(BLOCK)] if weights else []


def engines_here(wanted: Sequence[str]) -> tuple[list[str], str]:
    """The engines of these that there are on this machine, and what is to be said of one that is not."""
    if "native" not in wanted or find_library():
        return list(wanted), ""
    return [name for name in wanted if name != "native"], (
        "the native engine is left out: no library of it is built for this processor "
        "(`python -m gemvg_edge.engines.native.build`)"
    )


def commands(setting: Setting, threads: int) -> str:
    """The shell lines that make a measured setting's bundle, and the Python that opens and asks it."""
    model, target = Path(setting.model), f"runs/{Path(setting.model).name}.{setting.bits}"
    shipped = setting.bits == GPTQ and model.resolve() == TABLETOP
    opened = [] if shipped else [repr(target)]
    opened += [f"engine={setting.engine!r}", *([f"threads={threads}"] if threads else [])]
    if shipped:
        quantise = ["python", "-m", "quantize.gptq", "--model", setting.model, "--out", target]
        shell = [
            "# it ships with the package; what made it:",
            f"# {shlex.join([*quantise, '--group-size', str(BLOCK), *EIGHT.split()])}",
            f"# {shlex.join(['python', '-m', 'export.to_onnx', target, str(DEFAULT_BUNDLE.relative_to(ROOT))])}",
        ]
    else:
        weights = "" if setting.bits == GPTQ else setting.bits
        shell = [shlex.join(["python", "-m", "export.to_onnx", setting.model, target, *_flags(weights)])]
    free = "" if setting.constrained else ", constrained=False"
    keep = "" if setting.keep == 1 else f", keep={setting.keep:g}"
    python = [
        "from gemvg_edge import Grounder",
        "",
        f"grounder = Grounder.open({', '.join(opened)})",
        f'scene = grounder.look(["left.png", "right.png"], max_pixels={setting.pixels}{keep})',
        f'print(scene.ground("all balls"{free}).boxes)',
    ]
    return _fenced(shell, python)


def device_commands(setting: Setting, device: str) -> str:
    """The same for a planned setting of a device; CHECKPOINT is the folder of the weights."""
    flags, shell, checkpoint = RECIPE_FLAGS[setting.bits], list[str](), "CHECKPOINT"
    if flags is not None:
        checkpoint = "CHECKPOINT.int4"
        quantise = f"python -m quantize.gptq --model CHECKPOINT --out {checkpoint} --positive-scales {flags}"
        shell.append(quantise.rstrip())
    flags = f"--dialect plain --precision float16 --max-pixels {setting.pixels}"
    shell.append(f"python -m export.to_onnx {checkpoint} BUNDLE {flags}")
    known = f" --device {device}" if device in read_devices() else ""
    shell.append(f"python -m export.to_tensorrt BUNDLE ENGINES{known}  # on the device")
    python = [
        "from gemvg_edge import Grounder",
        "",
        'scene = Grounder.open("ENGINES", engine="tensorrt").look(["left.png", "right.png"])',
        'print(scene.ground("all balls").boxes)',
    ]
    return _fenced(shell, python)


def _fenced(shell: Sequence[str], python: Sequence[str]) -> str:
    return "\n".join(["```sh", *shell, "```", "```python", *python, "```"])
