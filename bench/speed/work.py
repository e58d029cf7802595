"""What a phase has to do, counted from the model's shape, and the share of the machine's peaks that a time reaches."""

from __future__ import annotations

from typing import Any

from bench.fit.roofline import Precision, Shape, prefill_work, vision_work

ANY = Precision("any", "float16")  # operations do not depend on it
DIGITS_BOX = "<|box_start|>(123,456),(789,987)<|box_end|>"  # what others decode token by token


def operations(shape: Shape, picture_tokens: int, pictures: int, prompt_tokens: int) -> dict[str, float]:
    """Additions and multiplications of the vision tower over all pictures, and of the decoder over the prompt."""
    return {
        "vision": sum(vision_work(shape, ANY, picture_tokens, pictures).flops.values()),
        "prefill": sum(prefill_work(shape, ANY, prompt_tokens).flops.values()),
    }


def shares(
    phases: dict[str, float], work: dict[str, float], token_bytes: int, peaks: dict[str, Any]
) -> dict[str, float]:
    """Shares of peak: of int8 and float32 for vision and prefill, of reading for a token; none without a peak."""
    found: dict[str, float] = {}
    for phase, count in work.items():
        rate = count / phases[f"{phase}_ms"] / 1e6  # GOP/s
        for name, peak in (("int8", peaks["int8_gops"]), ("float32", peaks["float32_gflops"])):
            if peak:
                found[f"{phase}_of_{name}"] = rate / peak
    if peaks["read_gbs"]:
        found["token_of_read"] = token_bytes / phases["token_ms"] / 1e6 / peaks["read_gbs"]
    return found


def add_boxes(phases: dict[str, float], box_tokens: int) -> dict[str, float]:
    """A system's phases with its boxes; who decodes one token by token takes as many steps as a box has tokens."""
    if "box_ms" in phases:
        return phases
    first = phases["first_token_ms"] + (box_tokens - 1) * phases["token_ms"]
    return phases | {"first_box_ms": first, "box_ms": box_tokens * phases["token_ms"]}
