"""The numbers that `verify` judges by."""

import math

import pytest
import torch

from indexproj.indexer.cli.verify import MAX_ERROR, Measurement, _activations, _error


def outputs(k, gate):
    return torch.tensor(k), torch.tensor(gate)


@pytest.mark.parametrize(
    ("result", "exact", "expected"),
    [
        (([1.0, 2.0], [3.0]), ([1.0, 2.0], [3.0]), 0.0),
        (([1.0, 2.5], [3.0]), ([1.0, 2.0], [3.0]), 0.25),
        (([1.0, 2.0], [-4.0]), ([1.0, 2.0], [-5.0]), 0.2),
        (([0.0, 0.0], [3.0]), ([0.0, 0.0], [3.0]), 0.0),
        (([0.0, 1e-3], [3.0]), ([0.0, 0.0], [3.0]), 1e-3),
    ],
)
def test_error_is_the_larger_of_k_and_gate(result, exact, expected):
    assert _error(outputs(*result), outputs(*exact)) == pytest.approx(expected)


@pytest.mark.parametrize("result", [([math.nan], [1.0]), ([1.0], [math.nan])])
def test_nan_never_passes(result):
    error = _error(outputs(*result), outputs([1.0], [1.0]))
    assert math.isnan(error)
    assert not Measurement(None, 1, "tiled", error, 0.0).passed


def test_the_bound_is_the_promised_one():
    assert MAX_ERROR == 2e-6
    assert Measurement(None, 1, "tiled", 2e-6, 0.0).passed
    assert not Measurement(None, 1, "tiled", 2.1e-6, 0.0).passed


def test_every_layer_gets_activations_of_its_own():
    assert not torch.equal(_activations(2, 512, 0), _activations(2, 512, 1))
    assert torch.equal(_activations(2, 512, 1), _activations(2, 512, 1))
