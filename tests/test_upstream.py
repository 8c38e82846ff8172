"""Private and version-sensitive names of other libraries that this package uses.

Each has its own test, whose name says what has moved. What only a GPU build has is skipped
elsewhere.
"""

import ast
import inspect
import re
import tomllib
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from transformers import ContinuousBatchingConfig

ROOT = Path(__file__).parents[1]

BATCHING = "transformers.generation.continuous_batching"
PROCESSORS = f"{BATCHING}.cb_logits_processors.ContinuousBatchingLogitsProcessorList"
MANAGER = f"{BATCHING}.ContinuousBatchingManager"
QUANTIZER = "transformers.quantizers.base.HfQuantizer"
H11 = "uvicorn.protocols.http.h11_impl"

NAMES = [
    # PyTorch: private, or without a promise to stay.
    "torch._int_mm",
    "torch._scaled_mm",
    "torch._foreach_norm",
    "torch._C.parse_schema",
    "torch._dynamo.config.recompile_limit",
    "torch._dynamo.reset",
    "torch._inductor.config.combo_kernels",
    "torch.nn.Module._apply",
    "torch.nn.Module._save_to_state_dict",
    "torch.Tensor._make_wrapper_subclass",
    "torch.distributed.fsdp.fully_shard",
    # transformers: outside of its documented interface.
    "transformers.activations.ACT2FN",
    "transformers.cache_utils.DynamicLayer.lazy_initialization",
    "transformers.cache_utils.DynamicLayer.crop",
    "transformers.masking_utils.create_masks_for_generate",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.get_interface",
    "transformers.models.auto.tokenization_auto.get_tokenizer_config",
    "transformers.utils.chat_template_utils.render_jinja_template",
    "transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX",
    "transformers.models.llama.modeling_llama.eager_attention_forward",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward",
    "transformers.quantizers.auto.register_quantizer",
    "transformers.quantizers.auto.register_quantization_config",
    "transformers.quantizers.base.get_keys_to_not_convert",
    "transformers.quantizers.quantizers_utils.should_convert_module",
    "transformers.utils.quantization_config.QuantizationConfigMixin",
    "transformers.PreTrainedModel._keys_to_ignore_on_load_unexpected",
    "transformers.PreTrainedModel._tied_weights_keys",
    "transformers.PreTrainedConfig._attn_implementation",
    f"{QUANTIZER}._process_model_before_weight_loading",
    f"{QUANTIZER}._process_model_after_weight_loading",
    f"{QUANTIZER}.update_weight_conversions",
    f"{QUANTIZER}.get_state_dict_and_metadata",
    f"{QUANTIZER}.remove_quantization_config",
    *(
        f"{MANAGER}.{name}"
        for name in ("start", "stop", "destroy", "pause", "cancel_request", "get_result")
    ),
    f"{MANAGER}.__iter__",
    # The paged cache, whose pages the CPU's native step reads.
    f"{BATCHING}.cache_allocators.FullAttentionCacheAllocator.get_cache_for_block_table",
    f"{BATCHING}.cache_allocators.FullAttentionCacheAllocator.layer_type",
    # gguf: every number and string of a header is read by it.
    "gguf.GGUFReader._get",
    # uvicorn: one connection, whose time and number the server bounds.
    *(
        f"{H11}.H11Protocol.{name}"
        for name in ("connection_made", "data_received", "on_response_complete", "connection_lost")
    ),
]
# Documented, only imported from the module that defines it.
PUBLIC = {
    "transformers.configuration_utils.PreTrainedConfig",
    "transformers.modeling_outputs.BaseModelOutputWithPast",
    "transformers.modeling_outputs.CausalLMOutputWithPast",
    "transformers.utils.logging",
}
TRITON_NAMES = [
    "triton.language.inline_asm_elementwise",
    "triton.language.extra.cuda.gdc_wait",
    "triton.language.extra.cuda.gdc_launch_dependents",
    "triton.runtime.errors.OutOfResources",
]
PARAMETERS = {
    "torch._C._cuda_getCurrentRawStream": None,  # a builtin of CUDA builds
    f"{MANAGER}.add_request": {"input_ids", "request_id", "max_new_tokens", "eos_token_id"},
    "transformers.GenerationMixin.init_continuous_batching": {
        "generation_config",
        "continuous_batching_config",
    },
    f"{PROCESSORS}.prepare_tensor_args": {"requests_in_batch", "arg_storage"},
    f"{PROCESSORS}.__call__": {"input_ids", "scores", "logits_processor_args"},
    "transformers.masking_utils.create_masks_for_generate": {
        "config",
        "inputs_embeds",
        "attention_mask",
        "past_key_values",
        "position_ids",
    },
    "transformers.models.llama.modeling_llama.eager_attention_forward": {
        "module",
        "query",
        "key",
        "value",
        "attention_mask",
        "scaling",
        "dropout",
    },
    "transformers.cache_utils.StaticLayer.__init__": {"max_cache_len"},
    "transformers.cache_utils.Cache.__init__": {"layers"},
    f"{QUANTIZER}._process_model_before_weight_loading": {"model"},
}
# Attributes that a constructor sets, which a class alone does not show.
ATTRIBUTES = {
    "torch.nn.Module.register_parameter": ("self._parameters[name]",),
    "torch.nn.Module.register_buffer": ("self._buffers[name]",),
    f"{MANAGER}.__init__": ("logit_processor",),
    f"{H11}.RequestResponseCycle.__init__": ("self.more_body", "self.response_complete"),
    "transformers.cache_utils.StaticLayer.__init__": ("self.cumulative_length",),
    "transformers.cache_utils.StaticLayer.lazy_initialization": ("self.is_initialized = True",),
}


def resolve(name):
    """The object of a dotted name: modules as far as they go, then attributes."""
    parts = name.split(".")
    found = import_module(parts[0])
    for index, part in enumerate(parts[1:], 1):
        if not hasattr(found, part) and inspect.ismodule(found):
            import_module(".".join(parts[: index + 1]))
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_name(name):
    resolve(name)


@pytest.mark.parametrize("name", TRITON_NAMES)
def test_triton_name(name):
    pytest.importorskip("triton")
    resolve(name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(name):
    wanted = PARAMETERS[name]
    if wanted is None:
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA build of PyTorch")
        assert callable(resolve(name))
    else:
        assert wanted <= set(inspect.signature(resolve(name)).parameters)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name):
    source = inspect.getsource(resolve(name))
    assert [text for text in ATTRIBUTES[name] if text not in source] == []


def test_continuous_batching_settings():
    wanted = {"page_size", "num_blocks", "max_batch_tokens", "max_requests_per_batch"}
    wanted |= {"use_cuda_graph", "use_async_batching", "allow_block_sharing"}
    wanted |= {"auto_switch_to_flash"}
    assert wanted <= set(inspect.signature(ContinuousBatchingConfig).parameters)


def test_a_quantizer_sees_the_configuration_before_files_are_looked_for():
    base = resolve(QUANTIZER)
    assert hasattr(base, "update_attn_implementation") or hasattr(base, "update_tp_plan")


def requirements():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [one for some in project["optional-dependencies"].values() for one in some]
    return {one.name: one for one in map(Requirement, project["dependencies"] + extras)}


def test_installed_versions_are_in_the_declared_ranges():
    for name, wanted in requirements().items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue  # of an extra
        assert wanted.specifier.contains(installed, prereleases=True), f"{wanted}: {installed}"


@pytest.mark.parametrize(
    "name", ["torch", "transformers", "uvicorn", "starlette", "tyro", "pydantic"]
)
def test_ranges_end_where_nothing_is_known(name):
    wanted = requirements()[name]
    assert any(one.operator == "<" for one in wanted.specifier), wanted


def test_every_such_name_in_the_source_is_listed():
    """``torch._…`` in code, and what is imported from inside transformers, Triton and uvicorn."""
    listed = {*NAMES, *TRITON_NAMES, *PARAMETERS, *ATTRIBUTES}
    missing = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = []
            if isinstance(node, ast.Attribute):
                used = re.findall(r"^torch\._(?!_)[\w.]*", ast.unparse(node))
            elif isinstance(node, ast.ImportFrom):
                inside = re.match(r"(transformers|triton|uvicorn)\.", node.module or "")
                used = [f"{node.module}.{one.name}" for one in node.names if inside]
            missing |= {
                f"{path.name}: {name}"
                for name in used
                if name not in PUBLIC
                and not any(f"{one}.".startswith(f"{name}.") for one in listed)
            }
    assert not missing
