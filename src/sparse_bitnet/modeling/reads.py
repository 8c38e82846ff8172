"""What prepared passes of a decoder share: how they are called, what they hold addresses of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from sparse_bitnet.modeling.cache import GrowingLayer
from sparse_bitnet.modeling.layers import FULL

if TYPE_CHECKING:
    from sparse_bitnet.modeling.decoder import Decoder, DecoderLayer

INDEPENDENT = ("default", "linear", "llama3", "yarn")
"""Kinds of rotation whose angles at one position do not depend on the length of the text."""


class Given(NamedTuple):
    """What a model is asked for."""

    head: nn.Module  # of the model
    # One of these two [batch, 1] or [batch, 1, hidden], the other None; in continuous batching
    # [1, sequences].
    input_ids: Any
    inputs_embeds: Any
    mask: Any  # of the tokens so far, [batch, tokens] with 0 where one is padding, or None
    position_ids: Any  # of the tokens, or None
    cache: Any  # of the model
    options: dict[str, Any]  # for the attention; in continuous batching with the paged cache


class Step(ABC):
    """A prepared pass of one token of each sequence, from embedding to logits.

    It holds addresses, so a copy of a model prepares its own.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"_decoder": self._decoder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_decoder"])  # type: ignore[misc]

    @abstractmethod
    def _forget(self) -> None:
        """Begin with nothing prepared."""

    @abstractmethod
    def __call__(self, given: Given) -> Tensor | None:
        """Logits of the tokens, which the cache grows by.

        Returns:
            ``[batch, 1, vocabulary]``, or ``[1, sequences, vocabulary]``. None where this pass does
            not serve; then nothing has changed.
        """


class Reads:
    """Weights, biases and norms of a decoder's packed layers.

    A pass that was prepared for what :meth:`now` gave is prepared again when it gives something
    else: a module or a weight was replaced, or has moved. Numbers that modules hold, such as a
    norm's epsilon, are taken as they were.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._walks = 0
        self._modules: list[nn.Module] = []
        self._children: list[nn.Module | None] = []  # kept, so that none can take another's place
        self._linears: list[Any] = []
        self.norms: list[Any] = []  # of all layers, and the last one
        self.weights: list[Any] = []

    def now(self, others: Iterable[Tensor | None]) -> list[int]:
        """Numbers that are the same as long as everything is: ids of :attr:`weights`, addresses.

        Whoever keeps the numbers has to keep :attr:`weights` too, so that no id is used again.

        Args:
            others: what the pass reads besides: of the head, say.
        """
        if not self._modules or _children(self._modules) != self._children:
            self._walk()
        self.weights = [linear.prepared("weight") for linear in self._linears]
        # A parameter or bias may be given other memory and stay the same object.
        return [
            self._walks,
            *map(id, self.weights),
            *(_address(one._buffers["bias"]) for one in self._linears),
            *(_address(norm._parameters["weight"]) for norm in self.norms),
            *map(_address, others),
        ]

    def _walk(self) -> None:
        layers: Any = self._decoder.layers
        norms = [norm for layer in layers for norm in layer_norms(layer)]
        self._walks += 1
        self._linears = [one for layer in layers for one in layer.linears()]
        self.norms = [*norms, self._decoder.norm]
        self._modules = [*self._decoder.modules()]
        self._children = _children(self._modules)  # the last: another thread may look now

    def are_hooked(self, head: nn.Module) -> bool:
        """True if a module of the decoder, as :meth:`now` found them, or the head has hooks."""
        modules = (*self._modules, *head.modules())
        return any(one._forward_hooks or one._forward_pre_hooks for one in modules)


def batch_layers(cache: Any, mask: Any, tokens: Tensor, count: int) -> list[GrowingLayer] | None:
    """Layers of a :class:`KeyValueCache` that one token of each sequence comes to, else None."""
    layers, batch = getattr(cache, "layers", []), tokens.shape[0]
    if (
        tokens.shape[1] != 1
        or len(layers) != count
        or not all(isinstance(one, GrowingLayer) and one.is_initialized for one in layers)
    ):
        return None
    seen, shape = layers[0].get_seq_length(), layers[0].buffer_shape()
    if (
        shape[0] != batch
        or any(one.get_seq_length() != seen or one.buffer_shape() != shape for one in layers)
        or not (mask is None or (isinstance(mask, Tensor) and mask.shape == (batch, seen + 1)))
    ):
        return None
    return list(layers)


def page_allocator(options: dict[str, Any], tokens: Tensor, count: int) -> Any:
    """The allocator of transformers' paged cache, if all layers share it; else None.

    None too if the tokens ``[1, tokens]`` are not one of each sequence.
    """
    # Other versions of transformers have none.
    allocators: dict[int, Any] = getattr(options["cache"], "layer_to_allocator", {})
    one: Any = allocators.get(0)
    if (
        tokens.shape[0] != 1
        or options.get("block_table") is not None
        or len(allocators) != count
        or any(other is not one for other in allocators.values())
        or one.layer_type != FULL
        or options["max_length_q"] != 1
        or options["cu_seq_lens_q"].shape[0] != tokens.shape[1] + 1
        or options["read_index"][one.index].shape[0] == 0
    ):
        return None
    return one


def rotates_alone(decoder: Decoder) -> bool:
    """True if a token's rotation depends on nothing but its position."""
    return getattr(decoder.rotary_emb, "rope_type", None) in INDEPENDENT


def _children(modules: list[nn.Module]) -> list[nn.Module | None]:
    return [child for module in modules for child in module._modules.values()]


def layer_norms(layer: DecoderLayer) -> list[Any]:
    """Of attention, of the MLP, and of each query and key head where there are such."""
    both = [layer.input_layernorm, layer.post_attention_layernorm]
    return both + [one for one in (layer.self_attn.q_norm, layer.self_attn.k_norm) if one]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
