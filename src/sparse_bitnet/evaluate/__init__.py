"""Evaluation: perplexity, cloze accuracy, tasks of lm-eval.

Every function takes a loaded model and its tokenizer; loading is the business of other packages.
"""

from sparse_bitnet.evaluate.cloze import ClozeAccuracy, ClozeItem, cloze_accuracy, cloze_items
from sparse_bitnet.evaluate.harness import evaluate_tasks
from sparse_bitnet.evaluate.measure import Comparison, Measurements, Report, measure
from sparse_bitnet.evaluate.perplexity import Perplexity, perplexity

__all__ = [
    "ClozeAccuracy",
    "ClozeItem",
    "Comparison",
    "Measurements",
    "Perplexity",
    "Report",
    "cloze_accuracy",
    "cloze_items",
    "evaluate_tasks",
    "measure",
    "perplexity",
]
