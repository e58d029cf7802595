"""An engine and its execution contexts, every answer of TensorRT checked. Knows no model."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any, NamedTuple

from gemvg_edge.engines.cuda_memory import DeviceBlock, Stream
from gemvg_edge.engines.tensorrt_library import load_tensorrt, reason
from gemvg_edge.errors import GemvgError

trt = load_tensorrt()


class Shared(NamedTuple):
    """What all engines of a bundle use in turn."""

    stream: Stream
    scratch: DeviceBlock  # activations
    log: Any  # tensorrt_library.new_log


def load_engine(runtime: Any, path: Path, log: Any) -> Any:
    """An engine, its weights on the GPU."""
    # Mapped, since on a Jetson a copy in the host's memory would be taken from the GPU's.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise GemvgError(
            f"{path} cannot be opened by TensorRT {trt.__version__}: {reason(log)}; build it again on this machine "
            "with `python -m export.to_tensorrt BUNDLE OUT`"
        )
    return engine


class Execution:
    """An execution context: an engine with one profile, shapes and addresses set. Activations go into shared memory."""

    def __init__(self, engine: Any, path: Path, shared: Shared, profile: int = 0) -> None:
        self._path, self._shared, self._profile = path, shared, -1
        self._context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        self._need(self._context is not None, "make an execution context")
        self._context.set_device_memory(shared.scratch.address, shared.scratch.bytes)
        self.select(profile)

    def select(self, profile: int) -> None:
        """Switch to an optimisation profile; shapes must be bound again."""
        if profile != self._profile:
            try:
                self._context.set_optimization_profile_async(profile, self._shared.stream.handle)
            except RuntimeError:  # it raises, and never gives False as the others do
                self._need(False, f"switch to profile {profile}")
            self._profile = profile

    def bind_input(self, name: str, address: int, shape: tuple[int, ...]) -> None:
        """Where an input lies, and its shape."""
        self._need(self._context.set_input_shape(name, shape), f"take {name} with the shape {shape}")
        self.bind(name, address)

    def bind(self, name: str, address: int) -> None:
        """Where a tensor lies, such as an output, whose shape follows from the inputs'."""
        self._need(self._context.set_tensor_address(name, address), f"place {name}")

    def enqueue(self) -> None:
        """Put one run into the stream."""
        self._need(self._context.execute_async_v3(self._shared.stream.handle), "run")

    def _need(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            why = reason(self._shared.log)
            raise GemvgError(f"{self._path}: TensorRT could not {what}: {why}; build the engines again")
