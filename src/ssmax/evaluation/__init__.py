"""Measurements of long context on any causal Hugging Face model: a model goes in, numbers come out."""

from ssmax.evaluation.needle_score import needle_scores
from ssmax.evaluation.position_loss import loss_by_position
from ssmax.evaluation.retrieval import NeedleTask, RetrievalTrial, retrieve
from ssmax.evaluation.rope import rope_theta

__all__ = ["NeedleTask", "RetrievalTrial", "loss_by_position", "needle_scores", "retrieve", "rope_theta"]
