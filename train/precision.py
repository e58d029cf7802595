"""What weights are held in and whose attention runs: what a GPU's memory decides, checked before anything is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, get_args, get_type_hints

import torch
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemvg_edge.errors import GemvgError


def check_memory(run: Any) -> None:
    """GemvgError for settings of train.sft's of this kind that cannot work here, or not together."""
    for name in ("dtype", "attention"):
        known = get_args(get_type_hints(type(run))[name])
        if getattr(run, name) not in known:
            raise GemvgError(f"--{name} must be one of {', '.join(known)}, not {getattr(run, name)}")
    if run.max_length is not None and run.max_length < 1:
        raise GemvgError(f"--max-length must be at least 1, not {run.max_length}")
    if run.muon and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise GemvgError("--muon needs whole matrices, which DeepSpeed splits; leave one of the two out")
    if run.attention == "flash_attention_2":
        if not find_spec("flash_attn") or not torch.cuda.is_available():
            raise GemvgError("--attention flash_attention_2 needs a GPU and flash-attn; sdpa needs neither")
        if run.data.suffix != ".jsonl" and run.questions > 1:
            raise GemvgError("--attention flash_attention_2 takes one question a row: --questions 1, or sdpa")
    if run.load_in_4bit:
        if not run.lora_rank:
            raise GemvgError("--load-in-4bit needs --lora-rank: weights in 4 bits are not trained themselves")
        if not find_spec("bitsandbytes") or not torch.cuda.is_available():
            raise GemvgError(
                "--load-in-4bit needs a CUDA GPU and `pip install bitsandbytes`; leave it out, with --dtype bfloat16"
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise GemvgError("--load-in-4bit is for one GPU; several hold the weights under ZeRO-3 without it")


@contextmanager
def attending(attention: str) -> Iterator[None]:
    """Within it torch's attention is what a run's setting says; only "math" differs from what torch chooses itself.

    On a CPU torch's fused kernel never holds a row's scores. Rows of some hundred tokens have room for them, and plain
    products in bfloat16, which torch computes in float32 unless it is told, are faster (docs/training.md).
    """
    if attention != "math":
        yield
        return
    reduced = cuda.fp16_bf16_reduction_math_sdp_allowed()  # type: ignore[no-untyped-call]
    cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of every device, whatever its module is called
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(reduced)


def in_4bit() -> Any:
    """QLoRA's own 4 bits (https://arxiv.org/abs/2305.14314), for the decoder's layers: the rest is small."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "visual"],
    )
