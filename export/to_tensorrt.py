"""A bundle of graphs -> a bundle of TensorRT engines for the GPU of this machine. Folder in, folder out.

    python -m export.to_tensorrt BUNDLE OUT [--device jetson-orin-nano-8gb] [--max-tokens 4096] [--timing-cache FILE]

Run it on the device itself: engines run on no other GPU and with no other TensorRT. BUNDLE is one that
`python -m export.to_onnx --dialect standard` (TensorRT from 10.15 on) or `--dialect plain` (from 10.3 on) wrote.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from export.bundle_folder import new_bundle_folder
from export.bundle_writer import describe, write_manifest
from export.engine_graphs import head_pieces, input_shapes, read_graph, split_head, weight_bytes, write_graph
from export.tensorrt_build import (
    MIB,
    BuildOptions,
    Profile,
    build_engine,
    decoder_profiles,
    vision_profiles,
    workspace_limit,
)
from gemvg_edge import bundle
from gemvg_edge.bundle import Bundle, EngineBuild, Manifest, open_bundle
from gemvg_edge.engines.tensorrt_library import check_dialect, load_tensorrt
from gemvg_edge.errors import GemvgError
from gemvg_edge.json_object import read_json_object

DEVICES = Path(__file__).parent / "targets" / "tensorrt_devices.json"
ONE_SCENE = {"batch": 1, "rows": 1, "pictures": 1}  # dimensions that the engine always gives as 1
FILES = (*bundle.ENGINE_FILES, bundle.HEAD_ENGINE)


@dataclass(frozen=True)
class Limits:
    """The largest sizes that engines are built for; memory grows with each."""

    max_tokens: int = 4096  # of a scene: pictures, query and answer
    max_prefill: int = 1024  # of one pass; longer prompts take several
    max_visual_tokens: int | None = None  # of one picture; None: what the preprocessing allows, up to 1024


def to_tensorrt(
    source: Path,
    target: Path,
    limits: Limits,
    device: str | None = None,
    workspace: int | None = None,
    timing_cache: Path | None = None,
) -> None:
    """Build every engine of a bundle; what is wrong is said before the first of them. `workspace` is in bytes."""
    opened = open_bundle(source)
    manifest = opened.manifest
    if manifest.tensorrt:
        raise GemvgError(f"{source} holds engines already; give the bundle of graphs that they were built from")
    check_dialect(manifest.dialect, "11.0", source)  # whatever TensorRT there is
    visual = check_limits(limits, manifest, source)
    trt = load_tensorrt()
    check_dialect(manifest.dialect, trt.__version__, source)
    from gemvg_edge.engines.cuda_memory import current_gpu  # needs cuda-python

    gpu = current_gpu()
    check_device(device, gpu.compute_capability, gpu.name)
    vision, decoder = read_graphs(opened, limits)
    pieces = head_pieces(decoder, gpu.free_bytes)
    workspace = workspace or workspace_limit(gpu.free_bytes, weight_bytes([vision, decoder]))
    options = BuildOptions(workspace, manifest.precision == "float32", timing_cache)
    print(f"{gpu.name}, TensorRT {trt.__version__}: {workspace // MIB} MiB of workspace", file=sys.stderr)

    profiles = decoder_profiles(limits.max_tokens, min(limits.max_prefill, limits.max_tokens))
    jobs: list[tuple[str, onnx.ModelProto, Sequence[Profile]]] = [
        (bundle.VISION_ENGINE, vision, vision_profiles(visual, visual_step(manifest)[1]))
    ]
    if pieces == 1:
        jobs.append((bundle.DECODER_ENGINE, decoder, profiles))
    else:
        body, head = split_head(decoder, pieces)
        jobs += [(bundle.DECODER_ENGINE, body, profiles), (bundle.HEAD_ENGINE, head, [])]
    build = EngineBuild(
        version=trt.__version__,
        compute_capability=gpu.compute_capability,
        gpu=gpu.name,
        device=device or gpu.name,
        capacity=limits.max_tokens,
        max_prefill=min(limits.max_prefill, limits.max_tokens),
        max_visual_tokens=visual,
        split_head=pieces > 1,
    )
    with new_bundle_folder(target, FILES) as work:
        for name, graph, sizes in jobs:
            _build(trt, graph, source, sizes, options, work / name)
        for name in (bundle.EMBEDDING, bundle.TOKENIZER):
            shutil.copyfile(source / name, work / name)
        write_manifest(work, engine_manifest(source, target.resolve().name, build, work))


def check_limits(limits: Limits, manifest: Manifest, where: Path) -> int:
    """The most visual tokens of a picture; GemvgError for sizes that make no sense."""
    for name, value in asdict(limits).items():
        if value is not None and value < 1:
            raise GemvgError(f"--{name.replace('_', '-')} is {value}; give at least 1")
    if manifest.dialect == "standard" and limits.max_tokens % 64:
        raise GemvgError(f"--max-tokens is {limits.max_tokens}; give a multiple of 64, which keeps the cache aligned")
    numbers = manifest.preprocessing
    side, step = visual_step(manifest)
    largest = numbers.max_pixels // (numbers.patch_size * numbers.merge_size) ** 2
    visual = limits.max_visual_tokens or min(largest, 1024)
    return -(-visual // side) * side


def visual_step(manifest: Manifest) -> tuple[int, int]:
    """Visual tokens and patches that a picture has at least, and of which it has a multiple: one, or a window."""
    tokens = manifest.model.vision.window**2 or 1
    return tokens, tokens * manifest.preprocessing.merge_size**2


def read_devices() -> dict[str, dict[str, Any]]:
    """The devices that --device knows."""
    devices: dict[str, dict[str, Any]] = json.loads(DEVICES.read_text(encoding="utf-8"))["devices"]
    return devices


def check_device(device: str | None, compute_capability: str, gpu: str) -> None:
    """Refuse to build for a device that this machine is not."""
    devices = read_devices()
    if device is None:
        return
    if device not in devices:
        raise GemvgError(f"unknown device {device!r}; this table knows {', '.join(devices)}")
    wanted = devices[device]["compute_capability"]
    if wanted != compute_capability:
        alike = [name for name, row in devices.items() if row["compute_capability"] == compute_capability]
        raise GemvgError(
            f"this GPU is {gpu} with compute capability {compute_capability}, and {device} has {wanted}; build on the device "
            "itself" + (f", or for this one with --device {' or '.join(alike)}" if alike else ", or give no --device")
        )


def read_graphs(source: Bundle, limits: Limits) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Vision tower and decoder without their weights, with the sizes fixed that have no choice."""
    sizes = dict(ONE_SCENE)
    if source.manifest.dialect == "standard":
        sizes["capacity"] = limits.max_tokens  # the op that updates a cache in place wants it so, when it is parsed
    return read_graph(source.path(bundle.VISION_GRAPH), sizes), read_graph(source.path(bundle.DECODER_GRAPH), sizes)


def engine_manifest(source: Path, name: str, build: EngineBuild, work: Path) -> dict[str, Any]:
    """The graphs' manifest with what was built, and the files that are in `work`."""
    content = dict(read_json_object(source / bundle.MANIFEST, "export the bundle again", "no such file").content)
    files = [file for file in FILES if (work / file).is_file()]
    return content | {
        "name": name,
        "tensorrt": asdict(build),
        "files": {file: describe(work / file) for file in files},
    }


def _build(
    trt: Any, graph: onnx.ModelProto, source: Path, profiles: Sequence[Profile], options: BuildOptions, target: Path
) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".graph.") as folder:
        path = Path(folder) / target.with_suffix(".onnx").name
        write_graph(graph, path, source)
        engine = build_engine(trt, path, input_shapes(graph), profiles, options)
    with target.open("wb") as file:
        file.write(engine)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="the graphs, of the dialect standard or plain")
    parser.add_argument("out", type=Path, help="the folder to write; an existing bundle of engines is replaced")
    parser.add_argument(
        "--device", choices=tuple(read_devices()), help="what this machine should be; default: whatever"
    )
    tokens = "of a scene: pictures, query and answer (default %(default)s)"
    parser.add_argument("--max-tokens", type=int, default=Limits.max_tokens, metavar="N", help=tokens)
    passes = "of one pass, longer prompts take several (default %(default)s)"
    parser.add_argument("--max-prefill", type=int, default=Limits.max_prefill, metavar="N", help=passes)
    pictures = "of one picture (default: as the preprocessing allows, up to 1024)"
    parser.add_argument("--max-visual-tokens", type=int, metavar="N", help=pictures)
    workspace = "that one tactic may take (default: by the free memory)"
    parser.add_argument("--workspace", type=int, metavar="MIB", help=workspace)
    cache = "measurements of earlier builds, read and written"
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help=cache)
    given = parser.parse_args(arguments)
    limits = Limits(given.max_tokens, given.max_prefill, given.max_visual_tokens)
    workspace_bytes = given.workspace * MIB if given.workspace else None
    try:
        to_tensorrt(given.bundle, given.out, limits, given.device, workspace_bytes, given.timing_cache)
    except GemvgError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"{given.out} cannot be written: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
