"""Training: from a recipe to a model, in one process or many."""

from sparse_bitnet.train.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    QuantizationConfig,
    RunConfig,
    ScheduleConfig,
    SparsityConfig,
    TeacherConfig,
    TrainConfig,
)
from sparse_bitnet.train.export import load_trained, save_trained
from sparse_bitnet.train.loop import train
from sparse_bitnet.train.recipe import load_recipe, options_help
from sparse_bitnet.train.result import TrainResult
from sparse_bitnet.train.signals import TrainingInterruptedError

__all__ = [
    "DataConfig",
    "ModelConfig",
    "OptimizerConfig",
    "QuantizationConfig",
    "RunConfig",
    "ScheduleConfig",
    "SparsityConfig",
    "TeacherConfig",
    "TrainConfig",
    "TrainResult",
    "TrainingInterruptedError",
    "load_recipe",
    "load_trained",
    "options_help",
    "save_trained",
    "train",
]
