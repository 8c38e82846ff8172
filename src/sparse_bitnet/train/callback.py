"""Hugging Face ``Trainer`` callback with the schedules and the monitor.

    convert(model, "6:8")
    trainer = Trainer(model, args, train_dataset=..., callbacks=[SparseBitNetCallback("6:8")])

``Trainer`` calls those that report (TensorBoard, W&B) before the callbacks of the user. To let them
see flip rate and zeros, put this one first: ``trainer.callback_handler.callbacks.insert(0, ...)``
instead of ``callbacks=``. ``trainer.state.log_history`` has the figures either way.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments

from sparse_bitnet.core import ConfigError, Pattern
from sparse_bitnet.nn import converted_modules, set_pattern, set_quantization
from sparse_bitnet.nn.check import check_called
from sparse_bitnet.nn.convert import patterns_of_modules
from sparse_bitnet.nn.wrappers import check_adapters, unwrapped
from sparse_bitnet.train.config import QuantizationConfig, ScheduleConfig, SparsityConfig
from sparse_bitnet.train.monitor import Monitor, Reading
from sparse_bitnet.train.schedule import pattern_at, quantization_at, weight_decay


class SparseBitNetCallback(TrainerCallback):
    """Pattern schedule, weight-decay schedule, flip rate and zeros for a converted model.

    Adds to every row that has a training loss: ``flip_rate`` (a fraction of all masked weights;
    absent without a mask), ``zeros_before_mask`` (a fraction of all converted weights; what
    ``inspect`` counts as zeros is after it), ``density`` (the N/M in force), ``quantization`` (λ,
    where it has a schedule) and, to every hundredth, ``dead`` (see
    :mod:`sparse_bitnet.train.monitor`). They are measured every ``logging_steps``, so
    ``logging_strategy`` must be "steps".

    Args:
        pattern: the one training ends with.
        until: patterns in force until a fraction of training, as ``sparsity.until`` of a recipe:
            ``{0.5: "dense"}``.
        quantization: how quantization comes in, as ``sparsity.quantization`` of a recipe; quantized
            from the first step when left out.
        weight_decay_until: let the decay of ``TrainingArguments.weight_decay`` fall to 0 by a
            cosine until this fraction of training; None leaves it constant.

    Raises:
        ConfigError, PatternError: for fractions or patterns that do not exist; when training
            begins, if the model has not been converted or a pattern does not fit it.
    """

    def __init__(
        self,
        pattern: str,
        until: dict[float, str] | None = None,
        weight_decay_until: float | None = None,
        quantization: QuantizationConfig | None = None,
    ) -> None:
        self._sparsity = SparsityConfig(
            pattern=pattern, until=until or {}, quantization=quantization or QuantizationConfig()
        )
        self._decay_until = weight_decay_until
        self._monitor: Monitor | None = None
        self._reading: Reading | None = None
        self._decayed: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = unwrapped(kwargs["model"])
        check_adapters(model, "train")
        if not any(converted_modules(model)):
            raise ConfigError(
                "SparseBitNetCallback: the model is not converted; call "
                "sparse_bitnet.nn.convert(model, ...) before making the Trainer"
            )
        for pattern in (*self._sparsity.until.values(), self._sparsity.pattern):
            patterns_of_modules(model, pattern)  # now, not when the schedule comes to it
        check_called(model)
        self._monitor = Monitor(model, state.global_step // max(1, int(state.logging_steps)))
        groups = kwargs["optimizer"].param_groups
        self._decayed = [group for group in groups if group["weight_decay"] > 0]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Each module looks whether its pattern changes: nothing happens in most steps.
        model = unwrapped(kwargs["model"])
        set_pattern(model, self._pattern_of(state.global_step, state))
        set_quantization(model, *self._quantization_of(state.global_step, state))
        if self._decay_until is not None:
            schedule = ScheduleConfig(
                state.max_steps, weight_decay="cosine", weight_decay_until=self._decay_until
            )
            for group in self._decayed:
                group["weight_decay"] = weight_decay(
                    state.global_step, schedule, args.weight_decay, "bitnet"
                )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._will_be_logged(args, state) and self._monitor is not None:
            self._monitor.before_step()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._will_be_logged(args, state) and self._monitor is not None:
            self._reading = self._monitor.after_step()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" not in logs or self._reading is None:
            return
        figures = {
            "zeros_before_mask": self._reading.zeros_before_mask,
            "density": self._pattern_of(state.global_step - 1, state).density,
        }
        if self._sparsity.quantization.until:
            figures["quantization"] = self._quantization_of(state.global_step - 1, state)[0]
        for name in ("flip_rate", "dead"):
            if (value := getattr(self._reading, name)) is not None:
                figures[name] = value
        logs.update(figures)
        state.log_history[-1].update(figures)  # Trainer keeps a copy that it made before
        self._reading = None

    def _pattern_of(self, step: int, state: TrainerState) -> Pattern:
        return pattern_at(step, state.max_steps, self._sparsity)

    def _quantization_of(self, step: int, state: TrainerState) -> tuple[float, dict[str, float]]:
        return quantization_at(step, state.max_steps, self._sparsity.quantization)

    @staticmethod
    def _will_be_logged(args: TrainingArguments, state: TrainerState) -> bool:
        step = state.global_step + 1  # both events come before the step is counted
        return step % max(1, int(state.logging_steps)) == 0 or (
            step == 1 and args.logging_first_step
        )
