"""Time to load the projection from a checkpoint in the page cache. `make benchmark` runs it."""

import pytest

from indexproj.indexer.fixture import write_fixture
from indexproj.loading import Checkpoint, Plan, load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    write_fixture("deepseek-v3.2", path, layers=8)
    return path


def test_plan(benchmark, checkpoint):
    plan = benchmark(lambda: Plan.of(Checkpoint(checkpoint)))
    assert len(plan.select()) == 8


def test_load(benchmark, checkpoint):
    weights = benchmark(load, checkpoint)
    assert [w.shape for w in weights.values()] == [(128, 64, 7168)] * 8
    benchmark.extra_info["bytes"] = sum(w.nbytes for w in weights.values())
