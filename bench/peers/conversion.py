"""The checkpoint as each system wants it, by its own tools, made once and kept in the work folder.

A conversion stands in WORK/converted/CHECKPOINT/SYSTEM with `made.json`: the commands, and digests of the checkpoint
and of our exporter. One that is stale or half-written is made anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemvg_edge.errors import GemvgError
from gemvg_edge.files import read_text, write_text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MADE = "made.json"
EXPORTER = (*sorted((ROOT / "export").rglob("*.py")), ROOT / "gemvg_edge" / "bundle.py")
RIVALS = ("openvino-genai", "llama-cpp", "transformers")
# The engine that the runtime picks by itself; ONNX Runtime; the first with fewer visual tokens (`look(keep=KEEP)`).
OURS = ("ours", "ours-onnx", "ours-pruned")
KEEP = 0.75  # what bench.pruning shows no loss for
SETUP = {"openvino-genai": "openvino.sh", "llama-cpp": "llama_cpp.sh", "transformers": "transformers.sh"}


@dataclass(frozen=True)
class Prepared:
    """A system that can be opened: its worker, the Python that runs it, and what it reads."""

    name: str
    worker: str
    python: str
    settings: dict[str, Any]
    token_bytes: int  # of that, what each token reads: decoder and head as they are stored


def prepare(system: str, checkpoint: Path, work: Path) -> Prepared:
    """Install and convert what is not there yet; GemvgError says which step of which system failed."""
    if system in SETUP:
        _run([str(HERE / SETUP[system]), str(work)], work, f"{system}-setup")
    tools = work / "tools"
    match system:
        case "ours" | "ours-onnx" | "ours-pruned":
            folder = convert("ours", [_ours_command(checkpoint)], checkpoint, work)
            settings: dict[str, Any] = {"model": str(folder), "engine": "onnx" if system == "ours-onnx" else None}
            settings["keep"] = KEEP if system == "ours-pruned" else None
            read = _sizes(folder, "decoder.*")
            return Prepared(system, "bench.peers.ours_worker", sys.executable, settings, read)
        case "openvino-genai":
            folder = convert(system, [_openvino_command(checkpoint, tools)], checkpoint, work)
            read = _sizes(folder, "openvino_language_model.bin")
            python = str(tools / "openvino" / "bin" / "python")
            # Its other attention backend reads all of the chat again with each question, however its caches are set.
            settings = {"model": str(folder), "options": {"ATTENTION_BACKEND": "SDPA"}}
            return Prepared(system, "openvino_worker", python, settings, read)
        case "llama-cpp":
            folder = convert(system, _llama_commands(checkpoint, tools / "llama-cpp"), checkpoint, work)
            server = str(tools / "llama-cpp" / "build" / "bin" / "llama-server")
            settings = {"model": str(folder), "server": server}
            return Prepared(system, "llama_cpp_worker", sys.executable, settings, _sizes(folder, "model.gguf"))
        case "transformers":
            python = str(tools / "transformers" / "bin" / "python")
            read = decoder_bytes(checkpoint)
            return Prepared(system, "transformers_worker", python, {"model": str(checkpoint)}, read)
    raise GemvgError(f"no system {system!r} is known; give one of {', '.join((*OURS, *RIVALS))}")


OUT = "{out}"  # in a command: the folder that the conversion fills


def _ours_command(checkpoint: Path) -> list[str]:
    return [sys.executable, "-m", "export.to_onnx", str(checkpoint), f"{OUT}/bundle", "--weights", "int4",
            "--block-size", "32"]  # fmt: skip


def _openvino_command(checkpoint: Path, tools: Path) -> list[str]:
    quantising = ["--weight-format", "int4", "--group-size", "128", "--ratio", "1.0", "--sym"]
    command = [str(tools / "openvino" / "bin" / "optimum-cli"), "export", "openvino", "--model", str(checkpoint)]
    return [*command, "--task", "image-text-to-text", *quantising, OUT]


def _llama_commands(checkpoint: Path, home: Path) -> list[list[str]]:
    convert = [str(home / "venv" / "bin" / "python"), str(home / "source" / "convert_hf_to_gguf.py"), str(checkpoint)]
    return [
        [*convert, "--outtype", "bf16", "--outfile", f"{OUT}/text.gguf"],
        [str(home / "build" / "bin" / "llama-quantize"), f"{OUT}/text.gguf", f"{OUT}/model.gguf", "Q4_0"],
        ["rm", f"{OUT}/text.gguf"],
        [*convert, "--mmproj", "--outtype", "q8_0", "--outfile", f"{OUT}/mmproj.gguf"],
    ]


def convert(system: str, commands: Sequence[Sequence[str]], checkpoint: Path, work: Path) -> Path:
    """The folder that the commands fill, from before where nothing changed."""
    target = work / "converted" / checkpoint.name / system
    made = {"commands": [list(command) for command in commands], "checkpoint": checkpoint_key(checkpoint)}
    if system == "ours":
        made["exporter"] = source_key(EXPORTER)
    ready = target / "bundle" if system == "ours" else target
    if (target / MADE).is_file() and json.loads(read_text(target / MADE)) == made:
        return ready
    partial = target.with_name(f"{system}.partial")
    for old in (partial, target):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    for k, command in enumerate(commands, 1):
        _run([part.replace(OUT, str(partial)) for part in command], work, f"{system}-conversion-{k}")
    write_text(partial / MADE, json.dumps(made, indent=1))
    partial.rename(target)
    return ready


def checkpoint_key(folder: Path) -> str:
    """What a checkpoint's files are, without reading gigabytes: names, sizes, times, and all of config.json."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.iterdir()):
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}\n".encode())
    return digest.hexdigest()


def source_key(files: Sequence[Path]) -> str:
    """The sha256 of all of the files: another exporter writes another bundle."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _run(command: list[str], work: Path, step: str) -> None:
    """One step, its output in WORK/logs; GemvgError with its last words."""
    log = work / "logs" / f"{step}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as out:
        try:
            code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT).returncode
        except OSError as error:
            raise GemvgError(f"{step}: {command[0]} cannot be run ({error.strerror})") from None
    if code:
        said = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "it said nothing")
        raise GemvgError(f"{step} failed with exit code {code}: {last[:300]} (all of it: {log})")


def _sizes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def decoder_bytes(checkpoint: Path) -> int:
    """What of a checkpoint each token reads: all but the vision tower, and but the table where the head is another."""
    shapes: dict[str, int] = {}
    for file in checkpoint.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        header.pop("__metadata__", None)
        shapes |= {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in header.items()}
    untied = "lm_head.weight" in shapes
    return sum(
        size
        for name, size in shapes.items()
        if not name.removeprefix("model.").startswith("visual.") and not (untied and "embed_tokens" in name)
    )
