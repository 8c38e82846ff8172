"""AdamW as in the published runs.

Decay falls on matrices only: not on norms and biases (one dimension), nor on embeddings and the
head, whose rows are looked up rather than multiplied away; this is the field's common practice
(GPT-2, Llama). The experts of a mixture are matrices too (three dimensions).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from sparse_bitnet.train.config import OptimizerConfig


def build_optimizer(model: PreTrainedModel, config: OptimizerConfig) -> torch.optim.AdamW:
    """Fused AdamW with two groups, decayed and not.

    Build it after FSDP2 has sharded the model: sharding replaces the parameters.
    """
    tables = {
        id(module.weight)
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in tables]
    kept = [p for p in trained if p.ndim < 2 or id(p) in tables]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )
    for p in trained:  # the moments now and not at the first step: a checkpoint loads into them
        optimizer.state[p] = {
            "step": torch.zeros((), dtype=torch.float32, device=p.device),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }
    return optimizer


def clip_gradients(parameters: Sequence[Tensor], largest: float) -> Tensor:
    """Scale the whole gradient down to a norm of ``largest``; 0 leaves it as it is.

    The squares are summed in float64: the norm, and with it every weight after the step, then does
    not depend on how the gradient is cut over ranks.

    Returns:
        The norm before clipping, a float32 scalar on the device (no synchronisation).
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    parts = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norms = torch._foreach_norm(parts, 2.0, dtype=torch.float64)
    squares = torch.stack(norms).square().sum()
    if isinstance(gradients[0], DTensor):
        dist.all_reduce(squares)
    norm = squares.sqrt().float()
    if largest > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm, foreach=True)
    return norm
