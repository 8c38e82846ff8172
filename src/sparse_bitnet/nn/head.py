"""Check that a model's logits are the output head's product and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the logits are the output head applied to the body's last hidden state.

    So it is in most architectures, and a loss over many tokens may then apply the head piece by
    piece. Others scale or cap what goes into the head or comes out of it (Gemma, Granite, Cohere).
    Decided by one forward of two tokens: the head must be given the body's last hidden state, bit
    for bit, and large numbers put in the place of its result must come out as the logits. So a cap
    is seen that hardly touches an untrained model's small logits, and a scale behind a head of
    zeros.

    Args:
        model: a causal language model of transformers, in any mode; it is left as it was.
    """
    head, body = model.get_output_embeddings(), model.base_model
    if head is None or body is model:
        return False
    given: list[Tensor | None] = []
    hidden: list[Tensor | None] = []
    put: list[Tensor] = []

    def after_body(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden.append(getattr(output, "last_hidden_state", None))

    def after_head(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given.append(args[0] if args else None)
        put.append(torch.linspace(-1e3, 1e3, output.numel()).to(output).view_as(output))
        return put[-1]

    hooks = [body.register_forward_hook(after_body), head.register_forward_hook(after_head)]
    try:
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
        with torch.compiler.set_stance("force_eager"):  # compile nothing for a probe's shape
            logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(given) != 1 or len(hidden) != 1 or given[0] is None or hidden[0] is None:
        return False
    untouched = torch.equal(logits.float(), put[0].float())
    return untouched and torch.equal(given[0], hidden[0])
