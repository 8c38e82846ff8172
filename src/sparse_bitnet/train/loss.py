"""Cross-entropy over hidden states, without ever holding all the logits.

At a vocabulary of 151,936 the logits of 16,384 tokens take 10 GB in float32, and their gradient as
much again. Here one chunk of tokens at a time is multiplied by the head, and its gradient is taken
in the same breath, while the logits are there: three matrix products, none repeated, and memory for
one chunk. PyTorch 2.13 has ``linear_cross_entropy`` for this; 2.11 has not.

The products run in autocast's dtype, logarithms and sums in float32 (float64 for float64 inputs).
The head's gradient is summed over chunks inside its product, which on CUDA adds to float32 as it
stores. Every chunk passes over that gradient once, so few large chunks are faster than many small.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_bitnet.nn import DerivedModule
from sparse_bitnet.nn.head import has_plain_head

LOGITS_AT_ONCE = {"cuda": 2**29, "cpu": 2**27}  # 1 GB in bf16, 512 MB in float32


def chunked_cross_entropy(
    hidden: Tensor, head: Tensor, labels: Tensor, chunk: int | None = None
) -> Tensor:
    """Mean cross-entropy of ``hidden @ head.T`` against ``labels``, in nats a token.

    Args:
        hidden: ``[..., features]``.
        head: ``[vocabulary, features]``, the output head's weight.
        labels: ``[...]``, int64 token ids.
        chunk: tokens at a time; by default as many as make 2²⁹ logits on CUDA, else 2²⁷.

    Returns:
        A scalar, float32 (float64 for float64 inputs), differentiable in ``hidden`` and ``head``.
    """
    tokens = chunk or _chunk(labels.numel(), head)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden.flatten(0, -2), head, labels.flatten(), tokens)
    return loss


def _chunk(tokens: int, head: Tensor) -> int:
    """Tokens at a time: equal parts where that is possible, so that one shape is compiled."""
    most = max(1, LOGITS_AT_ONCE.get(head.device.type, 2**27) // head.shape[0])
    fewest = max(1, -(-tokens // most))
    parts = next((n for n in range(fewest, 2 * fewest) if tokens % n == 0), fewest)
    return max(1, -(-tokens // parts))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += aᵀ @ b, without a product of its own in memory where CUDA can do that."""
    halves = a.dtype in (torch.bfloat16, torch.float16)
    if total.is_cuda and halves and total.dtype == torch.float32:
        torch.addmm(total, a.T, b, out_dtype=torch.float32, out=total)
    else:
        total += a.T @ b


def _loss_and_slope(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the losses, and its derivative by the logits: softmax, less one at the label."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = labels.unsqueeze(-1)
    log_p = exact.log_softmax(-1)
    loss = -log_p.gather(-1, rows).sum()
    slope = log_p.exp_().scatter_add_(-1, rows, -torch.ones_like(rows, dtype=exact.dtype))
    return loss, slope.to(logits.dtype)


def _loss_and_slope_for_fusion(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same without a scatter, so that a compiler makes two passes over the logits of it."""
    log_p = logits.float().log_softmax(-1)
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    loss = -torch.where(is_label, log_p, 0.0).sum()
    return loss, (log_p.exp() - is_label.float()).to(logits.dtype)


@cache
def _fused() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compiled once for all runs of a process."""
    return torch.compile(_loss_and_slope_for_fusion, dynamic=False)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, tokens: int) -> Tensor:
        device = hidden.device.type
        compute = hidden.dtype
        if torch.is_autocast_enabled(device):
            compute = torch.get_autocast_dtype(device)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_head = torch.zeros_like(head, dtype=exact) if needs_head else None
        rows = head.to(compute)
        evaluate = _fused() if hidden.is_cuda else _loss_and_slope
        with torch.autocast(device, enabled=False):
            for start in range(0, labels.numel(), tokens):
                part = slice(start, start + tokens)
                x = hidden[part].to(compute)
                loss, slope = evaluate(x @ rows.T, labels[part])
                total += loss
                if d_hidden is not None:
                    d_hidden[part] = slope @ rows
                if d_head is not None:
                    _add_product(d_head, slope, x)
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype, ctx.count = head.dtype, labels.numel()
        return total / labels.numel()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_hidden, d_head = ctx.saved_tensors
        upstream = grads[0] / ctx.count
        if d_hidden is not None:
            d_hidden = d_hidden * upstream
        if d_head is not None:
            d_head = (d_head * upstream).to(ctx.head_dtype)
        return d_hidden, d_head, None, None


class CausalLoss(nn.Module):
    """A causal language model that returns its loss: what training calls, compiles and shards.

    The loss is computed inside this module's forward, where FSDP2 has gathered the head (it stays
    in the root's group); outside, the head is a shard.

    Most architectures' logits are ``hidden @ head.T``, and get the chunked loss. Those that scale,
    cap or bias them (Gemma, Granite, Phi) get the ordinary one, over full logits: decided once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        plain = isinstance(head, nn.Linear) and not isinstance(head, DerivedModule)
        self.chunked = plain and head.bias is None and has_plain_head(model)

    def forward(self, tokens: Tensor) -> Tensor:
        """Mean loss in nats a token over ``[sequences, length + 1]`` token ids."""
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if not self.chunked:
            logits = self.model(input_ids=inputs, use_cache=False).logits
            return nn.functional.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())
        hidden = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
        return chunked_cross_entropy(hidden, self.model.get_output_embeddings().weight, labels)
