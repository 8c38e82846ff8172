import pytest
import torch

from sparse_bitnet.core import (
    DENSE,
    BackendError,
    Pattern,
    quantize_int8,
    row_scale,
    ternarize,
)
from sparse_bitnet.kernels import dispatch, native
from sparse_bitnet.kernels.matmul.reference import ternary_matmul
from sparse_bitnet.kernels.weight import TernaryWeight, prepare


def weight_of(pattern: Pattern) -> TernaryWeight:
    ternary, scale = ternarize(torch.randn(24, 32), pattern, None, (16, 8))
    return prepare(ternary, row_scale(scale, (16, 8), 24), pattern)


@pytest.mark.parametrize("name", ["dense", "6:8", "2:4"])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_linear_on_cpu_is_the_reference(name: str, tokens: int) -> None:
    weight = weight_of(Pattern.parse(name))
    x, bias = torch.randn(tokens, 32), torch.randn(24)
    x_q, x_scale = quantize_int8(x) if tokens else (x.to(torch.int8), x[:, :1])
    expected = ternary_matmul(x_q, x_scale, weight.dense, weight.w_scale, bias)
    assert torch.equal(dispatch.ternary_linear(x, weight, bias), expected)
    for backend in dispatch.backends(weight, tokens):
        assert torch.equal(dispatch.ternary_linear(x, weight, bias, backend=backend), expected)
    with native.forced("reference"):
        weight = weight_of(Pattern.parse(name))
        assert dispatch.backends(weight, tokens) == ["reference"]
        choice = dispatch.choose(weight, tokens)
    assert (choice.backend, choice.why) == ("reference", "reference, as forced")


def test_scales_of_rows_are_laid_out_with_the_weight() -> None:
    """Kernels read them before those ahead have ended, which a copy just made would be one of."""
    ternary = torch.zeros(16, 64, dtype=torch.int8)
    assert prepare(ternary, torch.ones(1).expand(16)).w_scale.is_contiguous()


def test_refuses_a_backend_of_another_device() -> None:
    weight = weight_of(DENSE)
    with pytest.raises(BackendError, match=r"'windows' does not serve 2 tokens × dense weight"):
        dispatch.ternary_linear(torch.randn(2, 32), weight, backend="windows")


def test_linear_compiles_in_one_graph() -> None:
    weight = weight_of(Pattern(6, 8))
    x = torch.randn(5, 32)
    linear = torch.compile(
        lambda x: dispatch.ternary_linear(x, weight), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(linear(x), dispatch.ternary_linear(x, weight))


def test_decides_by_what_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_bitnet.kernels import tuning

    memory = tuning.Memory(None)
    monkeypatch.setattr(tuning, "memory", lambda index: memory)
    usable = ("dense", "packed", "windows")
    assert dispatch._decide(0, "key", usable, 1).backend == "packed"
    assert dispatch._decide(0, "key", usable, 100).backend == "dense"
    assert dispatch._decide(0, "key", usable, 4096).backend == "windows"
    assert dispatch._decide(0, "key", ("dense",), 4096).backend == "dense"
    memory.put("key", {"windows": 3.0, "dense": 2.0, "2:4": 1.0})
    choice = dispatch._decide(0, "key", usable, 4096)
    assert choice.backend == "dense"
    assert choice.why == "measured 2.0 µs (windows 3.0)"
    memory.put("key", {"windows": 3.0, "dense": 2.0, "windows deferred": 1.5})
    assert dispatch._decide(0, "key", usable, 4096).backend == "dense"
    assert dispatch._decide(0, "key", usable, 4096, deferred=True).backend == "windows"


def test_dense_pattern_is_the_default() -> None:
    assert prepare(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2)).pattern == DENSE
