"""A loaded model made ready to run: fused, laid out, and decoding in few calls.

On a GPU a token is one CUDA graph, if asked for; on a CPU one call of the compiled kernel.
"""

from __future__ import annotations

from transformers import CompileConfig, PreTrainedModel

from sparse_bitnet.core import ConfigError
from sparse_bitnet.kernels.native.pages import use_large_pages
from sparse_bitnet.kernels.platform import compile_options
from sparse_bitnet.nn.attention import ATTENTION
from sparse_bitnet.nn.few_tokens import quantize_in_norms
from sparse_bitnet.nn.fuse import fuse
from sparse_bitnet.nn.int8_head import Int8Table
from sparse_bitnet.nn.packed_module import prepare
from sparse_bitnet.nn.single_token import step_in_one_call


def make_ready(model: PreTrainedModel, compile: bool = False) -> None:
    """Join what reads the same input and derive compute layouts, in place.

    Such a model generates and is evaluated as before; it can no longer be saved.

    Args:
        model: packed or not, on its device.
        compile: decode with a static key-value cache, compiled, as one CUDA graph (transformers'
            own). Compiling takes its time before the second token, so it pays for long texts.

    Raises:
        ConfigError: for ``compile`` without an NVIDIA GPU.
        PackedFormatError: if stored weights break their pattern.
    """
    if compile and model.device.type != "cuda":
        raise ConfigError(
            f"compile needs the model on an NVIDIA GPU, it is on {model.device.type}; leave it out"
        )
    fuse(model)
    prepare(model)
    if model.device.type == "cpu":
        step_in_one_call(model)
        for module in model.modules():
            if isinstance(module, Int8Table):
                use_large_pages(module.weight)
    if model.device.type == "cuda":
        quantize_in_norms(model)
    if model.device.type == "cuda" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    if compile:
        assert model.generation_config is not None
        model.generation_config.cache_implementation = "static"
        options = {"triton.cudagraphs": True, **compile_options()}
        # PyTorch takes a mode or options; these are what the mode "reduce-overhead" stands for.
        config = CompileConfig(mode=None, options=options)  # type: ignore[arg-type]
        model.generation_config.compile_config = config
