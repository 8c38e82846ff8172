"""Training configuration: nested, frozen dataclasses, checked when they are made.

A recipe (YAML) and the command line fill the same fields; see :mod:`sparse_bitnet.train.recipe`.
Every field says its unit. Out of range is a :class:`~sparse_bitnet.core.ConfigError` that names the
field, the value and what would do.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

from sparse_bitnet.core import ConfigError, Method, Pattern, shown


@dataclass(frozen=True)
class ModelConfig:
    """The architecture to train."""

    source: str = "tiny"
    """A preset (see sparse_bitnet.train.presets), a Hugging Face directory whose weights to start
    from, or a path to a config.json to start from scratch with its shape."""
    vocab_size: int | None = None
    """Rows of the embedding. By default what the data's tokenizer needs; presets with a published
    vocabulary keep theirs."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of transformers."""
    sub_norms: bool = False
    """SubLN: a norm before the last product of attention and of the MLP, for a start from the
    weights of a Llama (BitDistill, arXiv 2510.13998); see sparse_bitnet.nn.sub_norm."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    def __post_init__(self) -> None:
        _check_choices(self, "model")
        _check(bool(self.source), "model.source", self.source, "a preset or a path")
        _check_positive("model.vocab_size", self.vocab_size, optional=True)


@dataclass(frozen=True)
class QuantizationConfig:
    """How quantization comes in: λ, from full precision (0) to ternary weights and integer
    activations (1). For a start from pretrained weights, which do not survive it at once."""

    until: float = 0.0
    """Fraction of training at which λ reaches 1; 0: quantized from the first step. The pattern has
    a schedule of its own, sparsity.until."""
    shape: Literal["linear", "sigmoid"] = "linear"
    """How λ rises."""
    begin: dict[str, float] = field(default_factory=dict)
    """Layers one after the other: module names (regular expressions, the first that is found
    decides) whose λ begins to rise at this fraction of training, and takes as long as the others'.
    {"layers.[0-9][.]": 0.4} with until 0.3: these reach 1 at 0.7."""

    def __post_init__(self) -> None:
        _check_choices(self, "sparsity.quantization")
        _check_range("sparsity.quantization.until", self.until, 0, 1)
        for rule, begin in self.begin.items():
            name = f"sparsity.quantization.begin[{rule}]"
            try:
                re.compile(rule)
            except re.error as error:
                raise ConfigError(f"{name}: not a regular expression: {error}") from None
            _check(bool(rule), name, rule, "a part of module names")
            _check(
                begin >= 0 and begin + self.until <= 1, name, begin, "at least 0, at most 1 − until"
            )


@dataclass(frozen=True)
class SparsityConfig:
    """What the linears become."""

    pattern: str = "6:8"
    """N:M, or dense: the pattern that training ends with."""
    kind: Literal["bitnet", "bf16"] = "bitnet"
    """Ternary weights and integer activations, or the BF16 baseline with the same mask."""
    method: Method = field(default_factory=Method)
    """The published method, or one of its ablations."""
    rules: dict[str, str] = field(default_factory=dict)
    """Module names (regular expressions) that get their own pattern, or "skip"."""
    until: dict[float, str] = field(default_factory=dict)
    """The schedule of the mask: patterns in force until a fraction of training, before the final
    one. Empty: masked from step 0. {0.5: dense}: no mask in the first half. {0.33: dense, 0.66:
    "6:8"} with pattern "4:8": a staircase."""
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    """The schedule of the quantization (kind bitnet)."""

    def __post_init__(self) -> None:
        _check_choices(self, "sparsity")
        Pattern.parse(self.pattern)
        scheduled = self.quantization.until or self.quantization.begin
        quantized = self.kind == "bitnet" or not scheduled
        wanted = "left out for kind bf16, which has no quantization"
        _check(quantized, "sparsity.quantization", self.quantization, wanted)
        for fraction, pattern in self.until.items():
            wanted = "a fraction of training between 0 and 1"
            _check(0 < fraction < 1, "sparsity.until", fraction, wanted)
            Pattern.parse(pattern)
        for pattern in self.rules.values():
            if pattern != "skip":
                Pattern.parse(pattern)


@dataclass(frozen=True)
class TeacherConfig:
    """A model whose logits the student learns beside the text: the loss is cross_entropy·CE +
    weight·T²·KL(teacher ‖ student) + hidden_weight·H, H the distance of hidden states."""

    source: str = ""
    """A Hugging Face directory with the student's vocabulary and the data's tokenizer; empty: no
    teacher. `--teacher DIRECTORY` is short for it."""
    weight: float = 1.0
    """Of the teacher's term."""
    cross_entropy: float = 1.0
    """Weight of the ordinary loss beside it."""
    temperature: float = 1.0
    """T, by which both models' logits are divided in the teacher's term."""
    hidden_layers: list[int] = field(default_factory=list)
    """Blocks whose outputs H compares, by number from 0, in a teacher of the student's shape.
    [14, 29]: two of thirty. Empty: no H."""
    hidden_weight: float = 1.0
    """Of H, the mean of ‖student − teacher‖² / ‖teacher‖² over tokens and these blocks."""
    device: str = ""
    """Where it computes, cuda:1 for example; empty: where the student does."""

    def __post_init__(self) -> None:
        _check_range("teacher.weight", self.weight, 0, math.inf)
        _check_range("teacher.cross_entropy", self.cross_entropy, 0, math.inf)
        _check_range("teacher.hidden_weight", self.hidden_weight, 0, math.inf)
        _check_range("teacher.temperature", self.temperature, 0, math.inf, open_left=True)
        some = self.weight + self.cross_entropy > 0
        _check(some, "teacher.weight", self.weight, "above 0 where teacher.cross_entropy is 0")


@dataclass(frozen=True)
class DataConfig:
    """The tokens, and how many a step takes."""

    path: str = ""
    """A directory written by `sparse-bitnet data prepare`."""
    mixture: dict[str, float] = field(default_factory=dict)
    """Instead of path: several such directories with the same tokenizer, and their weights."""
    sequence_length: int = 512
    """Tokens a sequence."""
    batch_size: int = 32
    """Sequences an optimizer step, over all ranks and micro-batches."""
    separate_documents: bool = False
    """Documents of text do not attend to each other: attention and positions begin anew behind each
    end of a document. Conversations never do."""
    micro_batch_size: int | None = None
    """Sequences a rank takes at once; the rest is gradient accumulation. Default: all."""

    def __post_init__(self) -> None:
        one = bool(self.path) != bool(self.mixture)
        _check(one, "data.path", self.path, "either a prepared directory here or a data.mixture")
        for directory, weight in self.mixture.items():
            _check(weight > 0, f"data.mixture[{directory}]", weight, "a weight above 0")
        _check_positive("data.sequence_length", self.sequence_length)
        _check_positive("data.batch_size", self.batch_size)
        _check_positive("data.micro_batch_size", self.micro_batch_size, optional=True)
        if self.micro_batch_size:
            divides = self.batch_size % self.micro_batch_size == 0
            wanted = f"a divisor of data.batch_size = {self.batch_size}"
            _check(divides, "data.micro_batch_size", self.micro_batch_size, wanted)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Norms, biases and embeddings are not decayed."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the two moments."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """At the start of training; see schedule.weight_decay."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _check_range("optimizer.learning_rate", self.learning_rate, 0, 10, open_left=True)
        for beta in self.betas:
            _check(0 <= beta < 1, "optimizer.betas", beta, "two numbers in [0, 1)")
        _check_range("optimizer.epsilon", self.epsilon, 0, 1, open_left=True)
        _check_range("optimizer.weight_decay", self.weight_decay, 0, 10)
        _check_range("optimizer.clip", self.clip, 0, math.inf)


@dataclass(frozen=True)
class ScheduleConfig:
    """How rates change over training; see sparse_bitnet.train.schedule."""

    steps: int = 1000
    """Optimizer steps."""
    warmup: float = 0.05
    """Fraction of training in which the learning rate rises from 0 to its peak."""
    final: float = 0.1
    """Learning rate at the end, as a fraction of the peak (cosine in between)."""
    weight_decay: Literal["auto", "cosine", "constant"] = "auto"
    """Falling to 0 by a cosine, or constant. auto: cosine for bitnet, constant for bf16."""
    weight_decay_until: float = 0.5
    """Fraction of training at which a falling weight decay reaches 0."""

    def __post_init__(self) -> None:
        _check_choices(self, "schedule")
        _check_positive("schedule.steps", self.steps)
        _check_range("schedule.warmup", self.warmup, 0, 1)
        _check_range("schedule.final", self.final, 0, 1)
        _check_range("schedule.weight_decay_until", self.weight_decay_until, 0, 1, open_left=True)


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run goes; nothing here but seed and precision changes the result."""

    directory: str = "runs/train"
    """Receives metrics.jsonl, config.yaml, checkpoints/ and model/."""
    seed: int = 0
    """Of the initial weights, the order of the data, and dropout where a model has it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA where there is one. Another kind of device draws other initial weights."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast (master weights stay fp32). auto: bf16 on CUDA, fp32 on CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for every block and the loss. auto: on for CUDA."""
    cuda_graph: bool = False
    """Replay forward and backward as one CUDA graph: for models so small that the GPU waits for the
    host (below about 100M weights). One process only."""
    log_every: int = 10
    """Steps between two rows of metrics.jsonl; flip rate and zeros are measured then."""
    layers_every: int = 10
    """Rows between two that hold flip rate and zeros of every layer; 0 never."""
    validate_every: int = 0
    """Steps between two validations; 0 only at the end."""
    validation_sequences: int = 64
    """Sequences of the validation split that a validation takes; 0 turns validation off."""
    checkpoint_every: int = 500
    """Steps between two checkpoints; 0 never, not even at the end."""
    keep: int = 2
    """How many of the last checkpoints stay."""
    export: bool = True
    """Write the trained model to model/ at the end."""
    tensorboard: bool = False
    """Also write TensorBoard events to tensorboard/ (extra: track)."""

    def __post_init__(self) -> None:
        _check_choices(self, "run")
        _check(bool(self.directory), "run.directory", self.directory, "a path")
        _check_range("run.seed", self.seed, 0, 2**31 - 1)
        _check_positive("run.log_every", self.log_every)
        _check_positive("run.keep", self.keep)
        for name in ("layers_every", "validate_every", "validation_sequences", "checkpoint_every"):
            _check_range(f"run.{name}", getattr(self, name), 0, math.inf)


@dataclass(frozen=True)
class TrainConfig:
    """One training run: every key of a recipe. An option given here wins over the file."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)


def _check(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ConfigError(f"{name} is {shown(value)}: it must be {wanted}")


def _check_positive(name: str, value: int | None, optional: bool = False) -> None:
    if not (optional and value is None):
        _check(isinstance(value, int) and value > 0, name, value, "a whole number above 0")


def _check_range(name: str, value: float, low: float, high: float, open_left: bool = False) -> None:
    inside = (low < value if open_left else low <= value) and value <= high
    bound = f"above {low}" if open_left else f"at least {low}"
    upper = "" if high == math.inf else f" and at most {high}"
    _check(inside, name, value, f"{bound}{upper}")


def _check_choices(section: object, prefix: str) -> None:
    for name, hint in get_type_hints(type(section)).items():
        if get_origin(hint) is Literal:
            value = getattr(section, name)
            choices = ", ".join(map(str, get_args(hint)))
            _check(value in get_args(hint), f"{prefix}.{name}", value, f"one of: {choices}")
