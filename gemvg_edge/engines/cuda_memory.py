"""CUDA's memory, stream and graphs through cuda-python, every return code checked.

Knows bytes and addresses, no tensors. Needs a CUDA driver and a cuda-python that is no newer than it.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import numpy.typing as npt

from gemvg_edge.engines.placement import Copy2D
from gemvg_edge.engines.tensorrt_library import driver_advice
from gemvg_edge.errors import GemvgError
from gemvg_edge.system_memory import available_memory

try:
    try:
        from cuda.bindings import runtime as cudart
    except ImportError:
        from cuda import cudart  # its name before cuda-python 12.6.1
except ImportError as error:
    raise GemvgError(
        f"cuda-python cannot be imported ({error}); run `pip install 'cuda-python>=13,<14'` for a driver of CUDA 13, "
        "`pip install 'cuda-python>=12.6,<13'` for one of CUDA 12, or `'cuda-python>=12.6,<12.7'` on JetPack 6"
    ) from None


def checked(result: tuple[Any, ...], what: str) -> Any:
    """What a cudart call returned besides its error code, which must be success."""
    code, *values = result
    if code != cudart.cudaError_t.cudaSuccess:
        _, reason = cudart.cudaGetErrorString(code)
        fix = _newer_driver() if int(code) == DRIVER_TOO_OLD else _FIXES.get(int(code), _RESTART)
        raise GemvgError(f"{what} failed: {reason.decode()} (CUDA error {int(code)}); {fix}")
    return values[0] if len(values) == 1 else values


def _newer_driver() -> str:
    _, driver = cudart.cudaDriverGetVersion()  # asks no GPU, so it works with any driver
    try:
        version = metadata.version("cuda-python")
    except metadata.PackageNotFoundError:  # its half that is used here, installed alone
        version = metadata.version("cuda-bindings")
    return driver_advice(version, int(driver))


_RESTART = "open the bundle again in a new process"
DRIVER_TOO_OLD = 35  # cudaErrorInsufficientDriver
_FIXES = {  # of cudaError_t
    2: "close what else uses the GPU, give fewer or smaller pictures, or build engines with a smaller --max-tokens",
    100: "this machine shows no NVIDIA GPU; run it on one that has one",
}


@dataclass(frozen=True)
class Gpu:
    """The GPU that is in use."""

    name: str
    compute_capability: str  # such as "8.7"
    free_bytes: int  # of memory, now
    integrated: bool  # whether its memory is the system's, as on a Jetson


def current_gpu() -> Gpu:
    """Which GPU this process runs on."""
    try:
        device = checked(cudart.cudaGetDevice(), "looking for a GPU")
    except RuntimeError as error:  # what cuda-python 12 raises where there is no driver at all
        raise GemvgError(f"looking for a GPU failed: {error}; install an NVIDIA driver") from None
    properties = checked(cudart.cudaGetDeviceProperties(device), "asking the GPU what it is")
    free, _ = checked(cudart.cudaMemGetInfo(), "asking the GPU for its free memory")
    if properties.integrated:  # where CUDA counts the file cache, such as a bundle just read, as taken
        free = max(free, available_memory() or 0)
    version = f"{properties.major}.{properties.minor}"
    return Gpu(properties.name.decode().rstrip("\0"), version, int(free), bool(properties.integrated))


class DeviceBlock:
    """A piece of the GPU's memory, given back when nothing refers to it any more."""

    def __init__(self, size: int, what: str) -> None:
        self.bytes = max(size, 1)
        self.address = int(
            checked(cudart.cudaMalloc(self.bytes), f"taking {size / 2**20:.0f} MiB of GPU memory for {what}")
        )
        weakref.finalize(self, cudart.cudaFree, self.address)


class HostBlock:
    """Pinned memory of the host, which the GPU reads and writes without a copy on the way."""

    def __init__(self, size: int) -> None:
        self.bytes = size
        self.address = int(checked(cudart.cudaMallocHost(size), f"pinning {size / 2**20:.0f} MiB of host memory"))
        weakref.finalize(self, cudart.cudaFreeHost, self.address)
        self._content = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))

    def view(self, offset: int, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """A part of it as an array, which must not outlive the block."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self._content[offset : offset + size].view(dtype).reshape(shape)


class Stream:
    """One stream, in which everything happens in order."""

    def __init__(self) -> None:
        # The legacy default stream would wait for this one, and cannot be captured.
        stream = checked(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking), "making a CUDA stream")
        self.handle = int(stream)
        weakref.finalize(self, cudart.cudaStreamDestroy, stream)

    def wait(self) -> None:
        """Until all of it is done."""
        checked(cudart.cudaStreamSynchronize(self.handle), "running on the GPU")

    def upload(self, target: int, source: int, size: int) -> None:
        """Host to device; the source must stay until `wait`."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        checked(cudart.cudaMemcpyAsync(target, source, size, kind, self.handle), "copying to the GPU")

    def download(self, target: int, source: int, size: int) -> None:
        """Device to host; the target is filled after `wait`."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        checked(cudart.cudaMemcpyAsync(target, source, size, kind, self.handle), "copying from the GPU")

    def copy(self, target: DeviceBlock, source: DeviceBlock, parts: Iterable[Copy2D]) -> None:
        """Rectangles from one block into another."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        for part in parts:
            to, origin = target.address + part.target, source.address + part.source
            result = cudart.cudaMemcpy2DAsync(
                to, part.target_pitch, origin, part.source_pitch, part.width, part.height, kind, self.handle
            )
            checked(result, "writing the cache")

    def clear(self, block: DeviceBlock) -> None:
        """Zeros."""
        checked(cudart.cudaMemsetAsync(block.address, 0, block.bytes, self.handle), "clearing GPU memory")

    def capture(self, work: Callable[[], None]) -> Graph:
        """What `work` puts into the stream, recorded and not run."""
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads may allocate meanwhile
        checked(cudart.cudaStreamBeginCapture(self.handle, mode), "starting a CUDA graph")
        try:
            work()
        except BaseException:
            cudart.cudaStreamEndCapture(self.handle)  # or the stream could not be used any more
            raise
        graph = checked(cudart.cudaStreamEndCapture(self.handle), "recording a CUDA graph")
        return Graph(graph, self)


class Graph:
    """A recorded CUDA graph, ready to be run again and again with what its addresses hold by then."""

    def __init__(self, graph: Any, stream: Stream) -> None:
        weakref.finalize(self, cudart.cudaGraphDestroy, graph)
        self._stream = stream
        self._launchable = checked(cudart.cudaGraphInstantiate(graph, 0), "making a CUDA graph")
        weakref.finalize(self, cudart.cudaGraphExecDestroy, self._launchable)

    def launch(self) -> None:
        """Put it into the stream."""
        checked(cudart.cudaGraphLaunch(self._launchable, self._stream.handle), "running a CUDA graph")
