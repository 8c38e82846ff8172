"""Training configuration: nested, frozen dataclasses. Every field gives its unit.

A recipe (YAML) and the command line fill the same fields; see :mod:`sparse_bitnet.train.recipe`,
where pydantic checks types and ranges.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt, with_config

from sparse_bitnet.core import ConfigError, Method, Pattern, shown

Name = Annotated[str, Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)


@dataclass(frozen=True)
class ModelConfig:
    """The architecture to train."""

    source: Name = "tiny"
    """A preset (see sparse_bitnet.train.presets), a Hugging Face directory whose weights to start
    from, or a path to a config.json to start from scratch with its shape."""
    vocab_size: PositiveInt | None = None
    """Rows of the embedding. By default what the data's tokenizer needs; presets with a published
    vocabulary keep theirs."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of transformers; eager, too, for architectures without sdpa."""
    sub_norms: bool = False
    """SubLN: a norm before the last product of attention and of the MLP, for a start from the
    weights of a Llama (BitDistill, arXiv 2510.13998); see sparse_bitnet.nn.sub_norm."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""


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
        if not 0 <= self.until <= 1:
            raise ConfigError(f"until: {self.until} is no fraction of training from 0 to 1")
        for rule, begin in self.begin.items():
            try:
                re.compile(rule)
            except re.error as error:
                raise ConfigError(f"begin: {rule} is no regular expression: {error}") from None
            if not 0 <= begin <= 1 - self.until:
                raise ConfigError(f"begin of {rule} is {begin}: at least 0, at most 1 − until")


@with_config(STRICT)
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
        rules = [pattern for pattern in self.rules.values() if pattern != "skip"]
        for pattern in (self.pattern, *self.until.values(), *rules):
            Pattern.parse(pattern)
        for fraction in self.until:
            if not 0 < fraction < 1:
                raise ConfigError(f"until: {fraction} is no fraction of training between 0 and 1")
        if self.kind == "bf16" and (self.quantization.until or self.quantization.begin):
            raise ConfigError("kind bf16 has no quantization, and so no schedule of it")


@dataclass(frozen=True)
class TeacherConfig:
    """A model whose logits the student learns beside the text: the loss is cross_entropy·CE +
    weight·T²·KL(teacher ‖ student) + hidden_weight·H, H the distance of hidden states."""

    source: str = ""
    """A Hugging Face directory with the student's vocabulary and the data's tokenizer; empty: no
    teacher. `--teacher DIRECTORY` is short for it."""
    weight: NonNegativeFloat = 1.0
    """Of the teacher's term."""
    cross_entropy: NonNegativeFloat = 1.0
    """Weight of the ordinary loss beside it."""
    temperature: Positive = 1.0
    """T, by which both models' logits are divided in the teacher's term."""
    hidden_layers: list[int] = field(default_factory=list)
    """Blocks whose outputs H compares, by number from 0, in a teacher of the student's shape.
    [14, 29]: two of thirty. Empty: no H."""
    hidden_weight: NonNegativeFloat = 1.0
    """Of H, the mean of ‖student − teacher‖² / ‖teacher‖² over tokens and these blocks."""
    device: str = ""
    """Where it computes, cuda:1 for example; empty: where the student does."""

    def __post_init__(self) -> None:
        if len(set(self.hidden_layers)) < len(self.hidden_layers):
            raise ConfigError(f"hidden_layers {self.hidden_layers} names a block twice")
        if self.source:
            return
        for one in fields(self):
            default = [] if one.name == "hidden_layers" else one.default
            if getattr(self, one.name) != default:
                raise ConfigError(
                    f"{one.name} is {shown(getattr(self, one.name))} but there is no teacher: give "
                    "its source (--teacher DIRECTORY), or leave it out"
                )


@dataclass(frozen=True)
class DataConfig:
    """The tokens, and how many a step takes."""

    path: str = ""
    """A directory written by `sparse-bitnet data prepare`."""
    mixture: dict[str, Positive] = field(default_factory=dict)
    """Instead of path: several such directories with the same tokenizer, and their weights."""
    sequence_length: PositiveInt = 512
    """Tokens a sequence."""
    batch_size: PositiveInt = 32
    """Sequences an optimizer step, over all ranks and micro-batches."""
    separate_documents: bool = False
    """Documents of text do not attend to each other: attention and positions begin anew behind each
    end of a document. Conversations never do."""
    micro_batch_size: PositiveInt | None = None
    """Sequences a rank takes at once; the rest is gradient accumulation. Default: all."""

    def __post_init__(self) -> None:
        if bool(self.path) == bool(self.mixture):
            raise ConfigError(
                f"path is {shown(self.path)}: give either a prepared directory or a mixture"
            )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW. Norms, biases and embeddings are not decayed."""

    learning_rate: Positive = 1e-3
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """Decay of the two moments."""
    epsilon: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """At the start of training; see schedule.weight_decay."""
    clip: NonNegativeFloat = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""


@dataclass(frozen=True)
class ScheduleConfig:
    """How rates change over training; see sparse_bitnet.train.schedule."""

    steps: PositiveInt = 1000
    """Optimizer steps."""
    warmup: Fraction = 0.05
    """Fraction of training in which the learning rate rises from 0 to its peak."""
    final: Fraction = 0.1
    """Learning rate at the end, as a fraction of the peak (cosine in between)."""
    weight_decay: Literal["auto", "cosine", "constant"] = "auto"
    """Falling to 0 by a cosine, or constant. auto: cosine for bitnet, constant for bf16."""
    weight_decay_until: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Fraction of training at which a falling weight decay reaches 0."""


@dataclass(frozen=True)
class RunConfig:
    """Where and how the run goes; nothing here but seed and precision changes the result."""

    directory: Name = "runs/train"
    """Receives metrics.jsonl, config.yaml, checkpoints/ and model/."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
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
    log_every: PositiveInt = 10
    """Steps between two rows of metrics.jsonl; flip rate and zeros are measured then."""
    layers_every: NonNegativeInt = 10
    """Rows between two that hold flip rate and zeros of every layer; 0 never."""
    validate_every: NonNegativeInt = 0
    """Steps between two validations; 0 only at the end."""
    validation_sequences: NonNegativeInt = 64
    """Sequences of the validation split that a validation takes; 0 turns validation off."""
    checkpoint_every: NonNegativeInt = 500
    """Steps between two checkpoints; 0 never, not even at the end."""
    keep: PositiveInt = 2
    """How many of the last checkpoints stay."""
    export: bool = True
    """Write the trained model to model/ at the end."""
    tensorboard: bool = False
    """Also write TensorBoard events to tensorboard/ (extra: track)."""


@with_config(STRICT)
@dataclass(frozen=True)
class TrainConfig:
    """One training run: every key of a recipe. An option given here wins over the file."""

    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    run: RunConfig = field(default_factory=RunConfig)
