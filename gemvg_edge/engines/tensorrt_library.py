"""The TensorRT library: importing it, its log as text, and whether it takes a bundle. Imports it only when asked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemvg_edge.bundle import EngineBuild
from gemvg_edge.errors import GemvgError

LONGEST = 500  # characters of TensorRT's own words
LEAST = {"standard": (10, 15), "plain": (10, 3)}  # dialect -> the first TensorRT whose parser takes it
MISSING = (
    "on a Jetson run `sudo apt install python3-libnvinfer` (a virtual environment then needs --system-site-packages), "
    "elsewhere `pip install 'tensorrt-cu13>=10.15,<11'`, or for a driver of CUDA 12 "
    "`pip install 'tensorrt-cu12>=10.15,<11'`"
)


def load_tensorrt() -> Any:
    """The module `tensorrt`."""
    try:
        import tensorrt
    except ImportError as error:
        raise GemvgError(f"TensorRT cannot be imported ({error}); {MISSING}") from None
    return tensorrt


def new_log(trt: Any) -> Any:
    """A trt.ILogger that keeps what went wrong: `log.errors` is a list of messages, emptied by whoever reports them."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base is known only now
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.errors.append(message)

    return Log()


def reason(log: Any) -> str:
    """What went wrong in one line, and the log is empty again: the cause comes first, its consequence last."""
    errors = log.errors or ["TensorRT gives no reason"]
    text = " ".join("; ".join(dict.fromkeys([errors[0], errors[-1]])).split())
    log.errors = []
    return text if len(text) <= LONGEST else text[:LONGEST] + "..."


def check_dialect(dialect: str, where: Path, version: str | None = None) -> None:
    """Refuse a bundle of graphs that this TensorRT's parser does not take, or without a version that none takes."""
    if dialect not in LEAST:
        raise GemvgError(
            f"{where} has the dialect {dialect}, which only ONNX Runtime takes; export the checkpoint with "
            "`python -m export.to_onnx CHECKPOINT BUNDLE --dialect standard`, or plain for a TensorRT before 10.15"
        )
    if version is None:
        return
    here = tuple(int(part) for part in version.split(".")[:2])
    if here < LEAST["plain"]:
        raise GemvgError(f"TensorRT {version} is too old; 10.3 or newer is needed (JetPack 6.2 has it)")
    if here < LEAST[dialect]:
        raise GemvgError(
            f"{where} has the dialect {dialect}, which TensorRT takes from 10.15 on, and this is {version}; "
            "export the checkpoint with `python -m export.to_onnx CHECKPOINT BUNDLE --dialect plain`"
        )


def check_build(build: EngineBuild, version: str, compute_capability: str, gpu: str, where: Path) -> None:
    """Refuse engines of another TensorRT or GPU: they are not portable, and TensorRT's own words for it are unclear."""
    again = "build them here from the graphs' bundle with `python -m export.to_tensorrt BUNDLE OUT`"
    if build.version != version:
        raise GemvgError(f"{where} holds engines of TensorRT {build.version}, and this is {version}; {again}")
    if build.compute_capability != compute_capability:
        raise GemvgError(
            f"{where} holds engines for {build.gpu} (compute capability {build.compute_capability}), and this GPU is "
            f"{gpu} ({compute_capability}); {again}"
        )


def driver_advice(cuda_python: str, driver: int) -> str:
    """What to do where cuda-python is newer than the driver, whose `driver` is 12060 for CUDA 12.6, 0 for none."""
    major, minor = driver // 1000, driver % 1000 // 10
    if not driver:
        return f"cuda-python {cuda_python} finds no NVIDIA driver; install one (`nvidia-smi` shows it then)"
    # Within a major version an older driver will do, but not on every board.
    below = f"{major}.{minor + 1}" if cuda_python.startswith(f"{major}.") else f"{major + 1}"
    return (
        f"cuda-python {cuda_python} is newer than this driver of CUDA {major}.{minor}; run "
        f"`pip install 'cuda-python<{below}'`, or install a newer driver"
    )
