"""`indexproj verify`: the kernels on checkpoints, exit codes, and the numbers behind the verdict."""

import math

import pytest
import torch

from exports import EXPORTS, named
from indexproj.indexer.cli import verify
from indexproj.indexer.cli.verify import MAX_ERROR, Measurement
from indexproj.kernels.target import INTERPRETED
from support import INDEXER, SCALE, fp8_layer, invoke, table_rows, write_checkpoint


@pytest.fixture(autouse=True)
def default_device():
    """`verify` finds the GPU by itself."""


@pytest.fixture
def tiny(tmp_path):
    return write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1))


def test_verify_errors_per_layer(tiny):
    result = invoke("verify", tiny, "--layer", 1)
    assert result.exit_code == 0, result.stderr
    rows = table_rows(result)
    assert [row[:5] for row in rows] == [
        ["1", "FP8 128x128", "BF16", "1", "gemv"],
        ["1", "FP8 128x128", "BF16", "17", "split_k"],
        ["1", "FP8 128x128", "BF16", "100", "prefill"],
    ]
    for *_, error, load_error, bf16_error, verdict in rows:
        assert float(load_error) == 0
        assert float(error) <= MAX_ERROR < 1e-4 < float(bf16_error)
        assert verdict == "ok"
    assert ("interpreter" in result.stdout) == INTERPRETED
    assert max(map(len, result.stdout.splitlines())) <= 100


@pytest.mark.parametrize("encoding", ["nvfp4", "mxfp8"])
def test_verify_encodings(tmp_path, encoding):
    stem = INDEXER.format(0)
    tensors = named(stem, "wk", EXPORTS[encoding](128, 256)) | named(stem, "weights_proj", EXPORTS["bf16"](16, 256))
    result = invoke("verify", write_checkpoint(tmp_path, tensors), "--m", 9, "--m", 9)
    assert result.exit_code == 0, result.stderr
    ((_, wk, *_, verdict),) = table_rows(result)
    assert (wk, verdict) == (encoding.upper(), "ok")


def test_verify_shows_what_loading_rounded(tmp_path):
    """The reference has the values on disk, so an F32 gate shows its rounding; the kernel is right nevertheless."""
    stem, (wk, gate) = INDEXER.format(0), (EXPORTS[name](n, 256) for name, n in (("fp8_block", 128), ("f32", 16)))
    path = write_checkpoint(tmp_path, named(stem, "wk", wk) | named(stem, "weights_proj", gate))
    ((_, *encodings, m, _, error, load_error, _, verdict),) = table_rows(invoke("verify", path, "--m", 9))
    assert (encodings, m, verdict) == (["FP8 128x128", "F32"], "9", "ok")
    assert float(error) == pytest.approx(float(load_error), rel=0.01)
    assert 1e-4 < float(error) < 1e-2


def test_verify_index_head_dim(tmp_path):
    both = named(INDEXER.format(0), "wk_weights_proj", EXPORTS["bf16"](160, 256))
    path = write_checkpoint(tmp_path, both)
    assert invoke("verify", path, "--m", 9).exit_code == 2
    assert table_rows(invoke("verify", path, "--m", 9, "--index-head-dim", 64))[0][-1] == "ok"


def test_verify_wrong_kernel_exits_with_1(tiny, monkeypatch):
    monkeypatch.setattr(verify, "MAX_ERROR", 0.0)
    result = invoke("verify", tiny, "--m", 9)
    assert result.exit_code == 1
    assert [row[-1] for row in table_rows(result)] == ["WRONG", "WRONG"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: expected the directory of a checkpoint or a .safetensors file"),
        (["{tiny}", "--layer", "9"], "layer 9: expected one of the layers with an indexer, 0-1"),
        (["{tiny}", "--m", "0"], "Invalid value for '--m'"),
        (["{tiny}", "--m", "65537"], "Invalid value for '--m'"),
    ],
)
def test_verify_bad_input_exits_with_2(tiny, arguments, message):
    result = invoke("verify", *(argument.format(tiny=tiny) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.stderr


def test_verify_layers_that_do_not_load(tmp_path):
    bad_values = fp8_layer(0)
    bad_values[SCALE].zero_()
    bad_headers = fp8_layer(2)
    del bad_headers[INDEXER.format(2) + "wk.weight_scale_inv"]
    path = write_checkpoint(tmp_path, bad_values, fp8_layer(1), bad_headers)
    for layer, message in ((0, SCALE), (2, INDEXER.format(2) + "wk.weight_scale_inv")):
        result = invoke("verify", path, "--layer", layer, "--m", 9)
        assert result.exit_code == 2
        assert message in result.stderr
    assert invoke("verify", path, "--layer", 1, "--m", 9).exit_code == 0


@pytest.mark.parametrize(
    ("k", "gate", "expected"),
    [
        ([1.0, 2.0], [-5.0], 0.0),
        ([1.0, 2.5], [-5.0], 0.25),
        ([1.0, 2.0], [-4.0], 0.2),
        ([math.nan, 2.0], [-5.0], math.nan),
        ([1.0, 2.0], [math.nan], math.nan),
    ],
)
def test_error_is_the_larger_of_k_and_gate(k, gate, expected):
    exact = torch.tensor([1.0, 2.0]), torch.tensor([-5.0])
    error = verify._error((torch.tensor(k), torch.tensor(gate)), exact)
    assert error == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(("error", "passed"), [(2e-6, True), (2.1e-6, False), (math.nan, False)])
def test_verdict(error, passed):
    assert Measurement(0, ("BF16", "BF16"), 1, "gemv", 1.0, 1.0, error, 0.0).passed == passed
