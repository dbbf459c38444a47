"""A stream of tensors: any order, everything or nothing."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exports import EXPORTS, layer_of, named, stream, stream_problems
from indexproj.loading import Assembly, CheckpointError, LayerPlan
from indexproj.loading.headers import parse
from support import INDEXER, WK, bf16_layer, fp8_layer, only, same

STEM = INDEXER.format(0)


def started(layers=(0,), **options):
    assembly = Assembly(layers, **options)
    assembly.begin()
    return assembly


def projection(*layers):
    return [(name, tensor) for tensors in layers for name, tensor in tensors.items() if parse(name).matrix]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_any_encodings_in_any_order(data):
    """Two layers, one of them fused, load exactly, or every layer that lacks a tensor is named.

    INT4's optional tensors stay: without them it is another matrix. Scales of activations may be anything.
    """
    torch.manual_seed(data.draw(st.integers(0, 9)))
    wk, gate, both = (EXPORTS[data.draw(st.sampled_from(sorted(EXPORTS)))](n, 128) for n in (128, 16, 144))
    tensors = layer_of(wk, gate) | named(INDEXER.format(1), "wk_weights_proj", both)
    lost = data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=2))
    lost = {name for name in lost if not name.endswith(("zero_point", "g_idx", "input_scale"))}
    tensors[f"{STEM}wk.output_scale"] = torch.ones(1, device="meta")
    tensors[f"{STEM}weights_proj.act_scale"] = torch.ones(1, dtype=torch.complex128)
    assembly = started([0, 1], config={"index_head_dim": 128})
    for name in data.draw(st.permutations(sorted(set(tensors) - lost))):
        assert assembly.offer(name, tensors[name])
    if not lost:
        loaded = assembly.finish()
        for layer, expected in enumerate((torch.cat((wk.loaded, gate.loaded)), both.loaded)):
            matrices = loaded[layer].wk, loaded[layer].gate
            assert torch.equal(torch.cat([matrix.dequantize(torch.float64) for matrix in matrices]), expected)
        return
    with pytest.raises(CheckpointError) as caught:
        assembly.finish()
    for layer in {name.split(".")[2] for name in lost}:
        assert any(f"layers.{layer}." in p.subject or p.subject == f"layer {layer}" for p in caught.value.problems)


@pytest.mark.parametrize("layer", [fp8_layer, bf16_layer])
def test_reused_buffer(layer):
    """A streamer may overwrite its buffer, or train on it, after each offer."""
    tensors = projection(layer())
    expected = stream([(name, tensor.clone()) for name, tensor in tensors])[0]
    buffer, assembly = torch.empty(1 << 17, dtype=torch.uint8), started()
    for name, tensor in tensors:
        view = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        assembly.offer(name, torch.nn.Parameter(view))
        buffer.fill_(0x55)
    weights = assembly.finish()[0]
    assert same(weights.wk, expected.wk)
    assert same(weights.gate, expected.gate)
    assert not any(tensor.requires_grad for tensor in (*weights.wk.tensors, *weights.gate.tensors))


def test_offer_returns_true_for_projection_tensors():
    assembly, one = started(), torch.ones(1)
    for leaf in ("wq_b.weight", "wq_b.weight_scale_inv", "k_norm.weight", "index_kpool_compress_gate"):
        assert not assembly.offer(f"{STEM}{leaf}", one)
    assert not assembly.offer("model.norm.weight", one)
    assert not assembly.offer("model.layers.0.mlp.indexer.wk.weight", one)
    assert assembly.offer(INDEXER.format(7) + "wk.weight", one)  # a layer of another pipeline rank
    assert assembly.offer(f"{STEM}wk.input_scale", one)  # never read, but no one else's
    assert not assembly._collectors
    for name, tensor in projection(bf16_layer()):
        assert assembly.offer(name, tensor)
    assert list(assembly.finish()) == [0]


@pytest.mark.parametrize("leaf", ["wk.weight_scale_inv", "weights_proj.weight_scale_inv", "wk_weights_proj.weight"])
def test_stray_tensor_in_any_order(leaf):
    stray = torch.ones(144, 256).bfloat16() if leaf.startswith("wk_") else torch.ones(1, 2)
    for offers in itertools.permutations([*projection(bf16_layer()), (STEM + leaf, stray)]):
        problem = only(stream_problems(offers, config={"index_head_dim": 128}))
        assert problem.subject == STEM + leaf.removesuffix(".weight")


@pytest.mark.parametrize("leaf", ["wk.weight_scale_inv", "wk.weight"])
def test_failed_or_abandoned_load_leaves_nothing_behind(leaf):
    fresh, assembly = fp8_layer(), Assembly([0])
    stale = {STEM + leaf: fp8_layer()[STEM + leaf]}
    assert stream_problems(stale, assembly=assembly)
    assembly.begin()
    assembly.offer(*stale.popitem())
    assert same(stream(fresh, assembly=assembly)[0].wk, stream(fresh)[0].wk)


def test_calls_out_of_order():
    """Before the first load, and after one."""
    assembly = Assembly([0])
    for _ in range(2):
        for call in (lambda: assembly.offer(WK, torch.ones(1)), assembly.finish):
            with pytest.raises(RuntimeError, match="call begin"):
                call()
        problem = only(stream_problems({}, assembly=assembly))
        assert (problem.subject, problem.expected) == ("layer 0", "wk and weights_proj of its indexer")


def test_layers_that_were_not_asked_for():
    """They are never inspected: another pipeline rank's, or without an indexer that runs."""
    others = [(name, tensor[:1]) for name, tensor in projection(fp8_layer(7), fp8_layer(78))]
    offers = [*projection(fp8_layer()), *others, (INDEXER.format(7) + "wk.bias", torch.zeros(1))]
    assembly = Assembly([0])
    for _ in range(2):
        assert list(stream(offers, assembly=assembly)) == [0]


def no_memory(*_):
    raise torch.OutOfMemoryError


def test_out_of_memory_in_an_offer(monkeypatch):
    """The caller may free memory and offer the tensor again."""
    offers, assembly = projection(fp8_layer()), started()
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("indexproj.loading.layer.own", no_memory)
        assembly.offer(*offers[0])
    for offer in offers:
        assembly.offer(*offer)
    assert same(assembly.finish()[0].wk, stream(offers)[0].wk)


def test_out_of_memory_in_finish(monkeypatch):
    """It can be called again; warnings come once."""
    assembly = started([0, 1])
    for name, tensor in (fp8_layer(0) | fp8_layer(1)).items():
        assembly.offer(name, -tensor if name.endswith("scale_inv") else tensor)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("indexproj.kernels.ProjectionWeights.pack", no_memory)
        assembly.finish()
    assert list(assembly.finish()) == [0, 1]
    assert len({str(warning) for warning in assembly.warnings}) == len(assembly.warnings) == 2


def test_finish_drops_the_tensors_of_each_layer(monkeypatch):
    held, bind = [], LayerPlan.bind
    assembly = started(range(3))
    count = lambda: sum(bool(collector.tensors) for collector in assembly._collectors.values())  # noqa: E731
    monkeypatch.setattr(LayerPlan, "bind", lambda *args: held.append(count()) or bind(*args))
    stream(projection(*map(fp8_layer, range(3))), assembly=assembly)
    assert held == [3, 2, 1]


class Wrapped(torch.Tensor):
    """Like DTensor and torchao's tensors: it has a dtype and a shape, but other data."""


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda tensor: tensor.as_subclass(Wrapped), "Wrapped"),
        (lambda tensor: tensor.to("meta"), "meta"),
        (lambda tensor: tensor.bfloat16().to_sparse(), "sparse_coo"),
    ],
)
def test_tensor_subclass_meta_and_sparse(wrap, found):
    tensors = dict(projection(fp8_layer()))
    for name, tensor in tensors.items():
        problem = only(stream_problems({**tensors, name: wrap(tensor)}))
        assert problem.subject == name
        assert found in problem.found


def test_arguments_of_the_wrong_type():
    for thing in (3, None, "codes", [1.0], np.ones((2, 2))):
        with pytest.raises(TypeError, match=r"wk\.weight: expected a torch.Tensor, got "):
            started().offer(WK, thing)
    for config in ([], "config.json", 3, object()):
        with pytest.raises(TypeError, match=r"config: expected the content of config.json as a dict, got "):
            Assembly([0], config=config)
    with pytest.raises(ValueError, match="expected a device that holds values, got meta"):
        Assembly([0], device="meta")
