"""A bundle of graphs -> a bundle of TensorRT engines for the GPU of this machine. Folder in, folder out.

    python -m export.to_tensorrt BUNDLE OUT [--device jetson-orin-nano-8gb] [--pictures 2] [--timing-cache FILE]

Run it on the device itself: engines run on no other GPU and with no other TensorRT. BUNDLE is one that
`python -m export.to_onnx --dialect standard` (TensorRT from 10.15 on) or `--dialect plain` (from 10.3 on) wrote. Says
before it starts how much memory it takes, and in the end what the engines do: kernels, what is fused, what is copied.
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
from typing import Any, NamedTuple

import onnx

from export.build_memory import check_memory, return_freed_memory
from export.build_peak import GIB, MIB
from export.bundle_folder import check_bundle_folder, new_bundle_folder
from export.bundle_writer import write_manifest
from export.engine_graphs import head_pieces, in_pieces, input_shapes, read_graph, split_head, weight_bytes, write_graph
from export.engine_program import Program, read_engine, read_inspector
from export.engine_reading import Reading, read_program
from export.engine_reading import describe as describe_readings
from export.hashed_file import describe
from export.op_lists import check_graph, nearest_list, read_op_list
from export.shortened import count_layers
from export.tensorrt_build import (
    BuildOptions,
    NoFusedAttentionError,
    Profile,
    build_engine,
    decoder_profiles,
    vision_profiles,
    workspace_limit,
)
from gemvg_edge import bundle
from gemvg_edge.bundle import Bundle, EngineBuild, Manifest, open_bundle
from gemvg_edge.command import LARGEST, OVERWRITE, run_command, whole_number
from gemvg_edge.engines.placement import scene_slots, whole_slots
from gemvg_edge.engines.tensorrt_library import check_dialect, load_tensorrt, new_log
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import is_folder
from gemvg_edge.json_object import read_json_object
from gemvg_edge.system_memory import available_memory

DEVICES = Path(__file__).parent / "targets" / "tensorrt_devices.json"
ONE_SCENE = {"batch": 1, "rows": 1, "pictures": 1}  # dimensions that the engine always gives as 1
PASSES = ("prefill", "a token", "question")  # what the profiles of tensorrt_build are for
PICTURE_SIZES = ("small pictures", "middle pictures", "large pictures")
FILES = (*bundle.ENGINE_FILES, bundle.HEAD_ENGINE)
USUAL_PICTURE = 1024  # visual tokens, 900 x 900 pixels


@dataclass(frozen=True)
class Limits:
    """The largest sizes that engines are built for; memory grows with each."""

    max_tokens: int  # of a scene: pictures, query and answer
    max_prefill: int  # of one pass; longer prompts take several
    max_visual_tokens: int  # of one picture

    @staticmethod
    def of(
        manifest: Manifest, pictures: int, max_tokens: int | None, max_prefill: int, max_visual_tokens: int | None
    ) -> Limits:
        """What was asked for, as it suits the model; GemvgError for what makes no sense.

        Every decode step reads the whole cache, so that it is as long as so many pictures need and no longer.
        """
        numbers, window = manifest.preprocessing, window_tokens(manifest)
        largest = numbers.max_pixels // (numbers.patch_size * numbers.merge_size) ** 2
        visual = min(largest, USUAL_PICTURE) if max_visual_tokens is None else max_visual_tokens
        visual = -(-visual // window) * window
        tokens = scene_slots(pictures, visual) if max_tokens is None else max_tokens
        if min(pictures, tokens, max_prefill, visual) < 1:
            raise GemvgError("--pictures, --max-tokens, --max-prefill and --max-visual-tokens must be at least 1")
        tokens = whole_slots(tokens)
        if max(tokens, visual * numbers.merge_size**2) > LARGEST:
            raise GemvgError(f"{tokens} tokens of a scene and {visual} of a picture are past what TensorRT counts to")
        return Limits(tokens, min(max_prefill, tokens), visual)


class Job(NamedTuple):
    """One engine to build."""

    name: str
    graph: onnx.ModelProto
    profiles: Sequence[Profile]
    phases: Sequence[str]  # what each profile is for


def to_tensorrt(
    source: Path,
    target: Path,
    pictures: int = 2,
    max_tokens: int | None = None,
    max_prefill: int = 1024,
    max_visual_tokens: int | None = None,
    device: str | None = None,
    workspace: int | None = None,
    timing_cache: Path | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Build every engine of a bundle; what is wrong is said before the first of them. `workspace` is in bytes."""
    check_bundle_folder(target, FILES, [source], overwrite=overwrite)
    opened = open_bundle(source)
    manifest = opened.manifest
    if manifest.tensorrt:
        raise GemvgError(f"{source} holds engines already; give the bundle of graphs that they were built from")
    check_dialect(manifest.dialect, source)
    limits = Limits.of(manifest, pictures, max_tokens, max_prefill, max_visual_tokens)
    if timing_cache and (is_folder(timing_cache) or not is_folder(timing_cache.parent)):
        raise GemvgError(f"--timing-cache {timing_cache} is a folder, or its own is not there; give a file")
    trt = load_tensorrt()
    check_dialect(manifest.dialect, source, trt.__version__)
    check_ops(opened, trt.__version__)
    from gemvg_edge.engines.cuda_memory import current_gpu  # needs cuda-python

    gpu = current_gpu()
    check_device(device, gpu.compute_capability, gpu.name)
    vision, decoder = read_graphs(opened, limits)
    pieces = head_pieces(decoder, gpu.free_bytes)
    weights = weight_bytes([vision, decoder])
    # On a Jetson host and GPU share one memory, and tactics are timed with the weights on the device, too.
    models = [(bundle.VISION_ENGINE, vision), (bundle.DECODER_ENGINE, decoder)]
    building = check_memory(models, weights if gpu.integrated else 0, available_memory())
    workspace = workspace or workspace_limit(gpu.free_bytes, building if gpu.integrated else 2 * weights)
    said = f"{building / GIB:.1f} GiB of memory for building, {workspace // MIB} MiB of it or beside it as workspace"
    print(f"{gpu.name}, TensorRT {trt.__version__}: about {said}", file=sys.stderr)
    options = BuildOptions(workspace, exact=manifest.precision == "float32", timing_cache=timing_cache)
    build = EngineBuild(
        version=trt.__version__,
        compute_capability=gpu.compute_capability,
        gpu=gpu.name,
        device=device or gpu.name,
        capacity=limits.max_tokens,
        max_prefill=limits.max_prefill,
        max_visual_tokens=limits.max_visual_tokens,
        split_head=pieces > 1,
    )
    with new_bundle_folder(target, FILES, [source], overwrite=overwrite) as work:
        for job in plan_jobs(vision, decoder, limits, manifest, pieces):
            readings = run_job(trt, job, source, options, work)
            print("\n".join(describe_readings(readings, job.name, job.phases, count_layers(job.graph))))
        for name in (bundle.EMBEDDING, bundle.TOKENIZER):
            shutil.copyfile(source / name, work / name)
        write_manifest(work, engine_manifest(source, target.resolve().name, build, work))


def check_ops(source: Bundle, version: str) -> None:
    """Refuse graphs with a node that this TensorRT does not parse, before anything is built."""
    op_list = read_op_list(nearest_list(version))
    for graph in (bundle.VISION_GRAPH, bundle.DECODER_GRAPH):
        if problems := check_graph(source.path(graph), op_list):
            more = f" (and {len(problems) - 1} more; `python -m export.verify` lists them)" if problems[1:] else ""
            raise GemvgError(f"{source.folder}/{problems[0]}{more}")


def window_tokens(manifest: Manifest) -> int:
    """Visual tokens that a picture has at least, and of which it has a multiple: one, or a window of them."""
    return manifest.model.vision.window**2 or 1


def read_devices() -> dict[str, dict[str, Any]]:
    """The devices that --device knows."""
    devices: dict[str, dict[str, Any]] = json.loads(DEVICES.read_text(encoding="utf-8"))["devices"]
    return devices


def check_device(device: str | None, compute_capability: str, gpu: str) -> None:
    """Refuse to build for a device that this machine is not."""
    devices = read_devices()
    if device is None or devices[device]["compute_capability"] == compute_capability:
        return
    wanted = devices[device]["compute_capability"]
    alike = [name for name, row in devices.items() if row["compute_capability"] == compute_capability]
    raise GemvgError(
        f"this GPU is {gpu} with compute capability {compute_capability}, and {device} has {wanted}; build on the "
        f"device itself, or for this one {'with --device ' + ' or '.join(alike) if alike else 'without --device'}"
    )


def read_graphs(source: Bundle, limits: Limits) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Vision tower and decoder without their weights, with the sizes fixed that have no choice."""
    # TensorScatter's cache must have a fixed length when it is parsed; in `plain` its products need no padding then.
    sizes = {**ONE_SCENE, "capacity": limits.max_tokens}
    return read_graph(source.path(bundle.VISION_GRAPH), sizes), read_graph(source.path(bundle.DECODER_GRAPH), sizes)


def plan_jobs(
    vision: onnx.ModelProto, decoder: onnx.ModelProto, limits: Limits, manifest: Manifest, pieces: int
) -> list[Job]:
    """The engines to build; with several `pieces` of the head, it is one of its own."""
    profiles = decoder_profiles(limits.max_tokens, limits.max_prefill)
    windows = limits.max_visual_tokens // window_tokens(manifest)
    step = window_tokens(manifest) * manifest.preprocessing.merge_size**2
    jobs = [Job(bundle.VISION_ENGINE, vision, vision_profiles(windows, step), PICTURE_SIZES)]
    if pieces == 1:
        return [*jobs, Job(bundle.DECODER_ENGINE, decoder, profiles, PASSES)]
    body, head = split_head(decoder, pieces)
    return [*jobs, Job(bundle.DECODER_ENGINE, body, profiles, PASSES), Job(bundle.HEAD_ENGINE, head, [], ["rows"])]


def run_job(trt: Any, job: Job, source: Path, options: BuildOptions, work: Path) -> list[Reading]:
    """Build one engine into the folder, and read what was built."""
    return_freed_memory()
    try:
        _build(trt, job.graph, job, source, options, work)
    except NoFusedAttentionError as error:
        graph = in_pieces(job.graph)
        if graph is None:
            raise
        print(f"{error}\n{job.name} is built again, its attention of several kernels each: slower", file=sys.stderr)
        _build(trt, graph, job, source, options, work)
    return [read_program(program) for program in built_programs(trt, work / job.name)]


def _build(trt: Any, graph: onnx.ModelProto, job: Job, source: Path, options: BuildOptions, work: Path) -> None:
    with tempfile.TemporaryDirectory(dir=work, prefix="graph.") as folder:
        path = (Path(folder) / job.name).with_suffix(".onnx")
        write_graph(graph, path, source)
        build_engine(trt, path, input_shapes(graph), job.profiles, options, work / job.name)


def built_programs(trt: Any, engine: Path) -> list[Program]:
    """What an engine file holds: as its text says, of TensorRT-RTX, or as TensorRT's inspector, which needs the GPU."""
    if trt.__name__.startswith("tensorrt_rtx"):
        return read_engine(engine)
    from gemvg_edge.engines.tensorrt_execution import load_engine  # imports TensorRT

    log = new_log(trt)
    try:
        inspector = load_engine(trt.Runtime(log), engine, log).create_engine_inspector()
        return read_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))
    except GemvgError as error:  # it was hours of work, and is as good unread
        print(f"{engine.name} is built, but not read: {error}", file=sys.stderr)
        return []


def engine_manifest(source: Path, name: str, build: EngineBuild, work: Path) -> dict[str, Any]:
    """The graphs' manifest with what was built, and the files that are in `work`."""
    content = read_json_object(source / bundle.MANIFEST, "export the bundle again", "no such file").content
    files = {file: describe(work / file) for file in FILES if (work / file).is_file()}
    return {**content, "name": name, "tensorrt": asdict(build), "files": files}


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 for bad input."""
    return run_command("export.to_tensorrt", lambda: _run(arguments))


def _run(arguments: list[str] | None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m export.to_tensorrt", description=__doc__, formatter_class=raw)
    parser.add_argument("bundle", type=Path, help="the graphs, of the dialect standard or plain")
    parser.add_argument("out", type=Path, help="the folder to write the bundle of engines to")
    parser.add_argument("--device", choices=tuple(read_devices()), help="what this machine should be (default: any)")
    scene = "pictures of a scene, which the length of the cache is worked out from (default: %(default)s)"
    parser.add_argument("--pictures", type=whole_number, default=2, metavar="N", help=scene)
    tokens = "tokens of a scene at most: pictures, query and answer (default: what --pictures of any size take)"
    parser.add_argument("--max-tokens", type=whole_number, metavar="N", help=tokens)
    passes = "tokens of one pass at most, longer prompts take several (default: %(default)s)"
    parser.add_argument("--max-prefill", type=whole_number, default=1024, metavar="N", help=passes)
    pictures = f"tokens of one picture at most (default: as the preprocessing allows, up to {USUAL_PICTURE})"
    parser.add_argument("--max-visual-tokens", type=whole_number, metavar="N", help=pictures)
    workspace = "memory that one tactic may take, in MiB (default: by the free memory)"
    parser.add_argument("--workspace", type=whole_number, metavar="MIB", help=workspace)
    cache = "measurements of earlier builds, read and written (default: none)"
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help=cache)
    parser.add_argument("--overwrite", action="store_true", help=OVERWRITE)
    given = parser.parse_args(arguments)
    sizes = (given.pictures, given.max_tokens, given.max_prefill, given.max_visual_tokens)
    bytes_of_workspace = given.workspace * MIB if given.workspace else None
    told = given.device, bytes_of_workspace, given.timing_cache
    to_tensorrt(given.bundle, given.out, *sizes, *told, overwrite=given.overwrite)
    return 0


if __name__ == "__main__":
    sys.exit(main())
