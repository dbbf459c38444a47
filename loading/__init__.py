"""First floor: from checkpoint tensors to kernel-ready weights."""

from .assembly import Assembly
from .checkpoint import Checkpoint
from .loader import load
from .plan import LayerPlan, Plan
from .problems import CheckpointError, Problem

__all__ = ["Assembly", "Checkpoint", "CheckpointError", "LayerPlan", "Plan", "Problem", "load"]
