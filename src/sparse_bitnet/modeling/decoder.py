"""The decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3): inference from packed weights.

    x ─ norm ─ qkv_proj ─ [q/k norms] ─ rotation ─ cache ─ attention ─ o_proj ─ + ─┐
    ┌──────────────────────────────────────────────────────────────────────────────┘
    └ norm ─ gate_up_proj ─ SwiGLU ─ down_proj ─ + ─

Linears that read the same input are one product: one quantization of the input serves all of them,
and every matrix keeps its own γ, because scales are kept for each row. Built by ``build.py``.

One decoder runs in three ways, which differ in the order of float sums only:

* module by module, as it is written here: prompts, anything;
* one token of each sequence goes from embedding to logits in one native call on a CPU
  (``native.py``), as one recorded graph on a GPU (``graph.py``);
* compiled on a GPU, over a cache of fixed size.

On a GPU norms quantize (a layer's kernels take residual sum, norm and quantization as one, and the
products behind read integers). The native call computes what modules compute without calling them,
so on a CPU hooks on modules see prompts only; on a GPU a model with hooks goes module by module.
Hidden states and attentions are asked for by ``output_hidden_states`` and ``output_attentions``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from sparse_bitnet.core import ConfigError
from sparse_bitnet.modeling.cache import KeyValueCache, StaticKeyValueCache
from sparse_bitnet.modeling.graph import GraphStep
from sparse_bitnet.modeling.layers import FULL, SLIDING, DecoderLayer, RMSNorm
from sparse_bitnet.modeling.native import NativeStep
from sparse_bitnet.modeling.reads import Given


class DecoderPreTrainedModel(PreTrainedModel):
    """Base class of the decoder's models for transformers."""

    base_model_prefix = "model"
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def init_weights(self) -> None:
        """Nothing: the weights are those of the model that this one was built from."""

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: no reader knows fused weights.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "this model's weights are fused to run and no reader knows them so; copy the directory "
            "that it was loaded from, or load it with AutoModelForCausalLM.from_pretrained"
        )


class Decoder(DecoderPreTrainedModel):
    """The layers between embedding and head: tokens ``[batch, tokens]`` → hidden states."""

    def __init__(
        self,
        config: PreTrainedConfig,
        embed_tokens: nn.Module,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        rotary_emb: nn.Module,
    ) -> None:
        super().__init__(config)
        self.embed_tokens, self.norm, self.rotary_emb = embed_tokens, norm, rotary_emb
        self.layers = nn.ModuleList(layers)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Arguments and result as of transformers' models; ``options`` reach the attention."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        config, cache = self.config, past_key_values
        use_cache = config.use_cache if use_cache is None else use_cache
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        if output_attentions is None:
            output_attentions = config.output_attentions
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and cache is None:
            cache = KeyValueCache(config)
        if position_ids is None:
            seen = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(x.shape[1], device=x.device) + seen).unsqueeze(0)
        rotary = self.rotary_emb(x, position_ids)

        states: list[Tensor] = []
        attentions: list[Any] = []
        masks = attention_mask
        if not isinstance(masks, dict):  # as ``generate`` prepares them for a static cache
            masks = create_masks_for_generate(
                config=config,
                inputs_embeds=x,
                attention_mask=attention_mask,
                past_key_values=cache,
                position_ids=position_ids,
            )
        y = x
        layers: Any = zip(self.layers, _of_layers(cache, self.layers), strict=True)
        for layer, layer_cache in layers:
            states.append(y)
            kind = FULL if layer.self_attn.sliding_window is None else SLIDING
            mask = masks[kind] if isinstance(masks, dict) else masks
            y, weights = layer(y, rotary, mask, layer_cache, position_ids=position_ids, **options)
            attentions.append(weights)
        if isinstance(cache, StaticKeyValueCache):
            cache.advance(x.shape[1])
        y = self.norm(y)
        output = BaseModelOutputWithPast(
            last_hidden_state=y,
            past_key_values=cache if use_cache else None,
            hidden_states=(*states, y) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output.to_tuple() if return_dict is False else output


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    """A causal language model of the Llama family that runs from packed weights.

    An ordinary model of transformers: ``generate``, streaming, batches and continuous batching are
    theirs. For inference, and it cannot be saved; see :func:`sparse_bitnet.modeling.build_decoder`.
    """

    def __init__(
        self,
        model: Decoder,
        lm_head: nn.Module,
        generation_config: GenerationConfig | None = None,
    ) -> None:
        super().__init__(model.config)
        self.model, self.lm_head = model, lm_head
        self.native, self.graph = NativeStep(model), GraphStep(model)
        if generation_config is not None:
            self.generation_config = generation_config
        self.post_init()
        self.requires_grad_(False)
        self.eval()

    def _apply(self, *args: Any, **options: Any) -> Any:
        """Move or convert the model, whose graphs would hold the old memory."""
        self.graph.drop()
        return super()._apply(*args, **options)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Arguments and result as of transformers' causal language models."""
        recorded = (
            options.get(name) or getattr(self.config, name)
            for name in ("output_hidden_states", "output_attentions")
        )
        logits, found = None, BaseModelOutputWithPast(past_key_values=past_key_values)
        if not any(recorded):
            given = Given(
                self.lm_head,
                input_ids,
                inputs_embeds,
                attention_mask,
                position_ids,
                past_key_values,
                options,
            )
            tried = (step(given) for step in (self.native, self.graph))
            logits = next((one for one in tried if one is not None), None)
            if logits is not None and isinstance(logits_to_keep, Tensor):
                logits = logits[:, logits_to_keep]
        if logits is None:
            found = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **options,
            )
            hidden = found.last_hidden_state
            if isinstance(logits_to_keep, Tensor):
                hidden = hidden[:, logits_to_keep]
            elif logits_to_keep:
                hidden = hidden[:, -logits_to_keep:]
            logits = self.lm_head(hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options
            )
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=found.past_key_values,
            hidden_states=found.hidden_states,
            attentions=found.attentions,
        )
        return output.to_tuple() if return_dict is False else output

    def generate(self, *args: Any, **options: Any) -> Any:
        """transformers' ``generate``, over a :class:`KeyValueCache` unless another is asked for."""
        config = options.get("generation_config") or self.generation_config
        wanted = {
            name: options.get(name, getattr(config, name, None))
            for name in ("cache_implementation", "use_cache")
        }
        if (
            options.get("past_key_values") is None
            and wanted["cache_implementation"] in (None, "dynamic")
            and wanted["use_cache"] is not False
        ):
            options["past_key_values"] = KeyValueCache(self.config)
        return super().generate(*args, **options)  # type: ignore[misc]  # the mixin is not typed


class _LayerOf:
    """One layer of a cache that has to be updated as a whole: offloaded, or without layers yet."""

    def __init__(self, cache: Cache, index: int) -> None:
        self.cache, self.index = cache, index

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        both: tuple[Tensor, Tensor] = self.cache.update(keys, values, self.index)
        return both


def _of_layers(cache: Any, layers: nn.ModuleList) -> list[Any]:
    """The cache of each layer, so that compiled layers, which are alike, share one graph."""
    if cache is None:
        return [None] * len(layers)
    if len(cache.layers) == len(layers) and not cache.offloading:
        return list(cache.layers)
    return [_LayerOf(cache, index) for index in range(len(layers))]
