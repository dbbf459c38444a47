"""The transaction: any order, any number of calls, everything or nothing."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from indexproj.kernels import DenseMatrix, Fp8Matrix
from indexproj.loading import Assembly, CheckpointError
from support import INDEXER, bf16_layer, fp8_layer, same

STEM = INDEXER.format(0)


def assemble(offers, layers=(0,)):
    assembly = Assembly(layers)
    assembly.begin()
    for name, tensor in offers:
        assembly.offer(name, tensor)
    return assembly.finish()


def matrices(tensors, layer=0):
    stem = INDEXER.format(layer)
    return (
        Fp8Matrix(tensors[f"{stem}wk.weight"], tensors[f"{stem}wk.weight_scale_inv"]),
        DenseMatrix(tensors[f"{stem}weights_proj.weight"]),
    )


def projection(tensors):
    return [(name, tensor) for name, tensor in tensors.items() if ".wk." in name or ".weights_proj." in name]


def test_every_order_gives_the_same():
    tensors = fp8_layer()
    wk, gate = matrices(tensors)
    for offers in itertools.permutations(projection(tensors)):
        weights = assemble(offers)[0]
        assert same(weights.wk, wk)
        assert same(weights.gate, gate)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_subset_in_any_order_loads_right_or_names_what_is_missing(data):
    torch.manual_seed(0)
    layers = {0: fp8_layer(0, k=128), 1: fp8_layer(1, k=128)}
    everything = [offer for tensors in layers.values() for offer in projection(tensors)]
    offers = data.draw(st.permutations(everything))
    offers = offers[: data.draw(st.integers(0, len(offers)))]
    missing = {name for name, _ in everything} - {name for name, _ in offers}
    if not missing:
        weights = assemble(offers, (0, 1))
        for layer, tensors in layers.items():
            assert same(weights[layer].wk, matrices(tensors, layer)[0])
            assert same(weights[layer].gate, matrices(tensors, layer)[1])
        return
    with pytest.raises(CheckpointError) as caught:
        assemble(offers, (0, 1))
    message = str(caught.value)
    for name in missing:
        layer = name.split(".")[2]
        matrix = name.rsplit(".", 1)[0]
        assert matrix in message or f"layer {layer}" in message


def test_what_is_kept_is_copied():
    tensors = fp8_layer()
    wk, gate = matrices({name: tensor.clone() for name, tensor in tensors.items()})
    buffer = torch.empty(1 << 17, dtype=torch.uint8)
    assembly = Assembly([0])
    assembly.begin()
    for name, tensor in projection(tensors):  # as a streamer does: one buffer for all
        view = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        assembly.offer(name, view)
        buffer.fill_(0x55)
    weights = assembly.finish()[0]
    assert same(weights.wk, wk)
    assert same(weights.gate, gate)


def test_names_that_are_taken_and_names_that_are_not():
    assembly = Assembly([0])
    assembly.begin()
    one = torch.ones(1)
    assert not assembly.offer(f"{STEM}wq_b.weight", one)
    assert not assembly.offer("model.norm.weight", one)
    assert assembly.offer(INDEXER.format(7) + "wk.weight", one)  # a layer of another pipeline rank
    for name, tensor in projection(bf16_layer()):
        assert assembly.offer(name, tensor)
    assert list(assembly.finish()) == [0]


def fails(offers):
    with pytest.raises(CheckpointError) as caught:
        assemble(offers)
    (problem,) = caught.value.problems
    return problem


def test_a_second_arrival():
    tensors = projection(fp8_layer())
    for again in tensors:
        problem = fails([*tensors, again])
        assert (problem.subject, problem.found) == (again[0], "a second one")


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_stray_scale_beside_a_bf16_weight(position):
    offers = projection(bf16_layer())
    offers.insert(position, (f"{STEM}wk.weight_scale_inv", torch.ones(1, 2)))
    assert fails(offers).subject == f"{STEM}wk.weight_scale_inv"


def test_an_already_fused_matrix_is_refused_by_name():
    problem = fails([*projection(bf16_layer()), (f"{STEM}wk_weights_proj.weight", torch.ones(144, 256).bfloat16())])
    assert problem.subject == f"{STEM}wk_weights_proj.weight"


def test_a_layer_under_two_prefixes():
    one, two = projection(fp8_layer()), [(f"language_{name}", tensor) for name, tensor in projection(fp8_layer())]
    with pytest.raises(CheckpointError) as caught:
        assemble([*one, *two])
    assert [problem.subject for problem in caught.value.problems] == [name for name, _ in two]


def test_matrices_that_differ_in_k():
    offers = {**bf16_layer(), f"{STEM}weights_proj.weight": torch.zeros(16, 128).bfloat16()}
    problem = fails(offers.items())
    assert (problem.subject, problem.expected, problem.found) == (
        f"{STEM}weights_proj.weight",
        "wk's K = 256",
        "K = 128",
    )


def test_a_failed_or_abandoned_load_leaves_nothing_behind():
    stale, fresh = fp8_layer(), fp8_layer()
    assembly = Assembly([0])
    assembly.begin()
    assembly.offer(f"{STEM}wk.weight_scale_inv", stale[f"{STEM}wk.weight_scale_inv"])
    with pytest.raises(CheckpointError):
        assembly.finish()
    assembly.begin()
    assembly.offer(f"{STEM}wk.weight", stale[f"{STEM}wk.weight"])
    assembly.begin()
    for name, tensor in projection(fresh):
        assembly.offer(name, tensor)
    assert same(assembly.finish()[0].wk, matrices(fresh)[0])


def test_calls_out_of_order():
    assembly = Assembly([0])
    with pytest.raises(RuntimeError, match="call begin"):
        assembly.offer(f"{STEM}wk.weight", torch.ones(1))
    with pytest.raises(RuntimeError, match="call begin"):
        assembly.finish()
    assembly.begin()
    with pytest.raises(CheckpointError, match="layer 0: expected wk and weights_proj"):
        assembly.finish()
    with pytest.raises(RuntimeError, match="call begin"):
        assembly.finish()
