"""One ONNX graph -> one serialised TensorRT engine: network, optimisation profiles, timing cache, progress.

API: https://docs.nvidia.com/deeplearning/tensorrt, 10.3 to 11.4. The module is an argument, `trt`, so that the same
lines are tested with TensorRT-RTX, which parses and compiles without a GPU. Knows shapes, not bundles.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from export.build_peak import MIB
from gemvg_edge.engines.placement import SLOTS, whole_slots
from gemvg_edge.engines.tensorrt_library import new_log, reason
from gemvg_edge.errors import GemvgError
from gemvg_edge.files import reason as why_refused

LEAST_WORKSPACE = 64 * MIB
NO_KERNEL = "not supported by a dedicated kernel"  # in what TensorRT says of an attention that may be one kernel only
QUESTION = 128  # tokens: a query after its pictures were prefilled, or tokens that are known beforehand


class Range(NamedTuple):
    """The sizes of one dimension that a profile takes, and the one that it is tuned for."""

    least: int
    tuned: int
    most: int


Shape = tuple[int | str, ...]  # a dimension without a number has a name
Profile = Mapping[str, Range]  # by name of dimension


@dataclass(frozen=True)
class BuildOptions:
    """How engines are built."""

    workspace: int  # bytes, the most that one tactic may take
    exact: bool = False  # float32 products in float32, not in TF32
    timing_cache: Path | None = None
    capability: str | None = None  # such as "8.9": compile for another GPU than this machine's, with TensorRT-RTX alone


def decoder_profiles(capacity: int, max_prefill: int) -> list[Profile]:
    """Prefill of pictures, one token (the engine's DECODE_PROFILE), and questions, each with kernels of its own."""
    # A prefill looks at the places that are taken. A single token looks at all, which is then a number that is known
    # when the engine is built: its attention reads the cache where it lies.
    taken, every = Range(SLOTS, whole_slots(max_prefill), capacity), Range(capacity, capacity, capacity)
    passes = [(Range(1, max_prefill, max_prefill), taken), (Range(1, 1, 1), every)]
    if max_prefill > QUESTION:
        passes.append((Range(1, 32, QUESTION), taken))
    return [{"tokens": tokens, "slots": slots} for tokens, slots in passes]


def vision_profiles(most: int, step: int) -> list[Profile]:
    """Small, medium and large pictures, in patches, of which there are always a multiple of `step`."""
    edges = sorted({max(1, most // part) for part in (16, 4, 1)})
    least = [1, *edges[:-1]]
    return [{"patches": Range(low * step, high * step, high * step)} for low, high in zip(least, edges, strict=True)]


def profile_shapes(inputs: Mapping[str, Shape], profile: Profile) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Least, tuned and largest shape of each input that has open dimensions."""
    shapes = {}
    for name, shape in inputs.items():
        if unknown := [size for size in shape if isinstance(size, str) and size not in profile]:
            raise GemvgError(f"the input {name} has the unknown dimension {unknown[0]!r}; export the bundle again")
        if any(isinstance(size, str) for size in shape):
            ranges = [profile[size] if isinstance(size, str) else Range(size, size, size) for size in shape]
            shapes[name] = tuple(zip(*ranges, strict=True))
    return shapes


def workspace_limit(free_bytes: int, taken: int) -> int:
    """Bytes of workspace for a build: half of what it leaves of the GPU's memory; GemvgError where it leaves none."""
    if taken > free_bytes:
        raise GemvgError(
            f"a build takes {taken / MIB:.0f} MiB of GPU memory and {free_bytes / MIB:.0f} MiB are free; quantise the "
            "checkpoint to fewer bits, or close what else uses the GPU"
        )
    return max(LEAST_WORKSPACE, (free_bytes - taken) // 2 // MIB * MIB)


class NoFusedAttentionError(GemvgError):
    """TensorRT has no single kernel for an attention of the graph, and was not allowed several."""


def build_engine(
    trt: Any,
    graph: Path,
    inputs: Mapping[str, Shape],
    profiles: Sequence[Profile],
    options: BuildOptions,
    target: Path,
) -> None:
    """Parse a graph, its data file beside it, and compile it into a file: minutes to hours, with a progress bar."""
    log = new_log(trt)
    builder = trt.Builder(log)
    # The only kind of network that TensorRT 11 has.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parser = parse_graph(trt, network, graph, log)  # holds the weights until the engine is built
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if hasattr(config, "profiling_verbosity"):
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what was built can be read then, at no cost
    config.max_aux_streams = 0  # decoding is bound by memory, and more streams only need more of it
    if options.capability:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + options.capability.replace(".", "")), 0)
    if options.exact:
        config.clear_flag(trt.BuilderFlag.TF32)
    for sizes in profiles:
        profile = builder.create_optimization_profile()
        for name, (least, tuned, most) in profile_shapes(inputs, sizes).items():
            profile.set_shape(name, least, tuned, most)
        if config.add_optimization_profile(profile) < 0:
            raise GemvgError(f"{graph.name}: TensorRT refuses the profile {dict(sizes)}: {reason(log)}")
    if options.timing_cache:
        _load_timing_cache(config, options.timing_cache)
    with tqdm(desc=graph.stem, unit="step", delay=1) as bar:
        monitor = _new_monitor(trt, bar)
        config.progress_monitor = monitor
        built = _build_into(trt, builder, network, config, target)
    if monitor.cancelled:
        raise KeyboardInterrupt
    if not built:
        why = reason(log)
        kind = NoFusedAttentionError if NO_KERNEL in why else GemvgError
        raise kind(
            f"TensorRT {trt.__version__} cannot build {graph.name}: {why}; where memory is short, give a smaller "
            "--max-tokens, --max-prefill or --max-visual-tokens"
        )
    if options.timing_cache:
        _save_timing_cache(config, options.timing_cache)


def _build_into(trt: Any, builder: Any, network: Any, config: Any, target: Path) -> bool:
    """Whether the engine was built; its bytes go into the file as they come, where TensorRT can (from 10.12 on)."""
    failed: list[BaseException] = []  # TensorRT swallows what a writer raises
    with target.open("wb") as file:
        if not hasattr(builder, "build_serialized_network_to_stream"):
            engine = builder.build_serialized_network(network, config)
            file.write(engine or b"")
            return engine is not None

        class Writer(trt.IStreamWriter):  # type: ignore[misc]  # the base is known only now
            def __init__(self) -> None:
                trt.IStreamWriter.__init__(self)

            def write(self, data: bytes) -> int:
                try:
                    return file.write(data)
                except BaseException as error:
                    failed.append(error)
                    return 0

        built = bool(builder.build_serialized_network_to_stream(network, config, Writer()))
        if failed:
            raise failed[0]
        return built and file.tell() > 0


def parse_graph(trt: Any, network: Any, graph: Path, log: Any) -> Any:
    """Fill a network from an ONNX file and give back the parser; GemvgError names the node that it does not take."""
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(graph)):
        return parser
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    if not found:
        raise GemvgError(f"TensorRT {trt.__version__} cannot read {graph}: {reason(log)}")
    error = found[0]
    node = error.node_name() or f"number {error.node()}"
    why = " ".join(error.desc().split())
    raise GemvgError(
        f"TensorRT {trt.__version__} does not take the node {node} ({error.node_operator()}) of {graph.name}: "
        f"{why[:400]}; quantise or export the checkpoint in another way"
    )


def _load_timing_cache(config: Any, path: Path) -> None:
    """Measured tactics of earlier builds; those of another GPU or version are put aside with a word."""
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, False):
        print(f"{path} is the timing cache of another GPU or TensorRT; it is replaced", file=sys.stderr)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _save_timing_cache(config: Any, path: Path) -> None:
    """Keep the measurements; where that fails the engine, which was hours of work, is as good without."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(config.get_timing_cache().serialize())
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        print(f"{path} cannot be written ({why_refused(error)}); the engine is built all the same", file=sys.stderr)


def _new_monitor(trt: Any, bar: Any) -> Any:
    """A trt.IProgressMonitor that moves a bar; Ctrl-C makes the build stop at its next step."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base is known only now
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._left: dict[str, int] = {}  # phase -> steps that are still to come
            self._lock = threading.Lock()  # phases run in TensorRT's own threads

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._left[phase] = steps
                bar.total = (bar.total or 0) + steps
                bar.set_postfix_str(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                with self._lock:
                    self._left[phase] -= 1
                    bar.update()
            except KeyboardInterrupt:
                self.cancelled = True
            return not self.cancelled

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                bar.update(self._left.pop(phase, 0))

    return Monitor()
