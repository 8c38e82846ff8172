"""The int8 head on a GPU: the integers of the reference, alone and in a model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_bitnet.kernels.int8_linear import int8_linear, reference
from sparse_bitnet.nn import convert
from sparse_bitnet.nn.int8_head import TiedInt8Head
from sparse_bitnet.packed.load import load_packed
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train.presets import preset_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("tokens", [1, 2, 7, 33, 300])
@pytest.mark.parametrize(("rows", "width"), [(151936, 896), (1001, 72), (300, 33)])
def test_equals_the_reference(tokens, rows, width):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator)
    weight = torch.randint(-127, 128, (rows, width), generator=generator, dtype=torch.int8)
    scale = torch.rand(rows, generator=generator)
    bias = torch.randn(rows, generator=generator)
    expected = reference.int8_linear(x, weight, scale, bias)
    given = (x.cuda(), weight.cuda(), scale.cuda(), bias.cuda())
    assert torch.equal(int8_linear(*given).cpu(), expected)


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_compiled(tokens):
    """A compiler multiplies by 1/127: a step may differ in its last bit, and one of the second row,
    a 254th of a step of the first, may round the other way."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 896, generator=generator)
    weight = torch.randint(-127, 128, (1001, 896), generator=generator, dtype=torch.int8)
    scale = torch.rand(1001, generator=generator)
    expected = reference.int8_linear(x, weight, scale)
    compiled = torch.compile(int8_linear, fullgraph=True)
    found = compiled(x.cuda(), weight.cuda(), scale.cuda()).cpu()
    step = x.abs().amax(-1, keepdim=True) / 127 / 254
    turned = 16 * 127 * step * scale  # of 896 lanes; three in a thousand are so near a tie
    assert ((found - expected).abs() <= turned + 2.0**-20 * expected.abs()).all()


def test_a_packed_model(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(preset_config("demo", 2048))
    convert(model, "6:8")
    pack(model.eval(), tmp_path, head="int8")
    packed = load_packed(tmp_path)
    ids = torch.arange(32)[None]
    with torch.no_grad():
        expected = packed(ids).logits
        moved = packed.cuda()
        assert isinstance(moved.lm_head, TiedInt8Head)
        found = moved(ids.cuda()).logits.cpu()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    tokens = moved.generate(ids.cuda(), max_new_tokens=8, do_sample=False)
    assert tokens.shape == (1, 40)
