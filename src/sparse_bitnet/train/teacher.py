"""A frozen model whose logits a student learns: knowledge distillation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparse_bitnet.core import ConfigError
from sparse_bitnet.data.loader import Batch
from sparse_bitnet.data.tokenizer import has_tokenizer, load_tokenizer, tokenizer_hash
from sparse_bitnet.kernels.platform import usable_device
from sparse_bitnet.train.config import TeacherConfig
from sparse_bitnet.train.dense import IMPORT_FIRST, is_gguf, read_dense
from sparse_bitnet.train.export import is_trained, load_trained
from sparse_bitnet.train.hidden import HiddenStates
from sparse_bitnet.train.loss import CausalLoss, Targets
from sparse_bitnet.train.model import check_documents
from sparse_bitnet.train.parallel import blocks


class Teacher:
    """A causal language model in evaluation mode, without gradients.

    In bfloat16 on CUDA and in float32 on a CPU; a model that this package trained keeps its float32
    master weights and multiplies as in training. Every rank has the whole of it. It is no module of
    the student, so neither an optimizer, FSDP2 nor a checkpoint sees it.

    Args:
        config: where it is, where it computes, and what it counts.
        student: on its device.
        tokenizer: the hash of the data's; None is not compared.
        documents: whether sequences hold several, which it must keep apart.

    Raises:
        ConfigError: if the directory is missing, its vocabulary is smaller than the student's (or
            larger, where tokenizers were not compared), its tokenizer another one, its width where
            hidden states are compared, its tokens see other documents, or there is no such device.
        CheckpointError: if it is damaged.
    """

    def __init__(
        self,
        config: TeacherConfig,
        student: PreTrainedModel,
        tokenizer: str | None = None,
        documents: bool = False,
    ) -> None:
        directory = Path(config.source)
        if is_gguf(directory):
            raise ConfigError(f"teacher.source {directory} {IMPORT_FIRST}")
        if not (directory / "config.json").is_file():
            raise ConfigError(
                f"teacher.source {config.source}: no Hugging Face directory (it has no config.json)"
            )
        compared = tokenizer is not None and has_tokenizer(directory)
        if compared and tokenizer_hash(load_tokenizer(directory)) != tokenizer:
            raise ConfigError(
                f"teacher.source {directory} has another tokenizer than the data: prepare the data "
                f"with its own (data prepare --model {directory})"
            )
        trained = is_trained(directory)
        model = load_trained(directory)[0] if trained else read_dense(directory)
        rows, vocabulary = (one.get_output_embeddings().weight.shape[0] for one in (model, student))
        # More rows than the student's are padding where both know the data's tokenizer: Qwen2.5 has
        # 152,064 of them from 7B on and 151,936 below.
        if rows < vocabulary or (rows > vocabulary and not compared):
            raise ConfigError(
                f"teacher.source {config.source} has a vocabulary of {rows}, the student one of "
                f"{vocabulary}: a teacher must have the student's vocabulary"
            )
        self._rows = vocabulary
        wide, width = (one.config.get_text_config().hidden_size for one in (model, student))
        if config.hidden_layers and wide != width:
            raise ConfigError(
                f"teacher.hidden_layers: the student's blocks have {width} features and the "
                f"teacher's {wide}; only equal ones can be compared"
            )
        if documents:
            check_documents(model)  # in float32 still
        self._home = student.device
        self.device = usable_device(config.device) if config.device else self._home
        halved = self.device.type == "cuda" and not trained
        model = model.to(self.device, torch.bfloat16 if halved else None)  # type: ignore[arg-type]
        self.model = model.requires_grad_(False).eval()
        self._loss_of = CausalLoss(self.model).eval()
        self._config = config
        self._states = HiddenStates(blocks(self.model), config.hidden_layers, "teacher")
        head = self.model.get_output_embeddings().weight[:vocabulary]
        self._head = head.to(self._home) if self._loss_of.chunked else None

    def __call__(self, batch: Batch) -> Targets:
        """Targets of a batch, on the student's device."""
        return self.targets(input_ids=batch.inputs, position_ids=batch.positions)

    @torch.no_grad()
    def targets(self, **given: Tensor | None) -> Targets:
        """Targets for what a model is given, on the student's device."""
        there = {key: one if one is None else one.to(self.device) for key, one in given.items()}
        with self._autocast():
            hidden, _ = self._loss_of.last_hidden(**there)
        if self._head is None:  # these are its logits
            hidden = hidden[..., : self._rows]
        states = [state.to(self._home) for state in self._states.take()]
        return Targets(hidden.to(self._home), self._head, self._config, states)

    @torch.no_grad()
    def loss(self, batch: Batch) -> Tensor:
        """Its own cross-entropy on a batch, nats a token."""
        with self._autocast():
            loss, _ = self._loss_of(batch.map(lambda one: one.to(self.device)))
        self._states.take()
        return loss.to(self._home)

    def _autocast(self) -> torch.autocast:
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda")
