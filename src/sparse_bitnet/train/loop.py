"""Training: batch → loss → backward → clip → step → pattern → log."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_bitnet.console import progress, say
from sparse_bitnet.core import ConfigError, Pattern, TrainingError
from sparse_bitnet.data.loader import Batch
from sparse_bitnet.nn import set_pattern, set_quantization
from sparse_bitnet.train.batches import Batches
from sparse_bitnet.train.checkpoint import Checkpoints
from sparse_bitnet.train.config import TrainConfig
from sparse_bitnet.train.export import save_trained
from sparse_bitnet.train.graph import GraphedBackward
from sparse_bitnet.train.hidden import HiddenStates
from sparse_bitnet.train.loss import CausalLoss
from sparse_bitnet.train.model import (
    build_model,
    check_documents,
    context_length,
    convert_model,
    maskless_attention,
)
from sparse_bitnet.train.monitor import Clock, History, Monitor, Reading
from sparse_bitnet.train.optim import build_optimizer, clip_gradients
from sparse_bitnet.train.parallel import (
    Ranks,
    blocks,
    compile_blocks,
    ranks,
    shard,
    uncompile_blocks,
)
from sparse_bitnet.train.result import HISTORY, TrainResult, claim, facts, owned, write_result
from sparse_bitnet.train.schedule import learning_rate, pattern_at, quantization_at, weight_decay
from sparse_bitnet.train.signals import StopRequest, TrainingInterruptedError, stop_on_signals
from sparse_bitnet.train.teacher import Teacher

OnStep = Callable[[int, PreTrainedModel], None]


def train(config: TrainConfig, on_step: OnStep | None = None) -> TrainResult:
    """Run a training to its end, or on from where an earlier call was stopped.

    One process by default; under ``torchrun`` the same call shards over all ranks. Everything goes
    to ``config.run.directory``: ``config.yaml``, ``metrics.jsonl``, ``checkpoints/``, and at the
    end ``model/`` and ``result.json``. A finished run is not repeated.

    Args:
        on_step: called after every step with (steps done, the converted model), on every rank.

    Raises:
        ConfigError: if the directory holds a run of another configuration, or another process
            trains in it; or if values contradict.
        PatternError: if a pattern, or one that the schedule comes to, does not fit the model.
        DataError: if the tokens are missing or damaged.
        CheckpointError: if the checkpoint to resume from is damaged.
        TrainingError: if the loss or the gradient is not finite.
        TrainingInterruptedError: after SIGTERM or Ctrl-C, once a checkpoint is saved.
    """
    directory = Path(config.run.directory)
    with (
        ranks(config.run.device) as here,
        stop_on_signals(here.is_main) as stop,
        owned(directory, here),
    ):
        finished = claim(directory, config, here)
        if finished is None:
            return _Run(config, here).finish(stop, on_step)
        if here.is_main:
            say(f"{finished.directory} is finished: {finished.steps} steps; reusing it")
        return finished


class _Run:
    """A run in memory: the model, its optimizer, its data, and what watches them."""

    def __init__(self, config: TrainConfig, here: Ranks) -> None:
        self.config, self.here, self.directory = config, here, Path(config.run.directory)
        self.started = time.perf_counter()
        self.batches = Batches(config, here)
        self.model = build_model(
            config.model,
            vocab_size=self.batches.vocab_size,
            seed=config.run.seed,
            device=here.device,
            tokenizer=self.batches.tokenizer,
            sample=lambda: here.from_main(self.batches.train(0)[0].inputs.cpu()).to(here.device),
        )
        positions = context_length(self.model.config)
        if positions and config.data.sequence_length > positions:
            raise ConfigError(
                f"data.sequence_length is {config.data.sequence_length}, but the model reads "
                f"{positions} tokens at once"
            )
        if self.batches.has_documents:
            check_documents(self.model)
        conversion = convert_model(self.model, config.sparsity)
        self.linear_weights = conversion.weights
        self._say(str(conversion))
        self.teacher = None
        if config.teacher.source:
            tokenizer = self.batches.fingerprint["tokenizer"]
            documents = self.batches.has_documents
            self.teacher = Teacher(config.teacher, self.model, tokenizer, documents)
        compared = config.teacher.hidden_layers if self.teacher else []
        states = HiddenStates(blocks(self.model), compared, "student") if compared else None
        self.loss_of = CausalLoss(self.model, states)
        self.parts = ("loss", "teacher_loss", "hidden_loss")[
            : 1 + bool(self.teacher) + bool(states)
        ]
        on_cuda = here.device.type == "cuda"
        self.precision = _choose(config.run.precision, "bf16" if on_cuda else "fp32")
        if _choose(config.run.compile, "on" if on_cuda else "off") == "on":
            compile_blocks(self.model)
            if self.teacher is not None:
                compile_blocks(self.teacher.model)
        self.checkpoints = Checkpoints(
            self.directory / "checkpoints", config.run.keep, config, self.batches.fingerprint, here
        )
        if here.is_distributed:
            # Weights are gathered whole or as two bits by the λ that they are sharded at.
            set_quantization(self.model, *self._quantization_at(self.checkpoints.latest() or 0))
            shard(self.loss_of, here)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = build_optimizer(self.model, config.optimizer)
        self.graph = self._graph() if config.run.cuda_graph else None
        self.first_bad = torch.full((), math.inf, device=here.device)
        self.first_step, self.rows_before = self._resume()
        self.monitor = Monitor(self.model, self.first_step // config.run.log_every)

    def finish(self, stop: StopRequest, on_step: OnStep | None = None) -> TrainResult:
        """Take the steps that are left, validate, export."""
        run, steps = self.config.run, self.config.schedule.steps
        pattern: Pattern | None = None
        blend = self.config.sparsity.quantization
        complete: list[bool] = []
        with contextlib.ExitStack() as open_ones:
            models = (self.model, *([self.teacher.model] if self.teacher else ()))
            for model in () if self.batches.has_documents else models:
                open_ones.enter_context(maskless_attention(model))
            history = self._history()
            open_ones.callback(history.close)
            bar = None
            if self.here.is_main:
                title = f"training {self.config.sparsity.kind} {self.config.sparsity.pattern}"
                bar = open_ones.enter_context(progress(title, steps - self.first_step))
            if self.teacher is not None and self.first_step == 0:
                self._measure_teacher(self.teacher, history)
            clock = Clock(self.config.data.batch_size * self.config.data.sequence_length)
            for step in range(self.first_step, steps):
                done = step + 1
                logged = done % run.log_every == 0 or done == steps
                if pattern != (pattern := pattern_at(step, steps, self.config.sparsity)):
                    set_pattern(self.model, pattern)
                    if self.graph:
                        self.graph.reset()
                quantized, by_rule = self._quantization_at(step)
                set_quantization(self.model, quantized, by_rule)
                before, complete = complete, [one == 1 for one in (quantized, *by_rule.values())]
                if self.graph and before != complete:  # other operators from now on
                    self.graph.reset()
                rates = self._set_rates(step)
                losses = self._backward(step)
                norm = clip_gradients(self.parameters, self.config.optimizer.clip)
                if logged:
                    self.monitor.before_step()
                self.optimizer.step()
                if not self.graph:  # which writes gradients over the last ones
                    self.optimizer.zero_grad()
                reading = self.monitor.after_step() if logged else None
                # The first step that was not finite, on the device: no synchronisation.
                bad = ~torch.isfinite(losses.sum() + norm)
                self.first_bad = torch.where(bad, self.first_bad.clamp(max=done), self.first_bad)
                clock.tick()
                if reading is not None:
                    self._stop_if_not_finite()
                    row = {
                        "step": done,
                        **dict(zip(self.parts, losses.tolist(), strict=True)),
                        "gradient_norm": norm.item(),
                        "pattern": str(pattern),
                        **rates,
                        **({"quantization": quantized} if blend.until else {}),
                        **({"quantization_by_rule": by_rule} if by_rule else {}),
                        **_figures(reading, done, run.log_every * run.layers_every),
                        **clock.read(),
                    }
                    history.add(row)
                if on_step is not None:
                    on_step(done, self.model)
                if bar:
                    bar.advance(detail=_summary(row) if logged else None)
                if done == steps or (run.validate_every and done % run.validate_every == 0):
                    with clock.paused():
                        history.add({"step": done, "validation_loss": self._validate()})
                if run.checkpoint_every and (done % run.checkpoint_every == 0 or done == steps):
                    with clock.paused():
                        self._save(done, history)
                if self.here.any(bool(stop)) and done < steps:
                    raise TrainingInterruptedError(
                        f"stopped by {stop.name} after step {done} of {steps}; saved "
                        f"{self._save(done, history)}. The same command goes on from there",
                        stop.number,
                    )
            figures = self._last_figures(history)
        return self._conclude(figures)

    def _quantization_at(self, step: int) -> tuple[float, dict[str, float]]:
        config = self.config
        return quantization_at(step, config.schedule.steps, config.sparsity.quantization)

    def _set_rates(self, step: int) -> dict[str, float]:
        schedule, optimizer = self.config.schedule, self.config.optimizer
        rate = learning_rate(step, schedule, optimizer.learning_rate)
        kind = self.config.sparsity.kind
        decay = weight_decay(step, schedule, optimizer.weight_decay, kind)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.param_groups[0]["weight_decay"] = decay  # the other is never decayed
        return {"learning_rate": rate, "weight_decay": decay}

    def _backward(self, step: int) -> Tensor:
        """Gradients of one batch, micro-batch by micro-batch; the means of its losses over all
        ranks, as ``self.parts`` names them."""
        # Dropout, where a model has it, is a function of the step too: a resumed run repeats it.
        torch.manual_seed(self.config.run.seed * 1_000_003 + step * 1009 + self.here.rank)
        backward = self.graph or self._accumulate
        return self.here.mean(backward(self.batches.train(step)))

    def _accumulate(self, micro_batches: Sequence[Batch]) -> Tensor:
        total = torch.zeros(len(self.parts), device=self.here.device)
        for batch in micro_batches:
            with self._autocast():
                loss, parts = self.loss_of(batch, self.teacher)
            (loss / len(micro_batches)).backward()
            total += parts / len(micro_batches)
        return total

    def _graph(self) -> GraphedBackward:
        if self.config.teacher.device:
            raise ConfigError("run.cuda_graph holds one device: leave teacher.device out")
        if self.batches.has_documents:
            raise ConfigError(
                "run.cuda_graph cannot hold where documents begin, which changes with every batch: "
                "leave it out for conversations and data.separate_documents"
            )
        if self.here.device.type != "cuda" or self.here.is_distributed:
            raise ConfigError(
                "run.cuda_graph needs one process on CUDA; this run has "
                f"{self.here.world_size} on {self.here.device.type}"
            )
        return GraphedBackward(self._accumulate, self.parameters)

    def _stop_if_not_finite(self) -> None:
        step = self.first_bad.item()
        if math.isfinite(step):
            good = self.checkpoints.newest()
            where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise TrainingError(
                f"loss or gradient is not finite at step {int(step)}; {where}. Try a lower "
                "optimizer.learning_rate or a longer schedule.warmup"
            )

    def _save(self, done: int, history: History) -> Path:
        self._stop_if_not_finite()
        history.sync()
        return self.checkpoints.save(done, self.model, self.optimizer, history.rows)

    @torch.no_grad()
    def _validate(self) -> float | None:
        """Mean loss over the validation sequences, nats a token; None without a split."""
        self.loss_of.eval()
        with self._autocast():
            loss = self._mean_of(lambda batch: self.loss_of(batch)[0])
        self.loss_of.train()
        return loss

    def _mean_of(self, loss_of: Callable[[Batch], Tensor]) -> float | None:
        losses = [loss_of(batch).float() for batch in self.batches.validation()]
        return self.here.mean(torch.stack(losses).mean()).item() if losses else None

    def _measure_teacher(self, teacher: Teacher, history: History) -> None:
        """Its own validation loss, which the student's is to come near."""
        loss = self._mean_of(teacher.loss)
        if loss is not None:
            if not history.rows:  # a run that was stopped before its first checkpoint has it
                history.add({"step": 0, "teacher_validation_loss": loss})
            self._say(f"teacher {self.config.teacher.source}: validation loss {loss:.4f}")

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        enabled = self.precision == "bf16"
        return torch.autocast(self.here.device.type, torch.bfloat16, enabled=enabled)

    def _resume(self) -> tuple[int, int]:
        """Steps done, and the rows that metrics.jsonl had then."""
        step = self.checkpoints.latest()
        if step is None:
            return 0, 0
        rows = self.checkpoints.load(step, self.model, self.optimizer)
        self._say(f"resuming from {self.checkpoints.path(step)}")
        return step, rows

    def _last_figures(self, history: History) -> dict[str, float | None]:
        """Losses after the last step. Of a run whose last row is gone the training loss is too:
        weights of a step later have another."""
        steps = self.config.schedule.steps
        figures: dict[str, float | None] = self.here.from_main(history.last)
        if figures.get("step") != steps:
            figures = {}
        if "validation_loss" not in figures:
            figures["validation_loss"] = self._validate()
            history.add({"step": steps, "validation_loss": figures["validation_loss"]})
        if "loss" not in figures:
            self._say("the last row of metrics.jsonl is gone, and the last training loss with it")
        return figures

    def _conclude(self, figures: dict[str, float | None]) -> TrainResult:
        """Export the model, write the result."""
        config, steps = self.config, self.config.schedule.steps
        self.loss_of.eval()
        uncompile_blocks(self.model)
        if self.loss_of.states is not None:
            self.loss_of.states.remove()
        self.optimizer.zero_grad()
        result = TrainResult(
            directory=self.directory,
            steps=steps,
            tokens=steps * config.data.batch_size * config.data.sequence_length,
            loss=figures.get("loss"),
            validation_loss=figures["validation_loss"],
            seconds=time.perf_counter() - self.started,
            linear_weights=self.linear_weights,
            history=self.directory / HISTORY,
            model_directory=self.directory / "model" if config.run.export else None,
            checkpoint=self.checkpoints.newest(),
        )
        if result.model_directory is not None:
            save_trained(
                self.model,
                self.batches.tokenizer,
                result.model_directory,
                config.sparsity,
                facts(result),
                self.here,
            )
        write_result(result, config, self.here)
        return replace(result, model=self.model, tokenizer=self.batches.tokenizer)

    def _history(self) -> History:
        run = self.config.run
        history = History(self.directory, self.first_step, run.tensorboard, self.here.is_main)
        if history.rows < self.rows_before:
            self._say(
                f"{self.rows_before - history.rows} of {self.rows_before} rows of {HISTORY} are "
                "gone: it was removed, cut or damaged; the run goes on without them"
            )
        return history

    def _say(self, message: str) -> None:
        if self.here.is_main:
            say(message)


def _choose(wanted: str, automatic: str) -> str:
    return automatic if wanted == "auto" else wanted


def _figures(reading: Reading, done: int, layers_every: int) -> dict[str, Any]:
    columns = ["flip_rate", "zeros_before_mask", *([] if reading.dead is None else ["dead"])]
    figures: dict[str, Any] = {name: getattr(reading, name) for name in columns}
    if layers_every and done % layers_every == 0:
        figures["layers"] = {
            name: {column: getattr(layer, column) for column in columns}
            for name, layer in reading.layers.items()
        }
    return figures


def _summary(row: dict[str, Any]) -> str:
    flips = "" if row["flip_rate"] is None else f"  flips {row['flip_rate']:.2%}"
    return (
        f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s{flips}  "
        f"zeros before mask {row['zeros_before_mask']:.1%}"
    )
