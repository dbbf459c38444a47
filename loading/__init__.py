"""Turns checkpoint tensors into kernel-ready weights."""

from .assembly import Assembly
from .checkpoint import Checkpoint
from .layer import LayerPlan, MatrixPlan
from .plan import Plan, load
from .problems import CheckpointError, Problem

__all__ = ["Assembly", "Checkpoint", "CheckpointError", "LayerPlan", "MatrixPlan", "Plan", "Problem", "load"]
