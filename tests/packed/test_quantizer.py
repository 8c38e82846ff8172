"""The plugin in fresh processes: package imported, trusted, or neither."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import Qwen2Config, Qwen2ForCausalLM

from sparse_bitnet.nn.packed_linear import PackedLinear
from sparse_bitnet.packed.config import HINT, SparseBitNetConfig
from sparse_bitnet.packed.quantizer import SparseBitNetQuantizer

REGISTER = "import sparse_bitnet"
SLOW = pytest.mark.slow  # seconds of imports each
LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(DIRECTORY, **OPTIONS)
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def loading(directory, **options):
    return LOAD.replace("DIRECTORY", repr(str(directory))).replace("OPTIONS", repr(options))


def test_imported(pristine):
    first = f"{REGISTER}\nimport sys\nassert not {{'torch', 'transformers'}} & set(sys.modules)"
    command = [sys.executable, "-c", first + loading(pristine / "trits")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "PackedLinear\n", done.stderr


@pytest.mark.parametrize(
    "before",
    [
        pytest.param(f"import transformers.modeling_utils\n{REGISTER}", marks=SLOW),
        f"{REGISTER}\nimport transformers.modeling_utils\n{REGISTER}",
        pytest.param("import sparse_bitnet.packed.quantizer", marks=SLOW),
    ],
    ids=["transformers first", "modeling first", "direct"],
)
def test_imported_in_another_order(only_torch, pristine, before):
    result = only_torch(before + loading(pristine / "trits"))
    assert result.stdout == "PackedLinear\n", result.stderr


def test_trusted_without_import(only_transformers, pristine, packed, tmp_path):
    """As packed, as version 0.1 packed it, and as transformers saves it again, with the hint."""
    plugin = packed() / "hf_plugin.py"
    old = "from sparse_bitnet.deploy.hf_quantizer import PackedModelConfig"
    text = plugin.read_text()
    assert text.count("from sparse_bitnet.packed.quantizer import PackedModelConfig") == 1
    plugin.write_text(
        text.replace("from sparse_bitnet.packed.quantizer import PackedModelConfig", old)
    )
    again = tmp_path / "again"
    Qwen2ForCausalLM.from_pretrained(pristine / "two-bit").save_pretrained(again)
    with safe_open(again / "model.safetensors", "pt") as file:
        assert HINT in file.keys()  # noqa: SIM118  # not a mapping
    every = [str(path) for path in (pristine / "two-bit", plugin.parent, again)]
    scripts = [loading(directory, trust_remote_code=True) for directory in every]
    result = only_transformers("\n".join(scripts))
    assert result.stdout == "PackedLinear\n" * 3, result.stderr
    assert "LOAD REPORT" not in result.stderr


def test_trusted_without_the_package(only_transformers, pristine):
    hide = "import sys\nsys.modules['sparse_bitnet'] = None\n"
    result = only_transformers(hide + loading(pristine / "two-bit", trust_remote_code=True))
    assert result.returncode != 0 and result.stdout == ""
    assert "sparse_bitnet" in result.stderr.splitlines()[-1]


def test_neither_is_an_error_and_not_a_random_model(only_transformers, pristine):
    result = only_transformers(loading(pristine / "two-bit"))
    assert result.returncode != 0 and result.stdout == ""
    assert "Unknown quantization type, got sparse_bitnet" in result.stderr
    report = result.stderr.index("to load this model: pip install sparse-bitnet, then import spar")
    assert report < result.stderr.index("For details look at the above report!")


def test_a_dense_model_cannot_be_quantized_while_loading(tmp_path, build):
    build("qwen2").save_pretrained(tmp_path)
    config = SparseBitNetConfig({"model.layers.0.mlp.up_proj": {"pattern": "6:8"}}, "trits", 1)
    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        Qwen2ForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_state_dict_instead_of_files(pristine, build):
    """What other loaders do: the configuration's modules, the tensors from elsewhere."""
    packed = Qwen2ForCausalLM.from_pretrained(pristine / "two-bit")
    config = Qwen2Config.from_pretrained(pristine / "two-bit")
    state = packed.state_dict()
    model = Qwen2ForCausalLM.from_pretrained(None, config=config, state_dict=state)
    assert isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    assert torch.equal(model(torch.tensor([[1, 2]])).logits, packed(torch.tensor([[1, 2]])).logits)


def test_a_packed_model_says_what_it_is(pristine):
    model = Qwen2ForCausalLM.from_pretrained(pristine / "two-bit")
    assert isinstance(model.hf_quantizer, SparseBitNetQuantizer)
    assert model.is_quantized and model.quantization_method == "sparse_bitnet"
    assert not model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()
    assert model.config.quantization_config.storage == "two-bit"
    assert all(not name.endswith("proj.weight") for name, _ in model.named_parameters())


def test_the_quantizer_needs_nothing_that_may_be_half_imported(only_torch):
    """transformers looks for quantizers while it imports ``modeling_utils``, which models need."""
    code = (
        "import sys, sparse_bitnet, transformers.quantizers.auto\n"
        "assert 'sparse_bitnet.packed.quantizer' in sys.modules\n"
        "found = [m for m in sys.modules if m == 'transformers.modeling_utils'\n"
        "         or m.startswith('transformers.models.') and '.modeling_' in m]\n"
        "assert not found, found\n"
    )
    done = only_torch(code)
    assert done.returncode == 0, done.stderr
