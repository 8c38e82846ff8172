"""DDP, torch.compile and PEFT around a converted model."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from sparse_bitnet.core import ConfigError
from sparse_bitnet.nn import SparseBitLinear, convert
from sparse_bitnet.nn.wrappers import unwrapped
from sparse_bitnet.packed.load import load
from sparse_bitnet.packed.write import pack
from sparse_bitnet.train.callback import SparseBitNetCallback

peft = pytest.importorskip("peft")
ON_WEIGHTS = {"target_modules": [], "target_parameters": ["q_proj.weight", "down_proj.weight"]}
BESIDE = {"target_modules": ["q_proj", "down_proj"]}


def adapted(tiny, where, init=False):
    model = tiny()
    convert(model, "6:8")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, init_lora_weights=init, **where))


def test_an_adapter_on_the_weight_joins_it_before_quantization(tiny, tokens):
    model = adapted(tiny, ON_WEIGHTS)
    plain = tiny()
    added = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, "parameter_name"):
            delta = module.get_delta_weight("default")
            assert delta.abs().max() > 0
            added[f"{name}.weight"] = delta.detach()
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            weight.add_(added.pop(name, 0))
    assert not added
    convert(plain, "6:8")
    loss = model(input_ids=tokens, labels=tokens).loss
    assert torch.equal(loss, plain(input_ids=tokens, labels=tokens).loss)
    loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_" in n)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        merged = model.merge_and_unload()
        assert torch.equal(merged(input_ids=tokens).logits, before)


def test_merged_adapters_are_packed_and_others_refused(tiny, tokens, tmp_path):
    for where in (ON_WEIGHTS, BESIDE):
        model = adapted(tiny, where)
        with pytest.raises(ConfigError, match=r"pack: .*q_proj has an adapter .*merge_and_unload"):
            pack(model, tmp_path / "packed")
        model.merge_adapter()  # merged in place, and still wrapped
        with pytest.raises(ConfigError, match="has an adapter of its own"):
            pack(model.get_base_model(), tmp_path / "packed")
    model = adapted(tiny, ON_WEIGHTS)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        pack(model.merge_and_unload(), tmp_path / "packed")
        assert torch.equal(load(tmp_path / "packed")[0](input_ids=tokens).logits, before)


def test_a_learned_prompt_is_not_packed(tiny, tmp_path):
    model = tiny()
    convert(model, "6:8")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match=r"pack: the prompt .* PeftModelForCausalLM .* left out"):
        pack(peft.get_peft_model(model, config), tmp_path / "packed")
    pack(model, tmp_path / "packed")


def test_convert_refuses_adapters(tiny):
    model = peft.get_peft_model(tiny(), peft.LoraConfig(r=4, **BESIDE))
    with pytest.raises(ConfigError, match=r"convert: .* has an adapter of its own"):
        convert(model, "6:8")
    assert not any(isinstance(module, SparseBitLinear) for module in model.modules())


@pytest.mark.parametrize("where", [ON_WEIGHTS, BESIDE])
def test_the_callback(tiny, tmp_path, where):
    model = adapted(tiny, where, init=True)
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    options = {"max_steps": 2, "use_cpu": True, "report_to": [], "save_steps": 100}
    arguments = TrainingArguments(str(tmp_path), **options)
    callback = SparseBitNetCallback("6:8")
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[callback])
    if where is ON_WEIGHTS:
        trainer.train()
        return
    with pytest.raises(ConfigError, match=r"behind the ternary product.*\['q_proj.weight', …\]"):
        trainer.train()


def test_unwrapped(tiny, tokens, tmp_path):
    model = tiny()
    convert(model, "6:8")
    wrapped = torch.compile(nn.DataParallel(model), backend="eager")
    assert unwrapped(wrapped) is model
    pack(wrapped, tmp_path / "packed")
    with torch.no_grad():
        wanted = model(input_ids=tokens).logits
        assert torch.equal(load(tmp_path / "packed")[0](input_ids=tokens).logits, wanted)
