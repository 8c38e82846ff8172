"""Token counts that change under ``torch.compile``, on a GPU that is pretended.

Every kernel of a GPU is played by its reference on a CPU, so what is tested is the tracing: what a
compiler is given, when it compiles again, and who chooses the backend.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from sparse_bitnet.core import Pattern, row_scale, ternarize
from sparse_bitnet.formats import windows
from sparse_bitnet.kernels import dispatch, matmul, symbolic, tuning
from sparse_bitnet.kernels.matmul import reference
from sparse_bitnet.kernels.weight import TernaryWeight

LENGTHS = [1, 40, 300, 2, 33, 5000, 32, 17]
IN, INNER = 32, 48
# Functions of the package carry the names of these modules.
quantization = importlib.import_module("sparse_bitnet.kernels.quantize_activations")

pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")


def _matmul_and_residual(*operands: Any) -> Tensor:
    *product, residual = operands
    y: Tensor = reference.ternary_matmul(*product)
    return y if residual is None else residual + y


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the kernels that ran."""
    ran: list[str] = []
    memory = tuning.Memory(None)

    def played(name: str, by: Callable[..., Any]) -> None:
        def kernel(*arguments: Any) -> Any:
            ran.append(name)
            return by(*arguments)

        library.impl(name, kernel, "CPU")

    def structured_matmul(
        x_q: Tensor, x_scale: Tensor | None, weight: Tensor, w_scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        one = torch.ones(*x_q.shape[:-1], 1) if x_scale is None else x_scale
        return reference.ternary_matmul(x_q, one, weight, w_scale, bias, torch.bfloat16)

    def packed_swiglu(
        x_q: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y = reference.ternary_matmul(x_q, x_scale, weight, w_scale, None, dtype)
        values, scale = quantization.reference.quantize_fused(y, swiglu=True)
        return values, scale

    def add_norm_quantize(
        x: Tensor, delta: Tensor, weight: Tensor, epsilon: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        return x + delta, *quantization.reference.quantize_fused(x + delta, weight, epsilon)

    for module in (dispatch, matmul, quantization):
        monkeypatch.setattr(module, "runs_triton", lambda tensor: True)
    monkeypatch.setattr(tuning, "memory", lambda index: memory)
    monkeypatch.setattr(tuning, "may_measure", lambda: True)
    monkeypatch.setenv("SPARSE_BITNET_MEASURE", "0")
    dispatch._decisions.clear()
    library = torch.library.Library("sparse_bitnet", "IMPL")
    played("quantize_activations", quantization.reference.quantize_fused)
    played("add_norm_quantize", add_norm_quantize)
    played("dense_matmul", reference.ternary_matmul)
    played("packed_matmul", _matmul_and_residual)  # its weight is not packed here
    played("packed_swiglu", packed_swiglu)
    played("structured_matmul", structured_matmul)
    played("linear", symbolic._linear)
    played("gated_mlp", symbolic._gated_mlp)
    torch._dynamo.reset()
    counters.clear()
    yield ran
    library._destroy()
    dispatch._decisions.clear()
    torch._dynamo.reset()


def weight_of(out: int = 24, columns: int = IN, sparse: bool = True) -> TernaryWeight:
    pattern = Pattern(6, 8)
    generator = torch.Generator().manual_seed(out)
    ternary, scale = ternarize(torch.randn(out, columns, generator=generator), pattern, None)
    structured = windows.encode(ternary, 8) if sparse else None
    return TernaryWeight(
        pattern,
        row_scale(scale, (), out),
        out,
        columns,
        ternary,
        ternary,
        structured=structured,
        group=8 if sparse else 0,
    )


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(shape[-1])).bfloat16()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def layers() -> dict[str, Callable[[Tensor], Tensor]]:
    gate_up, down = weight_of(2 * INNER), weight_of(IN, INNER)
    bias = torch.randn(down.out_features)
    return {
        "linear": lambda x: dispatch.ternary_linear(x, gate_up),
        "biased": lambda x: dispatch.ternary_linear(x, weight_of_bias, bias),
        "mlp": lambda x: dispatch.gated_mlp(x, gate_up, down) + x,
    }


weight_of_bias = weight_of(IN)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["linear", "biased", "mlp"])
@pytest.mark.parametrize("how", ["automatic", "dynamic", "marked", "batched"])
def test_one_graph_serves_all_lengths(calls: list[str], name: str, how: str, compiler: str) -> None:
    layer = layers()[name]
    compiled = torch.compile(
        layer, fullgraph=True, backend=compiler, dynamic=True if how == "dynamic" else None
    )
    for length in LENGTHS:
        x = tokens(2, length) if how == "batched" else tokens(length)
        if how == "marked" and length > 1:
            torch._dynamo.mark_dynamic(x, 0)
        expected = layer(x)
        calls.clear()
        found = compiled(x)
        # A compiler rounds the token scale of a sparse product where it is read, not before.
        torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-3)
    # One token is a graph of its own; so is the first length, where nothing says that it changes.
    assert graphs() <= (3 if how in ("automatic", "batched") else 2)


@pytest.mark.parametrize(
    ("length", "kernel"), [(20, "packed_matmul"), (100, "dense_matmul"), (900, "structured_matmul")]
)
def test_the_choice_is_made_when_the_graph_runs(calls: list[str], length: int, kernel: str) -> None:
    weight = weight_of()
    compiled = torch.compile(
        lambda x: dispatch.ternary_linear(x, weight),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    compiled(tokens(64))
    calls.clear()
    x = tokens(length)
    assert torch.equal(compiled(x), dispatch.ternary_linear(x, weight))
    assert calls[:3] == ["linear", "quantize_activations", kernel]
    assert graphs() == 1


def test_what_was_measured_decides(calls: list[str]) -> None:
    weight = weight_of()
    compiled = torch.compile(
        lambda x: dispatch.ternary_linear(x, weight),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    compiled(tokens(64))
    key = dispatch.key_of(weight, 900, torch.bfloat16)
    tuning.memory(0).put(key, {"dense": 1.0, "windows": 2.0, "windows deferred": 0.5})
    calls.clear()
    compiled(tokens(900))
    assert calls[2] == "dense_matmul"


def test_a_draw_goes_to_the_dense_product(calls: list[str]) -> None:
    weight = weight_of()
    key = dispatch.key_of(weight, 900, torch.bfloat16)
    for dense, expected in ((10.2, "dense"), (10.4, "windows")):
        tuning.memory(0).put(key, {"dense": dense, "windows": 10.0})
        assert dispatch.remembered(weight, 900, torch.bfloat16) == expected


def kernels_in(graph: GraphModule) -> list[str]:
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [t.split(".")[1] for t in targets if t.startswith("sparse_bitnet.")]


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, ["packed_matmul"]),
        (20, ["packed_matmul"]),
        (100, ["quantize_activations", "dense_matmul"]),
        (900, ["quantize_activations", "structured_matmul"]),
    ],
)
def test_a_known_length_is_decided_while_tracing(
    calls: list[str], length: int, expected: list[str]
) -> None:
    weight = weight_of()
    seen: list[list[str]] = []

    def backend(graph: GraphModule, _inputs: object) -> Any:
        seen.append(kernels_in(graph))
        return graph.forward

    compiled = torch.compile(
        lambda x: dispatch.ternary_linear(x, weight), fullgraph=True, backend=backend
    )
    compiled(tokens(length))
    assert seen == [expected]


def test_weights_of_several_shapes_in_one_function(calls: list[str]) -> None:
    """Their sizes become symbolic too."""
    compiled = torch.compile(dispatch.ternary_linear, fullgraph=True, backend="aot_eager")
    mlp = torch.compile(dispatch.gated_mlp, fullgraph=True, backend="aot_eager")
    for length in (40, 300, 7):
        x = tokens(length)
        for out in (24, 40, 56, 72, 88):
            weight = weight_of(out, sparse=out != 40)
            expected = dispatch.ternary_linear(x, weight)
            torch.testing.assert_close(compiled(x, weight), expected, rtol=2.0**-7, atol=1e-3)
            pair = weight_of(2 * out), weight_of(IN, out)
            expected = dispatch.gated_mlp(x, *pair)
            torch.testing.assert_close(mlp(x, *pair), expected, rtol=2.0**-7, atol=1e-3)


def test_no_gradient_comes_out(calls: list[str]) -> None:
    weight = weight_of()
    compiled = torch.compile(
        lambda x: dispatch.ternary_linear(x, weight),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    assert not compiled(tokens(9).requires_grad_()).requires_grad


def test_exported_with_a_dynamic_length(calls: list[str]) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return dispatch.ternary_linear(x, weight_of_bias)

    length = torch.export.Dim("length", min=2)
    for strict in (False, True):
        program = torch.export.export(
            Layer(), (tokens(9),), dynamic_shapes=[{0: length}], strict=strict
        )
        for count in (20, 100, 900):
            x = tokens(count)
            assert torch.equal(program.module()(x), dispatch.ternary_linear(x, weight_of_bias))


def test_fakes_are_as_the_kernels(calls: list[str]) -> None:
    gate_up, down = weight_of(2 * INNER), weight_of(IN, INNER)
    x = tokens(2, 5)
    arguments: dict[str, tuple[Any, ...]] = {
        "linear": (x, *dispatch.parts(gate_up), None, torch.float32),
        "gated_mlp": (x, *dispatch.parts(gate_up), *dispatch.parts(down), torch.bfloat16),
    }
    for name, given in arguments.items():
        torch.library.opcheck(getattr(torch.ops.sparse_bitnet, name), given)
