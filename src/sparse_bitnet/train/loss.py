"""Cross-entropy and distillation over hidden states, without ever holding all the logits.

At a vocabulary of 151,936 the logits of 16,384 tokens take 10 GB in float32, and their gradient as
much again; a teacher's as much as the student's. Here one chunk of tokens at a time is multiplied
by the head (and the teacher's by its own), and the gradient is taken in the same breath, while the
logits are there: three matrix products, none repeated, and memory for one chunk. PyTorch 2.13 has
``linear_cross_entropy`` for the student alone; 2.11 has not.

The products run in autocast's dtype, logarithms and sums in float32 (float64 for float64 inputs).
The head's gradient is summed over chunks inside its product, which on CUDA adds to float32 as it
stores. Every chunk passes over that gradient once, so few large chunks are faster than many small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparse_bitnet.data.loader import IGNORED, Batch
from sparse_bitnet.nn import DerivedModule
from sparse_bitnet.nn.head import has_plain_head
from sparse_bitnet.train.config import TeacherConfig
from sparse_bitnet.train.hidden import HiddenStates, hidden_loss

LOGITS_AT_ONCE = {"cuda": 2**29, "cpu": 2**27}  # 1 GB in bf16, 512 MB in float32


@dataclass(frozen=True)
class Targets:
    """A teacher's logits of some tokens, before they are made.

    With them the loss is :class:`TeacherConfig`'s, where both distributions are softened by the
    temperature T; T² keeps the size of the gradient (Hinton, Vinyals, Dean, arXiv 1503.02531). H is
    :func:`sparse_bitnet.train.hidden.hidden_loss`.
    """

    hidden: Tensor  # [..., features] of the teacher, or its logits where head is None
    head: Tensor | None  # [vocabulary, features], its output head, on the student's device
    how: TeacherConfig  # what they count
    states: Sequence[Tensor] = ()  # outputs of its blocks, [sequences, length, features]

    def logits(self, tokens: slice) -> Tensor:
        """Of some tokens, as if all sequences were one."""
        hidden = self.hidden.flatten(0, -2)[tokens]
        return hidden if self.head is None else hidden @ self.head.T


def chunked_loss(
    hidden: Tensor,
    head: Tensor | None,
    labels: Tensor,
    chunk: int | None = None,
    targets: Targets | None = None,
    divisor: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean loss of ``hidden @ head.T`` against ``labels``, and against a teacher if there is one.

    Args:
        hidden: ``[..., features]``; the logits themselves where ``head`` is None.
        head: ``[vocabulary, features]``, the output head's weight.
        labels: ``[...]``, int64 token ids; −100 where neither labels nor teacher count.
        chunk: tokens at a time; by default as many as make 2²⁹ logits on CUDA, else 2²⁷, those of
            the teacher included.
        targets: the teacher's, for the same tokens.
        divisor: by how many labels the sum is divided, a scalar; by default by all of them.

    Returns:
        The loss, a scalar, differentiable in ``hidden`` and ``head``; and its parts without
        gradient: ``[1]``, the cross-entropy in nats a token, or ``[2]``, and T²·KL. Both float32
        (float64 for float64 inputs).
    """
    vocabulary = hidden.shape[-1] if head is None else head.shape[0]
    if targets is not None:
        vocabulary *= 2
    tokens = chunk or _chunk(labels.numel(), vocabulary, hidden.device.type)
    some = hidden.flatten(0, -2), head, labels.flatten()
    loss, parts = _ChunkedLoss.apply(*some, tokens, targets, divisor)
    return loss, parts


def _chunk(tokens: int, vocabulary: int, device: str) -> int:
    """Tokens at a time: equal parts where that is possible, so that one shape is compiled."""
    most = max(1, LOGITS_AT_ONCE.get(device, 2**27) // vocabulary)
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


def _loss_and_slope(
    logits: Tensor, labels: Tensor, teacher: Tensor | None = None, how: TeacherConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of the loss's parts over tokens that have a label, and the derivative of the loss by
    the logits, also of tokens that have none.

    That of cross-entropy is the softmax, less one at the label; that of T²·KL is T times the
    difference of the softened distributions.

    Args:
        teacher: its logits, of the shape of the student's.
        how: the weights and the temperature.
    """
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = labels != IGNORED
    rows = labels.clamp(min=0).unsqueeze(-1)
    log_p = exact.log_softmax(-1)
    loss = -log_p.gather(-1, rows).squeeze(-1).masked_fill(~counted, 0).sum()
    slope = log_p.exp_().scatter_add_(-1, rows, -torch.ones_like(rows, dtype=exact.dtype))
    sums, slope = _with_divergence(loss, slope, exact, labels, teacher, how)
    return sums, slope.to(logits.dtype)


def _loss_and_slope_for_fusion(
    logits: Tensor, labels: Tensor, teacher: Tensor | None = None, how: TeacherConfig | None = None
) -> tuple[Tensor, Tensor]:
    """The same without a scatter, so that a compiler makes two passes over the logits of it."""
    log_p = logits.float().log_softmax(-1)
    is_label = torch.arange(logits.shape[-1], device=logits.device) == labels.unsqueeze(-1)
    loss = -torch.where(is_label, log_p, 0.0).sum()
    slope = log_p.exp() - is_label.float()
    sums, slope = _with_divergence(loss, slope, logits.float(), labels, teacher, how)
    return sums, slope.to(logits.dtype)


def _with_divergence(
    loss: Tensor,
    slope: Tensor,
    student: Tensor,
    labels: Tensor,
    teacher: Tensor | None,
    how: TeacherConfig | None,
) -> tuple[Tensor, Tensor]:
    """The sums with T²·KL(teacher ‖ student) over tokens that have a label, where there is a
    teacher; and the slope with its derivative by the student's logits of all."""
    if teacher is None or how is None:
        return loss.unsqueeze(0), slope
    log_p = (teacher.to(student.dtype) / how.temperature).log_softmax(-1)
    log_q = (student / how.temperature).log_softmax(-1)
    p = log_p.exp()
    apart = (p * (log_p - log_q)).sum(-1).masked_fill(labels == IGNORED, 0)
    slope = how.cross_entropy * slope + how.weight * how.temperature * (log_q.exp() - p)
    return torch.stack([loss, how.temperature**2 * apart.sum()]), slope


@cache
def _fused() -> Callable[..., tuple[Tensor, Tensor]]:
    """Compiled once for all runs of a process."""
    return torch.compile(_loss_and_slope_for_fusion, dynamic=False)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor | None,
        labels: Tensor,
        tokens: int,
        targets: Targets | None,
        divisor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        compute = hidden.dtype
        if head is not None and torch.is_autocast_enabled(device):
            compute = torch.get_autocast_dtype(device)
        needs_hidden, needs_head = ctx.needs_input_grad[:2]
        exact = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(1 if targets is None else 2, dtype=exact, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_head = None
        if head is not None and needs_head:
            d_head = torch.zeros_like(head, dtype=exact)
        rows = None if head is None else head.to(compute)
        ignored = (labels == IGNORED).unsqueeze(-1)
        evaluate = _fused() if hidden.is_cuda else _loss_and_slope
        with torch.autocast(device, enabled=False):
            for start in range(0, labels.numel(), tokens):
                part = slice(start, start + tokens)
                x = hidden[part].to(compute)
                logits = x if rows is None else x @ rows.T
                if targets is None:
                    more, slope = evaluate(logits, labels[part])
                else:
                    more, slope = evaluate(logits, labels[part], targets.logits(part), targets.how)
                sums += more
                # Tokens without a label leave no gradient: masked here, where a row is features
                # and not a vocabulary.
                if d_hidden is not None:
                    d_hidden[part] = slope if rows is None else slope @ rows
                    d_hidden[part].masked_fill_(ignored[part], 0)
                if d_head is not None:
                    _add_product(d_head, slope, x.masked_fill(ignored[part], 0))
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = None if head is None else head.dtype
        ctx.divisor = labels.numel() if divisor is None else divisor
        parts = sums / ctx.divisor
        ctx.mark_non_differentiable(parts)
        if targets is None:
            return parts[0].clone(), parts
        how = targets.how
        return how.cross_entropy * parts[0] + how.weight * parts[1], parts

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        d_hidden, d_head = ctx.saved_tensors
        upstream = grads[0] / ctx.divisor
        if d_hidden is not None:
            d_hidden = d_hidden * upstream
        if d_head is not None:
            d_head = (d_head * upstream).to(ctx.head_dtype)
        return d_hidden, d_head, None, None, None, None


class CausalLoss(nn.Module):
    """A causal language model that returns its loss: what training calls, compiles and shards.

    The loss is computed inside this module's forward, where FSDP2 has gathered the head (it stays
    in the root's group); outside, the head is a shard.

    Most architectures' logits are ``hidden @ head.T``, which are made chunk by chunk. Those that
    scale, cap or bias them (Gemma, Granite, Phi) make them whole: decided once.

    Args:
        model: the causal language model.
        states: of its blocks, where a teacher's are to be met.
    """

    def __init__(self, model: PreTrainedModel, states: HiddenStates | None = None) -> None:
        super().__init__()
        self.model, self.states = model, states
        head = model.get_output_embeddings()
        plain = isinstance(head, nn.Linear) and not isinstance(head, DerivedModule)
        self.chunked = plain and head.bias is None and has_plain_head(model)

    def last_hidden(self, **given: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The last hidden state and the head's weight; or the logits, and None.

        Args:
            given: ``input_ids`` and what else the model takes. Where ``position_ids`` begin anew,
                transformers lets attention begin anew.
        """
        inputs: dict[str, Any] = {key: one for key, one in given.items() if one is not None}
        if not self.chunked:
            return self.model(**inputs, use_cache=False).logits, None
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden, self.model.get_output_embeddings().weight

    def forward(
        self, batch: Batch, teacher: Callable[[Batch], Targets] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss over a batch's labels, and its parts.

        Args:
            teacher: gives the targets of a batch.

        Returns:
            As :func:`chunked_loss`; with ``states`` and a teacher, H is the third part.
        """
        # Before the student keeps its activations.
        targets = None if teacher is None else teacher(batch)
        hidden, head = self.last_hidden(input_ids=batch.inputs, position_ids=batch.positions)
        loss, parts = chunked_loss(hidden, head, batch.labels, None, targets, batch.divisor)
        return self.with_hidden(loss, parts, targets, batch.labels, batch.divisor)

    def with_hidden(
        self,
        loss: Tensor,
        parts: Tensor,
        targets: Targets | None,
        labels: Tensor,
        divisor: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Loss and parts with H added, where hidden states are compared."""
        if self.states is None or targets is None:
            return loss, parts
        apart = hidden_loss(self.states.take(), targets.states, labels, divisor)
        return loss + targets.how.hidden_weight * apart, torch.cat([parts, apart.detach().view(1)])
