"""Tokens of several sequences from embedding to logits in one native call, on a CPU.

Module by module, a layer runs some thirty PyTorch operators of a few microseconds around four
products, and Python between them, with caches that the weights have just swept. Here the compiled
library takes one token of each sequence through all layers, the last norm and the head, over the
same weights and the same key-value cache: transformers' paged one of continuous batching too.

Results are those of the modules up to the order of float sums: values are rounded to the model's
dtype where the modules round, but probabilities of attention are kept in float32. They do not
depend on how many sequences there are. (Where rotations depend on the longest of them, as with
dynamic RoPE, several go module by module.)
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparse_bitnet.kernels import native
from sparse_bitnet.kernels.native.layer import (
    HEAD_MULTIPLE,
    LARGEST_HEAD,
    LayerCall,
    Row,
    StepCall,
)
from sparse_bitnet.modeling.layers import FULL, Head
from sparse_bitnet.modeling.reads import (
    Given,
    Reads,
    Step,
    batch_layers,
    layer_norms,
    page_allocator,
    rotates_alone,
)
from sparse_bitnet.nn.int8_head import Int8Head, TiedInt8Head

if TYPE_CHECKING:
    from sparse_bitnet.modeling.decoder import DecoderLayer


POSITIONS = 256
"""A table of rotations has so many at least, and doubles when it runs out."""
MOST_POSITIONS = 1 << 22


class NativeStep(Step):
    """The prepared call of a decoder and its head, on a CPU.

    It is prepared again when what it reads was replaced or has moved (:class:`Reads`), when the
    number of threads changes, or the path of the library.
    """

    def _forget(self) -> None:
        self._reads = Reads(self._decoder)
        self._prepared_for: list[Any] = []
        self._table: tuple[Any, Tensor, Tensor] | None = None
        self.call: StepCall | None = None

    def __call__(self, given: Given) -> Tensor | None:
        """See :class:`Step`. Left to the modules: other shapes, devices, dtypes and caches, several
        tokens of a sequence, padding but at the left, several sequences whose rotations depend on
        each other, compilation, autocast, gradients."""
        head, input_ids, inputs_embeds, mask, position_ids, cache, options = given
        tokens = inputs_embeds if input_ids is None else input_ids
        if (
            torch.compiler.is_compiling()
            or tokens is None
            or (input_ids is not None and inputs_embeds is not None)
            or tokens.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or (torch.is_grad_enabled() and tokens.requires_grad)
            or (position_ids is None and options.get("cache") is not None)
            or (tokens.shape[0] * tokens.shape[1] > 1 and not rotates_alone(self._decoder))
        ):
            return None
        count = len(self._decoder.layers)
        if options.get("cache") is None:
            found = _in_a_batch(cache, mask, tokens, count)
        else:
            found = _in_pages(options, tokens, count)
        if found is None:
            return None
        rows, caches = found
        x = self._decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dtype not in native.TYPES or any(keys.dtype != x.dtype for keys, _ in caches):
            return None
        self._prepare(x.dtype, head)
        if self.call is None:
            return None
        if position_ids is None:
            position_ids = torch.full((1, 1), cache.get_seq_length())
        positions = position_ids.expand(tokens.shape[:2]).flatten()
        numbers = positions.tolist()
        if not 0 <= min(numbers) <= max(numbers) < MOST_POSITIONS:
            return None
        rotary = self._rotary(x, positions, max(numbers) + 1)
        if any(one.dtype != x.dtype or one.shape[1] != self.call.head_dim for one in rotary):
            return None
        y = self.call(x.reshape(len(rows), -1).contiguous(), rows, rotary, caches)
        if options.get("cache") is None:
            for one in cache.layers:
                one.extend(1)
        return y.view(*tokens.shape[:2], -1)

    def _prepare(self, dtype: torch.dtype, head_module: nn.Module) -> None:
        """Rebuild the call if anything that it reads has changed."""
        head = _head(head_module)
        reads = self._reads.now(head)
        weights, norms = self._reads.weights, self._reads.norms
        prepared_for = [dtype, torch.get_num_threads(), native.path(), *reads]
        if prepared_for == self._prepared_for:
            return
        self._prepared_for, self.call = prepared_for, None
        layers: Any = self._decoder.layers
        weight, scale, bias = head
        if (
            all(_is_served(layer) for layer in layers)
            and all(one.backend == "native" for one in weights)
            and all(_is_plain(norm.weight, dtype) for norm in norms)
            and weight is not None
            and _is_plain(weight, dtype if scale is None else torch.int8)
        ):
            norm = self._decoder.norm
            self.call = StepCall(
                [_layer_call(layer) for layer in layers],
                norm.weight,
                norm.epsilon,
                weight,
                scale,
                None if bias is None else bias.contiguous(),
                dtype,
            )

    def _rotary(self, x: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[tokens, head_dim]`` of positions below a length.

        Rows of a table where they do not depend on the length of the text.
        """
        module: Any = self._decoder.rotary_emb
        if not rotates_alone(self._decoder):
            cosine, sine = module(x, positions[None])
            return cosine[0], sine[0]
        table_for = x.dtype, module.inv_freq.data_ptr()
        table = self._table  # another thread may put its own there
        if table is None or table[0] != table_for or len(table[1]) < length:
            length = max(POSITIONS, 2 ** (length - 1).bit_length())
            cosine, sine = module(x, torch.arange(length).unsqueeze(0))
            self._table = table = table_for, cosine[0], sine[0]
        _, cosine, sine = table
        return cosine[positions], sine[positions]


Places = tuple[list[Row], list[tuple[Tensor, Tensor]]]
"""Of the tokens of a step, and keys and values of each layer."""


def _in_a_batch(cache: Any, mask: Any, given: Tensor, count: int) -> Places | None:
    """One token of each sequence of a :class:`KeyValueCache`, with padding at the left only."""
    layers = batch_layers(cache, mask, given, count)
    if layers is None:
        return None
    seen, padding = layers[0].get_seq_length() + 1, [0] * given.shape[0]
    if mask is not None:
        kept = mask.bool()
        if not kept.all():
            if not (kept[:, -1].all() and (kept[:, 1:] >= kept[:, :-1]).all()):
                return None
            padding = (seen - kept.sum(1)).tolist()
    caches = [one.reserve(1) for one in layers]
    sequence, _, token, _ = caches[0][0].stride()
    first = sequence // token  # the buffers are contiguous
    return [Row(seen - pad, index * first + pad) for index, pad in enumerate(padding)], caches


def _in_pages(options: dict[str, Any], given: Tensor, count: int) -> Places | None:
    """One token of each sequence of transformers' paged cache, if all layers are of one kind.

    A page of a layer holds the keys of some tokens, all heads of a token after each other, and then
    their values; ``read_index`` numbers the places of a layer's keys, and of its values, from its
    first page on.
    """
    one = page_allocator(options, given, count)
    if one is None:
        return None
    ends, places = options["cu_seq_lens_k"][FULL].tolist(), options["read_index"][one.index]
    if places.numel() != ends[-1] or places.dtype != torch.int64 or not places.is_contiguous():
        return None
    rows = [
        Row(end - start, places=places.data_ptr() + start * places.element_size())
        for start, end in itertools.pairwise(ends)
    ]
    pages = (one.get_cache_for_block_table(index) for index in range(count))
    return rows, [(keys.transpose(1, 2), values.transpose(1, 2)) for keys, values in pages]


def _is_plain(weight: Tensor, dtype: torch.dtype) -> bool:
    return weight.dtype == dtype and weight.device.type == "cpu" and weight.is_contiguous()


def _head(head: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Weight, scale and bias; no weight for a head that the library does not multiply with."""
    table = head.table if isinstance(head, TiedInt8Head) else head
    if isinstance(head, Int8Head | TiedInt8Head):
        return table.weight, table.weight_scale, table.bias
    return (head.weight, None, head.bias) if type(head) is Head else (None, None, None)


def _is_served(layer: DecoderLayer) -> bool:
    """True if the library computes such a layer: SwiGLU, no window, heads of certain sizes."""
    attention = layer.self_attn
    return (
        layer.is_packed
        and layer.mlp.is_silu
        and attention.sliding_window is None
        and attention.head_dim % HEAD_MULTIPLE == 0
        and attention.head_dim <= LARGEST_HEAD
    )


def _layer_call(layer: DecoderLayer) -> LayerCall:
    attention, norms = layer.self_attn, layer_norms(layer)
    weights = [norm.weight for norm in norms]
    return LayerCall(
        [
            (one.prepared("weight"), None if one.bias is None else one.bias.contiguous())
            for one in layer.linears()
        ],
        (weights[0], weights[1]),
        (norms[0].epsilon, norms[1].epsilon),
        (weights[2], weights[3]) if len(norms) > 2 else None,
        norms[2].epsilon if len(norms) > 2 else 0.0,
        (attention.heads, attention.kv_heads),
        attention.head_dim,
        attention.scaling,
    )
