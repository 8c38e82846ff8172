"""Type 42 in a build of llama.cpp that knows it: its own dequantization, and logits of a model."""

import copy
import ctypes
import statistics
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from sparse_bitnet.data.tokenizer import train_bpe
from sparse_bitnet.export.gguf.write import encode_q2_0, export_gguf
from sparse_bitnet.nn import SparseBitLinear, convert
from sparse_bitnet.nn.sub_norm import add_sub_norms
from sparse_bitnet.train import SparsityConfig, load_trained, save_trained

there = pytest.importorskip("llama_cpp_py_sync")
try:
    LIBRARY = ctypes.CDLL(str(Path(there.__file__).parent / "libggml-base.so.0"))
except OSError as error:  # macOS, or a glibc older than the wheel's
    pytest.skip(str(error), allow_module_level=True)
TEXT = ["def main():\n    return the name of the file 1234\n"] * 30


def test_their_own_dequantization_returns_the_weights():
    rng = np.random.default_rng(0)
    values = rng.integers(-1, 2, (5, 192)).astype(np.float32)
    values *= rng.random((5, 1)).astype(np.float16)
    values[2] = 0
    values[3, :64] = 0
    encoded = np.ascontiguousarray(encode_q2_0(values))
    assert encoded.size == values.size // 64 * 18
    found = np.full_like(values, np.nan)
    LIBRARY.dequantize_row_q2_0(
        encoded.ctypes.data_as(ctypes.c_void_p),
        found.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(values.size),
    )
    assert np.array_equal(found, values)


@contextmanager
def opened(path):
    """A function from token ids to the logits after the last of them."""
    from llama_cpp_py_sync._cffi_bindings import get_ffi, get_lib

    ffi, lib = get_ffi(), get_lib()
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    assert model != ffi.NULL

    def logits(ids):
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_threads, options.type_k, options.type_v = 64, 1, 0, 0
        options.flash_attn_type = 0  # which rounds to fp16
        context = lib.llama_init_from_model(model, options)
        tokens = ffi.new("llama_token[]", ids)
        assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))) == 0
        size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        found = ffi.unpack(lib.llama_get_logits_ith(context, -1), size)
        lib.llama_free(context)
        return torch.tensor(found)

    yield logits
    lib.llama_model_free(model)


class RoundedByBlock(torch.nn.Module):
    """A ternary layer as it computes there: γ in fp16, activations by blocks of 32 (Q8_0), whose
    steps are in fp16."""

    def __init__(self, layer):
        super().__init__()
        ternary, scale, _ = layer.derived()
        self.weight = ternary * scale.half().float()

    def forward(self, x):
        blocks = x.unflatten(-1, (-1, 32))
        step = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
        return F.linear(((blocks / step).round() * step.half().float()).flatten(-2), self.weight)


@pytest.mark.parametrize("sub_norms", [False, True])
def test_logits_of_a_random_model(tmp_path, sub_norms):
    """Rows of 192 and 576, which only this type stores as ternary; as ``llama`` and ``bitnet``."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=192,
            intermediate_size=576,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            eos_token_id=0,
            tie_word_embeddings=True,
        )
    )
    if sub_norms:
        model = add_sub_norms(model, torch.randint(1, 320, (4, 32)))
    convert(model, "6:8")
    save_trained(model, train_bpe(TEXT, 320), tmp_path / "t", SparsityConfig(pattern="6:8"))
    export_gguf(tmp_path / "t", tmp_path / "m.gguf", linears="q2_0")
    ours, _ = load_trained(tmp_path / "t")
    alike = copy.deepcopy(ours)
    for name, layer in list(alike.named_modules()):
        if isinstance(layer, SparseBitLinear):
            alike.set_submodule(name, RoundedByBlock(layer))
    for weight in {alike.get_input_embeddings().weight, alike.get_output_embeddings().weight}:
        weight.data = weight.half().float()
    from_ours, from_alike, spreads = [], [], []
    with opened(tmp_path / "m.gguf") as logits, torch.no_grad():
        for prompt in torch.randint(1, 320, (16, 8)):
            found = logits(prompt.tolist())
            wanted = ours(prompt[None]).logits[0, -1]
            from_ours.append(float((found - wanted).abs().mean()))
            from_alike.append(float((found - alike(prompt[None]).logits[0, -1]).abs().mean()))
            spreads.append(float(wanted.std()))
    spread = statistics.median(spreads)
    print(
        f"{statistics.mean(from_ours) / spread:.1e} of a logit's deviation from ours, "
        f"{statistics.median(from_alike) / spread:.1e} from its like"
    )
    # Another rounding of activations, and another order of sums, which turns some of them over.
    assert statistics.mean(from_ours) < 0.03 * spread
    assert statistics.median(from_alike) < 0.0005 * spread
