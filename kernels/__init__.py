"""Ground floor: kernel-ready weight layouts, the Triton kernels, their dispatch, and the fp64 reference."""

from .dispatch import KernelConfig, choose
from .matrix import DenseMatrix, Fp4Matrix, Fp8Matrix, Matrix, ProjectionWeights
from .operation import project, project_all
from .reference import reference
from .target import TARGETS, Target

__all__ = [
    "TARGETS",
    "DenseMatrix",
    "Fp4Matrix",
    "Fp8Matrix",
    "KernelConfig",
    "Matrix",
    "ProjectionWeights",
    "Target",
    "choose",
    "project",
    "project_all",
    "reference",
]
