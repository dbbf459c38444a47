"""Weight layouts, the Triton kernels, their dispatch, and the fp64 reference."""

from .dispatch import KernelConfig, choose
from .formats import Format
from .matrix import Matrix
from .operation import project, project_all
from .reference import reference
from .target import TARGETS, Target
from .weights import ProjectionWeights

__all__ = [
    "TARGETS", "Format", "KernelConfig", "Matrix", "ProjectionWeights", "Target",
    "choose", "project", "project_all", "reference",
]  # fmt: skip
