"""The transaction: any order, any number of calls, everything or nothing."""

import gc
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exports import EXPORTS, named
from indexproj.kernels import DenseMatrix, Fp8Matrix
from indexproj.loading import Assembly, CheckpointError
from indexproj.loading.names import is_projection
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


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_encodings_in_any_order_over_any_calls_load_right_or_name_what_is_missing(data):
    """Layer 1 is stored as one matrix. Optional tensors of INT4 are left alone: without them it is another matrix."""
    torch.manual_seed(data.draw(st.integers(0, 9)))
    wk, gate, both = (EXPORTS[data.draw(st.sampled_from(sorted(EXPORTS)))](n, 128) for n in (128, 16, 144))
    named_0, named_1 = INDEXER.format(0), INDEXER.format(1)
    tensors = named(named_0, "wk", wk) | named(named_0, "weights_proj", gate) | named(named_1, "wk_weights_proj", both)
    lost = data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=2))
    lost = {name for name in lost if not name.endswith(("zero_point", "g_idx"))}
    names = data.draw(st.permutations(sorted(set(tensors) - lost)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(names)), max_size=3)))
    assembly = Assembly([0, 1])
    assembly.begin()

    def call(names):  # as an engine that hands on one shard at a time
        for name in names:
            assert assembly.offer(name, tensors[name])

    for start, stop in itertools.pairwise([0, *cuts, len(names)]):
        call(names[start:stop])
    needed = {name for name in lost if not name.endswith("input_scale")}
    if not needed:
        loaded = assembly.finish()
        assert torch.equal(loaded[0].wk.dequantize(torch.float64), wk.loaded)
        assert torch.equal(loaded[0].gate.dequantize(torch.float64), gate.loaded)
        assert torch.equal(loaded[1].wk.dequantize(torch.float64), both.loaded[:128])
        assert torch.equal(loaded[1].gate.dequantize(torch.float64), both.loaded[128:])
        return
    with pytest.raises(CheckpointError) as caught:
        assembly.finish()
    for name in needed:
        layer = name.split(".")[2]
        assert any(f"layers.{layer}." in p.subject or p.subject == f"layer {layer}" for p in caught.value.problems)


@pytest.mark.parametrize("matrix", ["wk", "weights_proj", "wk_weights_proj"])
def test_optional_tensors_may_come_last(matrix):
    int4, other = EXPORTS["int4_zero_point"](144, 256), "wk" if matrix == "weights_proj" else "weights_proj"
    offers = {} if matrix.startswith("wk_") else named(STEM, other, EXPORTS["bf16"](16, 256))
    offers |= named(STEM, matrix, int4)
    assert list(offers)[-1].endswith("zero_point")
    weights = assemble(offers.items())[0]
    whole = torch.cat((weights.wk.dequantize(torch.float64), weights.gate.dequantize(torch.float64)))
    assert torch.equal(whole[-144:] if matrix == "weights_proj" else whole[:144], int4.loaded)


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
        assert problem.subject == again[0]
        assert problem.found.startswith("a second one, ")


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_stray_scale_beside_a_bf16_weight(position):
    offers = projection(bf16_layer())
    offers.insert(position, (f"{STEM}wk.weight_scale_inv", torch.ones(1, 2)))
    assert fails(offers).subject == f"{STEM}wk.weight_scale_inv"


def test_a_fused_matrix_beside_those_it_is_made_of():
    problem = fails([*projection(bf16_layer()), (f"{STEM}wk_weights_proj.weight", torch.ones(144, 256).bfloat16())])
    assert (problem.subject, problem.found) == (f"{STEM}wk_weights_proj", f"{STEM}wk.weight beside it")


def test_a_layer_under_two_prefixes():
    one, two = projection(fp8_layer()), [(f"language_{name}", tensor) for name, tensor in projection(fp8_layer())]
    with pytest.raises(CheckpointError) as caught:
        assemble([*one, *two])
    assert [problem.subject for problem in caught.value.problems] == [name for name, _ in two]
    with pytest.raises(CheckpointError) as caught:
        assemble([*one[:1], *two[1:]])  # which are one whole
    assert {name for name, _ in two[1:]} < {problem.subject for problem in caught.value.problems}


@pytest.mark.parametrize("head_dim", [-16, 0, 144])
def test_a_fused_matrix_has_rows_of_both(head_dim):
    assembly = Assembly([0], index_head_dim=head_dim)
    assembly.begin()
    assembly.offer(f"{STEM}wk_weights_proj.weight", torch.ones(144, 256).bfloat16())
    with pytest.raises(CheckpointError, match=f"expected {head_dim} rows of wk"):
        assembly.finish()


def test_matrices_that_differ_in_k():
    offers = {**bf16_layer(), f"{STEM}weights_proj.weight": torch.zeros(16, 128).bfloat16()}
    problem = fails(offers.items())
    assert (problem.subject, problem.expected, problem.found) == (
        f"{STEM}weights_proj.weight",
        "wk's K = 256",
        "BF16 [16, 128]",
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


def pointers(weights):
    return [tensor.data_ptr() for matrix in (weights.wk, weights.gate) for tensor in matrix.tensors]


@pytest.mark.parametrize("layer", [fp8_layer, bf16_layer])
def test_a_reload_keeps_the_memory_and_changes_the_values(layer):
    first, second = layer(), layer()
    assembly = Assembly([0])

    def load(offers):
        assembly.begin()
        for name, tensor in offers:
            assembly.offer(name, tensor)
        return assembly.finish().pop(0)  # from a dict that is the caller's

    weights = load(projection(first))
    before, values = pointers(weights), weights.map(torch.clone)
    for damaged in (projection(second)[:-1], [*projection(second), projection(second)[0]]):
        with pytest.raises(CheckpointError):
            load(damaged)
        assert same(weights.wk, values.wk)
        assert same(weights.gate, values.gate)
    again = load(projection(second))
    assert again is weights
    assert pointers(weights) == before
    assert torch.equal(weights.gate.weight, second[f"{STEM}weights_proj.weight"])
    assert same(weights.wk, assemble(projection(second))[0].wk)


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_a_reload_in_another_mode_of_torch(modes):
    """Memory that was allocated in inference mode can be written outside of it, and the other way round."""
    assembly = Assembly([0])
    loaded = []
    for mode in modes:
        tensors = fp8_layer()
        with torch.inference_mode(mode):
            assembly.begin()
            for name, tensor in projection(tensors):
                assembly.offer(name, tensor)
            loaded.append(assembly.finish()[0])
    assert loaded[0] is loaded[1]
    assert same(loaded[0].wk, matrices(tensors)[0])


def test_a_load_is_taken_for_all_layers_or_for_none():
    old, new = {layer: fp8_layer(layer) for layer in (0, 1)}, {layer: fp8_layer(layer) for layer in (0, 1)}
    assembly = Assembly([0, 1])
    assembly.begin()
    for name, tensor in (offer for tensors in old.values() for offer in projection(tensors)):
        assembly.offer(name, tensor)
    weights = assembly.finish()
    new[1][f"{INDEXER.format(1)}wk.weight_scale_inv"][0, 0] = torch.nan
    assembly.begin()
    for name, tensor in (offer for tensors in new.values() for offer in projection(tensors)):
        assembly.offer(name, tensor)
    with pytest.raises(CheckpointError):
        assembly.finish()
    assert all(same(weights[layer].wk, matrices(old[layer], layer)[0]) for layer in (0, 1))


def test_a_reload_in_another_encoding_gives_new_weights():
    assembly = Assembly([0])
    loaded = []
    for tensors in (fp8_layer(), bf16_layer()):
        assembly.begin()
        for name, tensor in projection(tensors):
            assembly.offer(name, tensor)
        loaded.append(assembly.finish()[0])
    assert loaded[0] is not loaded[1]
    assert torch.equal(loaded[1].wk.weight, tensors[f"{STEM}wk.weight"])


def test_layers_of_others_are_counted():
    assembly = Assembly([0])
    for _ in range(2):
        assembly.begin()
        for name, tensor in (offer for layer in (0, 7, 78) for offer in projection(fp8_layer(layer))):
            assembly.offer(name, tensor)
        assert list(assembly.finish()) == [0]
        assert dict(assembly.passed_over) == {7: 3, 78: 3}


def test_an_offer_that_fails_is_as_if_it_had_not_been(monkeypatch):
    """Memory may run out in a copy; the caller may free some and offer the tensor again, or give up."""

    def no_memory(*_):
        raise torch.OutOfMemoryError

    offers = projection(fp8_layer())
    for again in (True, False):
        assembly = Assembly([0])
        assembly.begin()
        for number, (name, tensor) in enumerate(offers):
            if number == 1:
                with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
                    patch.setattr("indexproj.loading.assembly._own", no_memory)
                    assembly.offer(name, tensor)
            if again or number != 1:
                assembly.offer(name, tensor)
        if again:
            assert same(assembly.finish()[0].wk, matrices(dict(offers))[0])
        else:
            with pytest.raises(CheckpointError) as caught:
                assembly.finish()
            assert [problem.subject for problem in caught.value.problems] == [offers[1][0]]


class Wrapped(torch.Tensor):
    """As DTensor and torchao's tensors are: of a dtype and a shape, but other data."""


@pytest.mark.parametrize(
    ("wrap", "found"),
    [
        (lambda tensor: tensor.as_subclass(Wrapped), "Wrapped of "),
        (lambda tensor: tensor.to("meta"), "meta of "),
        (lambda tensor: tensor.bfloat16().to_sparse(), "sparse_coo of "),
    ],
)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_what_is_no_plain_tensor_is_refused(wrap, found, position):
    offers = projection(fp8_layer())
    name, tensor = offers[position]
    offers[position] = name, wrap(tensor)
    problem = fails(offers)
    assert problem.subject == name
    assert problem.found.startswith(found)


def test_scales_of_activations_may_be_anything():
    offers = [(f"{STEM}wk.input_scale", torch.ones(1, device="meta")), *projection(fp8_layer())]
    assert list(assemble(offers)) == [0]


def test_mtp_layers_need_the_number_of_hidden_layers():
    tensors = {name.replace("layers.0.", "mtp_layers.0."): tensor for name, tensor in fp8_layer().items()}
    for num_hidden_layers in (78, None):
        assembly = Assembly([78], num_hidden_layers=num_hidden_layers)
        assembly.begin()
        for name, tensor in projection(tensors):
            assert assembly.offer(name, tensor)
        if num_hidden_layers:
            assert assembly.finish()[78].shape == (128, 16, 256)
        else:
            with pytest.raises(CheckpointError, match="expected num_hidden_layers to be given"):
                assembly.finish()


def test_what_arrives_after_a_faulty_layer_is_no_crash():
    tensors = EXPORTS["fp8_tensor"](128, 256).tensors
    tensors["weight"].view(torch.uint8)[0, 0] = 0x7F
    offers = [(f"{STEM}wk.{leaf}", tensor) for leaf, tensor in tensors.items()]
    offers.insert(0, (f"{STEM}weights_proj.weight", bf16_layer()[f"{STEM}weights_proj.weight"]))
    assert offers[-1][0].endswith("input_scale")
    assert fails(offers).subject == f"{STEM}wk.weight"


def test_bound_layers_hold_no_second_copy():
    """Streaming in file order keeps the tensors of one layer at most beside the weights."""
    assembly = Assembly(range(8))
    assembly.begin()
    for layer in range(8):
        stem, tensor = INDEXER.format(layer), EXPORTS["f32"](144, 352).tensors["weight"]
        if layer % 2:
            assembly.offer(f"{stem}wk_weights_proj.weight", tensor)
        else:
            assembly.offer(f"{stem}wk.weight", tensor[:128])
            assembly.offer(f"{stem}weights_proj.weight", tensor[128:])
        del tensor
        held = [tensor for tensor in gc.get_objects() if type(tensor) is torch.Tensor and tensor.shape[1:] == (352,)]
        assert not [tensor for tensor in held if tensor.dtype == torch.float32]
    assert len(assembly.finish()) == 8


def test_strided_tensors_are_taken_by_index():
    """DeepGEMM's packed scales are MN-major in memory."""
    export = EXPORTS["fp8_packed"](128, 1024)
    export.tensors["weight_scale_inv"] = export.tensors["weight_scale_inv"].T.contiguous().T
    offers = [*named(STEM, "wk", export).items(), *named(STEM, "weights_proj", EXPORTS["bf16"](16, 1024)).items()]
    assert torch.equal(assemble(offers)[0].wk.dequantize(torch.float64), export.values)


def test_the_file_of_an_offer_is_in_the_message():
    assembly = Assembly([0])
    assembly.begin()
    assembly.offer(f"{STEM}wk.bias", torch.zeros(128), "shard-7")
    with pytest.raises(CheckpointError) as caught:
        assembly.finish()
    assert {problem.file for problem in caught.value.problems if problem.subject.endswith("bias")} == {"shard-7"}


def test_parameters_are_taken_without_their_gradients():
    tensors = [(name, torch.nn.Parameter(tensor)) for name, tensor in projection(bf16_layer())]
    weights = assemble(tensors)[0]
    assert not weights.fused_weight.requires_grad


def test_a_layer_unlike_the_others():
    offers = [offer for layer, k in ((0, 256), (1, 256), (2, 384)) for offer in projection(fp8_layer(layer, k=k))]
    with pytest.raises(CheckpointError, match=r"layer 2: expected \(D, H, K\) = \(128, 16, 256\), as in most layers"):
        assemble(offers, range(3))


def test_is_complete_once_nothing_can_follow():
    assembly = Assembly([0])
    assert not assembly.is_complete
    assembly.begin()
    tensors = {name: tensor for name, tensor in fp8_layer().items() if is_projection(name)}
    for name, tensor in tensors.items():
        assert not assembly.is_complete
        assembly.offer(name, tensor)
    assert assembly.is_complete
    assembly.finish()
    assert not assembly.is_complete
