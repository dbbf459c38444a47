"""`indexproj verify`: the kernels on checkpoints, exit codes, and the numbers behind the verdict."""

import pytest
import torch

from exports import EXPORTS, layer_of, named
from indexproj.indexer.cli import verify
from indexproj.indexer.cli.verify import MAX_ERROR
from indexproj.kernels import project
from indexproj.kernels.target import INTERPRETED
from support import INDEXER, SCALE, fp8_layer, invoke, table_rows, write_checkpoint

LOST = INDEXER.format(2) + "wk.weight_scale_inv"


@pytest.fixture(autouse=True)
def default_device():
    """`verify` finds the GPU by itself."""


@pytest.fixture
def tiny(tmp_path):
    """A good layer 1 between one whose scales are zero and one without scales."""
    layers = [fp8_layer(layer) for layer in range(3)]
    layers[0][SCALE].zero_()
    del layers[2][LOST]
    return write_checkpoint(tmp_path, *layers)


def test_verify_errors_per_layer(tiny):
    result = invoke("verify", tiny, "--layer", 1, code=0)
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
    path = write_checkpoint(tmp_path, layer_of(encoding))
    ((_, wk, *_, verdict),) = table_rows(invoke("verify", path, "--m", 9, "--m", 9, code=0))
    assert (wk, verdict) == (encoding.upper(), "ok")


def test_verify_shows_what_loading_rounded(tmp_path):
    """The reference has the values on disk, so an F32 gate shows its rounding; the kernel is right nevertheless."""
    path = write_checkpoint(tmp_path, layer_of("fp8_block", "f32"))
    ((_, *encodings, m, _, error, load_error, _, verdict),) = table_rows(invoke("verify", path, "--m", 9))
    assert (encodings, m, verdict) == (["FP8 128x128", "F32"], "9", "ok")
    assert float(error) == pytest.approx(float(load_error), rel=0.01)
    assert 1e-4 < float(error) < 1e-2


def test_index_head_dim(tmp_path):
    path = write_checkpoint(tmp_path, named(INDEXER.format(0), "wk_weights_proj", EXPORTS["bf16"](160, 256)))
    for command, last in ((("verify", "--m", 9), "ok"), (("audit",), "yes")):
        invoke(*command, path, code=2)
        assert table_rows(invoke(*command, path, "--index-head-dim", 64))[0][-1] == last


@pytest.mark.parametrize("error", [3e-6, torch.nan])
@pytest.mark.parametrize("which", [0, 1], ids=["k", "gate"])
def test_verify_wrong_kernel_exits_with_1(tiny, monkeypatch, which, error):
    """One wrong value, by more than 2e-6 of the largest."""

    def wrong(x, *arguments, **options):
        outputs = project(x, *arguments, **options)
        if len(x) == 9:
            outputs[which][0, 0] += error * outputs[which].abs().max()
        return outputs

    monkeypatch.setattr(verify, "project", wrong)
    result = invoke("verify", tiny, "--layer", 1, "--m", 9, "--m", 1, code=1)
    assert [row[-1] for row in table_rows(result)] == ["WRONG", "ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: expected the directory of a checkpoint or a .safetensors file"),
        (["{tiny}", "--layer", "9"], "layer 9: expected one of the layers with an indexer, 0-2"),
        (["{tiny}", "--layer", "0", "--m", "9"], SCALE),
        (["{tiny}", "--layer", "2", "--m", "9"], LOST),
        (["{tiny}", "--m", "0"], "Invalid value for '--m'"),
        (["{tiny}", "--m", "65537"], "Invalid value for '--m'"),
    ],
)
def test_verify_bad_input_exits_with_2(tiny, arguments, message):
    assert message in invoke("verify", *(argument.format(tiny=tiny) for argument in arguments), code=2).stderr
