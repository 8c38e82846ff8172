"""Hugging Face ``Trainer`` with a teacher: the losses of ``--teacher`` in two lines.

    class Distilling(TeacherMixin, Trainer):
        teacher = TeacherConfig("dense", temperature=2.0, hidden_layers=[14, 29])

    trainer = Distilling(model, args, train_dataset=..., callbacks=[SparseBitNetCallback("6:8")])

The student's logits stand in memory whole, as in any ``Trainer``; the teacher's are made a chunk of
tokens at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.loader import IGNORED
from sparse_bitnet.data.tokenizer import tokenizer_hash
from sparse_bitnet.nn.wrappers import unwrapped
from sparse_bitnet.train.config import TeacherConfig
from sparse_bitnet.train.hidden import HiddenStates
from sparse_bitnet.train.loss import CausalLoss, chunked_loss
from sparse_bitnet.train.model import check_documents
from sparse_bitnet.train.parallel import blocks
from sparse_bitnet.train.teacher import Teacher


class TeacherMixin:
    """Base of a ``Trainer`` class, before it, whose training loss has a teacher's terms.

    Logs ``cross_entropy``, ``teacher_loss`` and, with ``hidden_layers``, ``hidden_loss`` beside
    ``loss``, which is their weighted sum. Evaluation stays as it is.

    Raises:
        ConfigError: at the first step, as :class:`sparse_bitnet.train.teacher.Teacher`; for
            batches without ``labels``; for packed documents (batches with ``position_ids``), if the
            student's tokens see those before their own.
    """

    teacher: TeacherConfig
    _pair: tuple[CausalLoss, Teacher] | None = None
    _parts: Tensor | float = 0.0
    _batches = 0

    def train(self, *args: Any, **options: Any) -> Any:
        """``Trainer.train``; afterwards the teacher is gone, and the hooks on the model."""
        trainer: Any = super()
        try:
            return trainer.train(*args, **options)
        finally:
            if self._pair is not None and self._pair[0].states is not None:
                self._pair[0].states.remove()
            self._pair = None

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        trainer: Any = super()
        if not model.training:
            return trainer.compute_loss(model, inputs, return_outputs=return_outputs)
        if "labels" not in inputs:
            raise ConfigError("TeacherMixin: the batches have no labels; use a collator with them")
        given = {key: value for key, value in inputs.items() if key != "labels"}
        if self._pair is None:
            # Collators that pack documents give positions, others none.
            self._pair = self._make(unwrapped(model), "position_ids" in given)
        loss_of, teacher = self._pair
        targets = teacher.targets(**given)
        outputs = model(**given, use_cache=False)
        labels = pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        # As Trainer does: a mean over all micro-batches of a step where it counted their labels.
        me: Any = self
        whole = num_items_in_batch is not None and me.model_accepts_loss_kwargs
        count: Any = num_items_in_batch if whole else (labels != IGNORED).sum()
        divisor = torch.as_tensor(count, device=labels.device).clamp(min=1)
        loss, parts = chunked_loss(outputs.logits, None, labels, None, targets, divisor)
        loss, parts = loss_of.with_hidden(loss, parts, targets, labels, divisor)
        ranks = me.accelerator.num_processes
        if whole and me.args.average_tokens_across_devices and ranks > 1:
            loss, parts = loss * ranks, parts * ranks
        steps = me.current_gradient_accumulation_steps if whole else 1
        self._parts, self._batches = self._parts + parts * steps, self._batches + 1
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """``Trainer.log``, with the means of the parts over steps and, as ``loss``, ranks."""
        if "loss" in logs and isinstance(self._parts, Tensor):
            names = ("cross_entropy", "teacher_loss", "hidden_loss")
            me: Any = self
            parts = me.accelerator.reduce(self._parts / self._batches, "mean")
            logs |= dict(zip(names, parts.tolist(), strict=False))
            self._parts, self._batches = 0.0, 0
        trainer: Any = super()
        trainer.log(logs, *args, **options)

    def _make(self, model: Any, documents: bool) -> tuple[CausalLoss, Teacher]:
        tokenizer = getattr(self, "processing_class", None)
        known = None if tokenizer is None else tokenizer_hash(tokenizer)
        if documents:
            check_documents(model)
        teacher = Teacher(self.teacher, model, known, documents)
        numbers = self.teacher.hidden_layers
        states = HiddenStates(blocks(model), numbers, "student") if numbers else None
        return CausalLoss(model, states), teacher
