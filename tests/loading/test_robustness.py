"""What users do to a loader: odd arguments, other layers' problems, files that are no files."""

import json
import os
import time

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from exports import EXPORTS, named
from indexproj.indexer.cli.audit import audit
from indexproj.loading import Assembly, Checkpoint, CheckpointError, Plan, load
from indexproj.loading.checkpoint import INDEX
from support import INDEXER, WK, bf16_layer, fp8_layer, invoke, only, problems_of, write_checkpoint

STEM = INDEXER.format(0)


def assemble(offers, **options):
    assembly = Assembly([0], **options)
    assembly.begin()
    for name, tensor in offers.items():
        assembly.offer(name, tensor)
    return assembly.finish()


def refusal(offers, **options):
    with pytest.raises(CheckpointError) as caught:
        assemble(offers, **options)
    return only(caught.value.problems)


@pytest.mark.parametrize("export", ["fp8_block", "int4"])
def test_out_of_memory_in_binding(monkeypatch, export):
    """The tensor can be offered again, and finish() called again; warnings come once."""
    wk = EXPORTS[export](128, 256)
    wk.tensors["weight_scale" if export == "int4" else "weight_scale_inv"][:] *= -1
    tensors = named(STEM, "wk", wk) | named(STEM, "weights_proj", EXPORTS["bf16"](16, 256))
    assembly = Assembly([0])
    assembly.begin()
    *first, last = tensors.items()
    for offer in first:
        assembly.offer(*offer)

    def no_memory(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("indexproj.kernels.ProjectionWeights.pack", no_memory)
        assembly.offer(*last)
        assembly.finish()
    if export == "fp8_block":
        assembly.offer(*last)
    assert list(assembly.finish()) == [0]
    assert len({str(warning) for warning in assembly.warnings}) == len(assembly.warnings) > 0


@pytest.mark.parametrize("thing", [3, None, "codes", [1.0], np.ones((2, 2))])
def test_offer_of_a_non_tensor(thing):
    assembly = Assembly([0])
    assembly.begin()
    with pytest.raises(TypeError, match=r"wk\.weight: expected a torch.Tensor, got "):
        assembly.offer(WK, thing)


def test_meta_device():
    with pytest.raises(ValueError, match="expected a device that holds values, got meta"):
        Assembly([0], device="meta")


def test_fused_matrix_needs_index_head_dim():
    both = named(STEM, "wk_weights_proj", EXPORTS["bf16"](160, 256))
    assert refusal(both).expected == "index_head_dim, in config.json or as an argument, to split wk_weights_proj"
    assert assemble(both, config={"index_head_dim": 64})[0].shape == (64, 96, 256)


@pytest.mark.parametrize("value", ["128", True, 128.0])
def test_sizes_are_integers(tmp_path, value):
    path = write_checkpoint(tmp_path, bf16_layer())
    with pytest.raises(TypeError, match=f"index_head_dim: expected an integer, got {value!r}"):
        load(path, index_head_dim=value)
    for key in ("index_head_dim", "num_hidden_layers"):
        assert refusal(bf16_layer(), config={key: value}).expected == f"{key} to be an integer from 0 to 999999"
    assert list(load(path, index_head_dim=np.int64(128))) == [0]


def test_sizes_of_a_config():
    problem = refusal(fp8_layer(), config={"hidden_size": 512})
    assert (problem.subject, problem.expected) == (WK, "512 in dimension 1 of the matrix (hidden_size)")


@pytest.mark.parametrize("export", ["bf16", "f16", "f32", "fp8_block", "mxfp8", "nvfp4", "mxfp4", "int4"])
def test_scales_of_activations_are_ignored(export):
    """Quark's NVFP4 has input_scale_2, static FP8 of transformers has activation_scale."""
    leaves = ("input_scale", "input_scale_2", "input_global_scale", "act_scale", "activation_scale", "output_scale")
    offers = named(STEM, "wk", EXPORTS[export](128, 256)) | named(STEM, "weights_proj", EXPORTS["bf16"](16, 256))
    offers |= {f"{STEM}{matrix}.{leaf}": torch.ones(3) for matrix in ("wk", "weights_proj") for leaf in leaves}
    assert list(assemble(offers)) == [0]


def test_load_fused_matrix_with_index_head_dim(tmp_path):
    """[160, 256] with D = 64 and without a config used to load as D = 128."""
    both = named(STEM, "wk_weights_proj", EXPORTS["bf16"](160, 256))
    path = write_checkpoint(tmp_path, both)
    assert "to split wk_weights_proj" in only(problems_of(path)).expected
    assert load(path, index_head_dim=64)[0].shape == (64, 96, 256)
    path = write_checkpoint(tmp_path, both, config={"index_head_dim": 128})
    assert load(path)[0].shape == (128, 32, 256)
    assert load(path, index_head_dim=64)[0].shape == (64, 96, 256)
    path = write_checkpoint(tmp_path, bf16_layer())
    with pytest.raises(CheckpointError, match="expected 64 in dimension 0 of the matrix"):
        load(path, index_head_dim=64)
    with pytest.raises(ValueError, match="got meta"):
        load(path, device="meta")


def test_limit_of_the_kernels_is_in_the_audit(tmp_path):
    path = write_checkpoint(tmp_path, bf16_layer(d=256, h=200))
    problem = only(problems_of(path))
    assert (problem.subject, problem.found) == (WK, "256 and 200 rows")
    assert problem.expected == "at most 384 rows of wk and weights_proj, each rounded up to a power of two"
    assert invoke("verify", path).exit_code == 2


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, "layers below 2 (num_hidden"),
        ({"num_hidden_layers": 4, "indexer_types": ["full"] * 4}, "weights for the indexers of layers 3"),
        ({"num_hidden_layers": 3, "indexer_types": ["full"]}, "indexer_types to say full or shared"),
        ({"num_nextn_predict_layers": "many"}, "num_nextn_predict_layers to be an integer"),
    ],
)
def test_problems_of_other_layers(tmp_path, caplog, config, expected):
    """They do not concern layer 0, which loads with a warning."""
    path = write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1), fp8_layer(2), config=config)
    assert expected in only(problems_of(path)).expected
    with caplog.at_level("WARNING", "indexproj"):
        assert list(load(path, [0])) == [0]
    assert expected in only(caplog.records).getMessage()


def test_mtp_layers_without_a_number(tmp_path):
    """Tensors of `mtp_layers` without num_hidden_layers do not concern the hidden layers."""
    mtp = {name.replace("layers.0", "mtp_layers.0"): tensor for name, tensor in fp8_layer().items()}
    path = write_checkpoint(tmp_path, fp8_layer(0), mtp)
    assert only(problems_of(path)).subject.startswith("model.mtp_layers.0.")
    assert list(load(path, [0])) == [0]


def test_repeated_keys_that_do_not_matter(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(k=256))
    text = '{"vision_config": {"hidden_size": 1, "hidden_size": 2}, "hidden_size": 7, "hidden_size": 8, '
    (path / "config.json").write_text(text + '"text_config": {"hidden_size": 256}}')
    assert list(load(path)) == [0]
    index = (path / INDEX).read_text()
    (path / INDEX).write_text(index.replace('"metadata": {}', '"metadata": {"a": 1, "a": 2}'))
    assert list(load(path)) == [0]


def test_deepseek_inference_names(tmp_path):
    """One file per rank without an index, each with all indexers; `attn`, `scale` and `mtp`."""
    layers, files = {}, {}
    for layer, stem in ((0, "layers.0"), (1, "layers.1"), (2, "mtp.0")):
        layers[layer] = fp8_layer(layer)
        for name, tensor in layers[layer].items():
            name = name.replace(f"model.layers.{layer}.self_attn", f"{stem}.attn").replace("weight_scale_inv", "scale")
            files[name] = tensor
    for rank in range(2):
        save_file(files, tmp_path / f"model{rank}-mp2.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}))
    plan, loaded = Plan.of(Checkpoint(tmp_path)), load(tmp_path)
    assert [layer.is_mtp for layer in plan.layers.values()] == [False, False, True]
    for layer, tensors in layers.items():
        assert torch.equal(loaded[layer].wk.scale, tensors[f"{INDEXER.format(layer)}wk.weight_scale_inv"])
    assert list(load(tmp_path / "model1-mp2.safetensors")) == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: path.symlink_to("gone"), "a link that leads nowhere"),
        (lambda path: path.symlink_to(path.name), "a link that leads nowhere"),
        (os.mkfifo, "not a file"),
        (os.mkdir, "not a file"),
    ],
)
def test_single_file_that_is_not_a_file(tmp_path, make, found):
    make(tmp_path / "model.safetensors")
    problem = only(problems_of(tmp_path))
    assert (problem.subject, problem.found) == ("model.safetensors", found)


def test_dtype_that_safetensors_does_not_know(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(save(fp8_layer()).replace(b'"BF16"', b'"QF16"'))
    assert only(problems_of(tmp_path)).advice.startswith("the installed safetensors does not know that dtype")


def test_path_that_is_not_utf8(tmp_path):
    directory = tmp_path / os.fsdecode(b"caf\xe9")
    path = write_checkpoint(directory, fp8_layer())
    problems = problems_of(path)
    assert {problem.advice for problem in problems} == {
        "safetensors opens UTF-8 paths only: rename the file or its directory"
    }


def test_many_made_up_layers(tmp_path):
    """A header of 10,000 layers is audited in seconds: nothing is quadratic."""
    entry = {"dtype": "BF16", "shape": [0, 4], "data_offsets": [0, 0]}
    header = {f"{INDEXER.format(n)}{matrix}.weight": entry for n in range(10_000) for matrix in ("wk", "weights_proj")}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    start = time.perf_counter()
    result = invoke("audit", tmp_path)
    assert time.perf_counter() - start < 10
    assert len(result.output.splitlines()) < 10
    assert "layers.{0-9999}.self_attn.indexer.wk.weight" in result.stderr
    assert len(audit(tmp_path)["problems"]) == 20_000
