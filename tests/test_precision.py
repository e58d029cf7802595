"""Whose attention runs, and that it computes the same."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from train.precision import attending

FUSED = "aten::_scaled_dot_product_flash_attention_for_cpu"


def attended(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor], set[str]]:
    """What attention gives, its gradients, and the operations that ran; always from the same numbers."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, heads, 40, 32).bfloat16().to(dtype).requires_grad_() for heads in (6, 2, 2)]
    seen = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, 40, 40)
    with attending(kind), profile(activities=[ProfilerActivity.CPU]) as ran:
        query, key, value = inputs
        output = scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        output.float().square().sum().backward()
    gradients = [tensor.grad for tensor in inputs if tensor.grad is not None]
    return output, gradients, {event.key for event in ran.key_averages()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_products_attend_as_the_fused_kernel_does(dtype: torch.dtype) -> None:
    """In bfloat16 they may err by three times what the fused kernel does: it alone keeps scores in float32."""
    exact, fused, plain = attended("sdpa", torch.float32), attended("sdpa", dtype), attended("math", dtype)
    assert FUSED in fused[2]
    assert FUSED not in plain[2]
    assert plain[0].dtype == dtype
    assert len(plain[1]) == 3
    for truth, theirs, ours in zip([exact[0], *exact[1]], [fused[0], *fused[1]], [plain[0], *plain[1]], strict=True):
        assert (ours - truth).abs().max() <= 3 * (theirs - truth).abs().max() + 1e-5


def test_bfloat16_products_stay_in_bfloat16_and_only_within() -> None:
    allowed = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    with attending("math"):
        assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == allowed
    assert FUSED in attended("sdpa", torch.float32)[2]
