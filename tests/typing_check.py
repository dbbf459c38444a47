"""Read by mypy, never run: the public names have types, so mypy does see the mapped package."""

from pathlib import Path

from torch import Tensor
from typing_extensions import assert_type

from indexproj.indexer import IndexerProjection
from indexproj.kernels import ProjectionWeights, project, reference
from indexproj.loading import Checkpoint, Plan, load


def check(module: IndexerProjection, x: Tensor, weights: ProjectionWeights) -> None:
    assert_type(IndexerProjection.from_checkpoint("", layer=0), IndexerProjection)
    assert_type(module.forward(x), tuple[Tensor, Tensor])
    assert_type(project(x, weights), tuple[Tensor, Tensor])
    assert_type(reference(x, weights), tuple[Tensor, Tensor])
    assert_type(load(Path()), dict[int, ProjectionWeights])
    assert_type(Plan.of(Checkpoint("")), Plan)
