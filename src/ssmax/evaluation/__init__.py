"""Measurements at long context of any causal Hugging Face model: loss by position, retrieval, sharpness of attention."""

from ssmax.evaluation.attention import Sharpness, attention_sharpness, needle_scores
from ssmax.evaluation.position_loss import Bin, binned, log_edges, loss_by_position
from ssmax.evaluation.retrieval import RetrievalTrial, retrieve, retrieve_grid
from ssmax.evaluation.rope import rope_scaling, rope_theta
from ssmax.evaluation.tasks import ABCDigits, NeedleExample, NeedleTask, PromptForm

__all__ = [
    "ABCDigits",
    "Bin",
    "NeedleExample",
    "NeedleTask",
    "PromptForm",
    "RetrievalTrial",
    "Sharpness",
    "attention_sharpness",
    "binned",
    "log_edges",
    "loss_by_position",
    "needle_scores",
    "retrieve",
    "retrieve_grid",
    "rope_scaling",
    "rope_theta",
]
