"""What decoding takes: residual sum, norm and quantization in one; a product with SwiGLU."""

from __future__ import annotations

import pytest
import torch

from sparse_bitnet.bench.harness import compile_parts, random_decoder
from sparse_bitnet.bench.inference import Case, call_of
from sparse_bitnet.core import Pattern, row_scale
from sparse_bitnet.kernels import dispatch, ternarize
from sparse_bitnet.kernels.matmul import packed_matmul, packed_swiglu, triton_packed, triton_swiglu
from sparse_bitnet.kernels.quantize_activations import (
    add_norm_quantize,
    quantize_fused,
    reference,
)
from sparse_bitnet.kernels.weight import prepare

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("rows", "columns"), [(1, 3584), (7, 896), (32, 8192), (40, 2048), (1, 8)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_add_norm_quantize(rows: int, columns: int, dtype: torch.dtype) -> None:
    x, delta = torch.randn(2, rows, columns, device="cuda").to(dtype)
    weight = torch.rand(columns, device="cuda").to(dtype)
    total, found, scale = add_norm_quantize(x, delta, weight, 1e-6)
    assert torch.equal(total, x + delta)
    expected, step = reference.quantize_fused(total, weight, 1e-6)
    # Another order of the sum of squares may move a value across a rounding boundary of the dtype.
    torch.testing.assert_close(scale, step, rtol=2.0**-7, atol=0)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).float().mean() < 0.02


@pytest.mark.parametrize("name", triton_swiglu.SWIGLU_TILES)
@pytest.mark.parametrize(("tokens", "inner", "columns"), [(1, 18944, 3584), (2, 1001, 896)])
def test_packed_swiglu(name: str, tokens: int, inner: int, columns: int) -> None:
    ternary, scale = ternarize(torch.randn(2 * inner, columns, device="cuda"), Pattern.parse("6:8"))
    weight = prepare(ternary, row_scale(scale, (), 2 * inner), Pattern.parse("6:8"))
    assert weight.packed is not None
    x_q, x_scale = quantize_fused(torch.randn(tokens, columns, device="cuda").bfloat16())
    y = packed_matmul(x_q, x_scale, weight.packed, weight.w_scale, None, torch.bfloat16)
    expected, step = quantize_fused(y, swiglu=True)
    for _ in range(5):
        found, scale = triton_swiglu.run_swiglu(
            x_q, x_scale.reshape(-1), weight.packed, weight.w_scale, torch.bfloat16, name
        )
        assert torch.equal(found, expected)
        assert torch.equal(scale, step)
    found, scale = packed_swiglu(x_q, x_scale, weight.packed, weight.w_scale, torch.bfloat16)
    assert torch.equal(found, expected)
    assert torch.equal(scale, step)


@pytest.mark.parametrize("tokens", [1, 2, 5, 32])
@pytest.mark.parametrize(("rows", "columns"), [(3584, 18944), (1001, 896), (12000, 64)])
def test_a_residual_is_added_to_the_rounded_product(tokens: int, rows: int, columns: int) -> None:
    ternary, scale = ternarize(torch.randn(rows, columns, device="cuda"), Pattern.parse("6:8"))
    weight = prepare(ternary, row_scale(scale, (), rows), Pattern.parse("6:8"))
    assert weight.packed is not None
    x_q, x_scale = quantize_fused(torch.randn(tokens, columns, device="cuda").bfloat16())
    bias = torch.randn(rows, device="cuda").bfloat16()
    residual = torch.randn(tokens, rows, device="cuda").bfloat16()
    names = triton_packed.candidates(tokens, rows)
    operands = (x_q, x_scale.reshape(-1), weight.packed, weight.w_scale)
    expected = packed_matmul(x_q, x_scale, *operands[2:], bias, torch.bfloat16)
    for name in names:
        found = torch.full_like(residual, torch.nan)
        triton_packed.run(*operands, bias, found, triton_packed.CANDIDATES[name], residual)
        assert torch.equal(found, residual + expected), name


@pytest.mark.parametrize("batch", [1, 3])
def test_a_compiled_token(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    decoder = random_decoder("qwen2.5-0.5b", Pattern.parse("6:8"), layers=2, vocabulary=1024)
    call = call_of(decoder, Case("decode", batch, 100))
    with torch.no_grad():
        expected = call()
        compile_parts(decoder)
        found = call()
        torch._dynamo.reset()
        monkeypatch.setattr(dispatch, "takes_integers", lambda weights, x: False)
        compile_parts(decoder)
        other = call()
    for logits in (found, other):
        assert (logits - expected).abs().max() < 0.05 * expected.abs().max()
