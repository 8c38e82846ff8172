"""Token counts that change under ``torch.compile``, on a GPU that is pretended.

Every kernel of a GPU is played by its reference on a CPU, so what is tested is the tracing: what a
compiler is given, when it compiles again, and who chooses the backend.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sparse_bitnet.nn.attention import ATTENTION
from sparse_bitnet.nn.few_tokens import quantize_in_norms
from sparse_bitnet.nn.fuse import fuse
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
)

from sparse_bitnet.core import Pattern, row_scale, ternarize
from sparse_bitnet.formats import windows
from sparse_bitnet.kernels import dispatch, matmul, symbolic, tuning
from sparse_bitnet.kernels.matmul import reference
from sparse_bitnet.kernels.weight import TernaryWeight
from sparse_bitnet.nn import convert, packed_linear
from sparse_bitnet.nn.int8_head import int8_modules, quantize_rows, swap_int8
from sparse_bitnet.nn.pack import pack_module
from sparse_bitnet.nn.packed_module import prepare
from sparse_bitnet.nn.sparse_bit_linear import SparseBitLinear

LENGTHS = [1, 40, 300, 2, 33, 5000, 32, 17]
IN, INNER = 32, 48
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
# Functions of the package carry the names of these modules.
quantization = importlib.import_module("sparse_bitnet.kernels.quantize_activations")
int8_linear = importlib.import_module("sparse_bitnet.kernels.int8_linear")
decode_attention = importlib.import_module("sparse_bitnet.kernels.decode_attention")

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
    played("decode_attention", decode_attention.reference.decode_attention)
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


def packed_model(monkeypatch: pytest.MonkeyPatch, config: Any = None) -> Any:
    """A fused model (a Qwen2), of packed layers laid out as on a GPU, with an int8 head."""

    def as_on_a_gpu(
        ternary: Tensor, w_scale: Tensor, pattern: Pattern, _stored: object
    ) -> TernaryWeight:
        out, columns = ternary.shape
        lifted = windows.encode(ternary, 8)
        return TernaryWeight(
            pattern, w_scale, out, columns, ternary, ternary, structured=lifted, group=8
        )

    monkeypatch.setattr(packed_linear, "prepare", as_on_a_gpu)
    for module in (int8_linear, decode_attention):
        monkeypatch.setattr(module, "runs_triton", lambda tensor: True)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config or Qwen2Config(**SIZES)).eval()
    table = quantize_rows(model.get_input_embeddings().weight)
    convert(model, "6:8")
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseBitLinear):
            model.set_submodule(name, pack_module(module, "two-bit", name))
    swap_int8(model, int8_modules(model), device="cpu")
    embedding = model.get_input_embeddings()
    embedding.weight.copy_(table[0])
    embedding.weight_scale.copy_(table[1])
    assert fuse(model) == 6
    prepare(model)
    model.set_attn_implementation(ATTENTION)
    return model.bfloat16()


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_whole_model_takes_prompts_of_any_length(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, dynamic: bool | None
) -> None:
    model = packed_model(monkeypatch)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for length in (40, 300, 7, 33, 2, 1, 64, 17):
            ids = torch.randint(0, 96, (1, length))
            expected = model(input_ids=ids, use_cache=False).logits
            calls.clear()
            found = compiled(input_ids=ids, use_cache=False).logits
            assert (found - expected).abs().max() < 0.05 * expected.abs().max()
            assert "gated_mlp" in calls or length in (1, 40)
    assert graphs() <= 5


def test_prompt_and_generated_tokens_compiled(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model(monkeypatch)
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        for length in (40, 9, 77):
            ids = torch.randint(0, 96, (1, length))
            one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
            for _ in range(6):
                expected = model(input_ids=ids, past_key_values=one).logits
                found = compiled(input_ids=ids, past_key_values=other).logits
                assert (found - expected).abs().max() < 0.05 * expected.abs().max()
                ids = expected[:, -1:].argmax(-1)
    assert "decode_attention" in calls
    assert not counters["graph_break"]
    assert graphs() <= 6


@pytest.mark.parametrize("length", [1, 3, 40])
def test_few_tokens_are_quantized_in_their_norms(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    model = packed_model(monkeypatch)
    ids = torch.randint(0, 96, (1, length))
    prepare(model)
    with torch.no_grad():
        plain = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected = plain(input_ids=ids, use_cache=False).logits
        torch._dynamo.reset()
        assert quantize_in_norms(model) == 2
        eager = model(input_ids=ids, use_cache=False).logits
        calls.clear()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(input_ids=ids, use_cache=False).logits
    assert (eager - expected).abs().max() < 0.05 * expected.abs().max()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    layer = [
        "quantize_activations",
        "packed_matmul",
        *(["decode_attention"] if length == 1 else []),
        "quantize_activations",
        "packed_matmul",
        "add_norm_quantize",
        *(["packed_swiglu"] if length == 1 else ["packed_matmul", "quantize_activations"]),
        "packed_matmul",
    ]
    assert calls[: 2 * len(layer)] == 2 * layer or length > dispatch.MOST_PACKED_TOKENS
    assert "add_norm_quantize" not in calls or length <= dispatch.MOST_PACKED_TOKENS


def test_norms_of_another_dtype_stay_the_compilers(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model(monkeypatch)
    quantize_in_norms(model)
    for layer in model.model.layers:
        layer.input_layernorm.float()
    ids = torch.randint(0, 96, (1, 1))
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        calls.clear()
        found = torch.compile(model, backend="aot_eager")(input_ids=ids, use_cache=False).logits
    assert "add_norm_quantize" not in calls
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", ["input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp"])
def test_hooks_in_a_layer_are_called_with_tensors(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = packed_model(monkeypatch)
    quantize_in_norms(model)
    model = copy.deepcopy(model)
    seen: list[Any] = []
    hooked = model.model.layers[1].get_submodule(name)
    handle = hooked.register_forward_hook(lambda _module, inputs, _y: seen.extend(inputs))
    ids = torch.randint(0, 96, (1, 1))
    with torch.no_grad():
        torch.compile(model, backend="aot_eager")(input_ids=ids, use_cache=False)
    assert "add_norm_quantize" not in calls
    assert [type(x) for x in seen] == [Tensor]
    handle.remove()


def test_layers_that_are_alike_share_a_graph(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model(monkeypatch)
    quantize_in_norms(model)
    first = model.model.layers[0]
    x = torch.randn(1, 1, 32).bfloat16()
    rotary = model.model.rotary_emb(x, torch.zeros(1, 1, dtype=torch.long))
    with torch.no_grad():
        for layer in (first, copy.deepcopy(first), copy.deepcopy(first)):
            layer.compile(dynamic=False, backend="aot_eager")
            x = layer(x, position_embeddings=rotary)
    assert calls.count("add_norm_quantize") == 3
    assert graphs() == 1


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True),
        MistralConfig(**SIZES, head_dim=8, sliding_window=4),
        Qwen3Config(**SIZES, head_dim=8),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 5)])
def test_few_tokens_of_other_architectures(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, config: Any, shape: tuple[int, int]
) -> None:
    """Sequences of several lengths over a cache, with biases, windows, norms of heads."""
    model = packed_model(monkeypatch, config)
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):
            buffer.normal_()
    ids, new = torch.randint(0, 96, (shape[0], 9)), torch.randint(0, 96, shape)
    mask = torch.ones(shape[0], 9 + shape[1], dtype=torch.long)
    mask[1:, :3] = 0

    def logits(step: Any) -> Tensor:
        cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask[:, :9], past_key_values=cache)
            found: Tensor = step(input_ids=new, attention_mask=mask, past_key_values=cache).logits
        return found

    expected = logits(model)
    assert quantize_in_norms(model) == 2
    calls.clear()
    found = logits(torch.compile(model, fullgraph=True, backend="aot_eager"))
    assert calls.count("add_norm_quantize") == 2
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
