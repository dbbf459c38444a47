"""First floor: from checkpoint tensors to kernel-ready weights."""

from .assembly import Assembly
from .checkpoint import Checkpoint
from .layer import MatrixPlan
from .loader import load
from .plan import LayerPlan, Plan
from .problems import CheckpointError, Problem

__all__ = ["Assembly", "Checkpoint", "CheckpointError", "LayerPlan", "MatrixPlan", "Plan", "Problem", "load"]
