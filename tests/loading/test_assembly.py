"""A stream of tensors: any order, everything or nothing."""

import gc
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exports import EXPORTS, named
from indexproj.kernels import DenseMatrix, Fp8Matrix
from indexproj.loading import Assembly, CheckpointError
from indexproj.loading.names import parse
from support import GATE, INDEXER, SCALE, WK, bf16_layer, fp8_layer, only, same

STEM = INDEXER.format(0)


def assemble(offers, layers=(0,), **options):
    assembly = Assembly(layers, **options)
    assembly.begin()
    for name, tensor in offers:
        assembly.offer(name, tensor)
    return assembly.finish()


def problems_of(offers, layers=(0,), **options):
    with pytest.raises(CheckpointError) as caught:
        assemble(offers, layers, **options)
    return caught.value.problems


def fails(offers):
    return only(problems_of(offers))


def matrices(tensors):
    return Fp8Matrix(tensors[WK], tensors[SCALE]), DenseMatrix(tensors[GATE])


def projection(tensors):
    return [(name, tensor) for name, tensor in tensors.items() if parse(name).matrix]


def renamed(tensors, old, new):
    return [(name.replace(old, new), tensor) for name, tensor in tensors]


def test_every_order():
    tensors = fp8_layer()
    wk, gate = matrices(tensors)
    for offers in itertools.permutations(projection(tensors)):
        weights = assemble(offers)[0]
        assert same(weights.wk, wk)
        assert same(weights.gate, gate)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_encodings_in_any_order(data):
    """Two layers, one of them fused, load exactly, or every layer that lacks a tensor is named.

    INT4's optional tensors stay: without them it is another matrix.
    """
    torch.manual_seed(data.draw(st.integers(0, 9)))
    wk, gate, both = (EXPORTS[data.draw(st.sampled_from(sorted(EXPORTS)))](n, 128) for n in (128, 16, 144))
    named_0, named_1 = INDEXER.format(0), INDEXER.format(1)
    tensors = named(named_0, "wk", wk) | named(named_0, "weights_proj", gate) | named(named_1, "wk_weights_proj", both)
    lost = data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=2))
    lost = {name for name in lost if not name.endswith(("zero_point", "g_idx"))}
    names = data.draw(st.permutations(sorted(set(tensors) - lost)))
    assembly = Assembly([0, 1], config={"index_head_dim": 128})
    assembly.begin()
    for name in names:
        assert assembly.offer(name, tensors[name])
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
def test_int4_optional_tensors_last(matrix):
    int4, other = EXPORTS["int4_zero_point"](144, 256), "wk" if matrix == "weights_proj" else "weights_proj"
    offers = {} if matrix.startswith("wk_") else named(STEM, other, EXPORTS["bf16"](16, 256))
    offers |= named(STEM, matrix, int4)
    assert list(offers)[-1].endswith("zero_point")
    weights = assemble(offers.items(), config={"index_head_dim": 128} if matrix.startswith("wk_") else {})[0]
    whole = torch.cat((weights.wk.dequantize(torch.float64), weights.gate.dequantize(torch.float64)))
    assert torch.equal(whole[-144:] if matrix == "weights_proj" else whole[:144], int4.loaded)


@pytest.mark.parametrize("layer", [fp8_layer, bf16_layer])
def test_reused_buffer(layer):
    """A streamer may overwrite its buffer after each offer."""
    tensors = projection(layer())
    expected = assemble([(name, tensor.clone()) for name, tensor in tensors])[0]
    buffer = torch.empty(1 << 17, dtype=torch.uint8)
    assembly = Assembly([0])
    assembly.begin()
    for name, tensor in tensors:
        assembly.offer(name, buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
        buffer.fill_(0x55)
    weights = assembly.finish()[0]
    assert same(weights.wk, expected.wk)
    assert same(weights.gate, expected.gate)


def test_offer_returns_true_for_projection_tensors():
    assembly, one = Assembly([0]), torch.ones(1)
    assembly.begin()
    for leaf in ("wq_b.weight", "wq_b.weight_scale_inv", "k_norm.weight", "index_kpool_compress_gate"):
        assert not assembly.offer(f"{STEM}{leaf}", one)
    assert not assembly.offer("model.norm.weight", one)
    assert not assembly.offer("model.layers.0.mlp.indexer.wk.weight", one)
    assert assembly.offer(INDEXER.format(7) + "wk.weight", one)  # a layer of another pipeline rank
    for name, tensor in projection(bf16_layer()):
        assert assembly.offer(name, tensor)
    assert list(assembly.finish()) == [0]


def test_second_arrival():
    tensors = projection(fp8_layer())
    for again in tensors:
        for position in range(len(tensors) + 1):
            problem = fails([*tensors[:position], again, *tensors[position:]])
            assert problem.subject == again[0]
            assert problem.expected.startswith("one tensor in the role of ")


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("matrix", ["wk", "weights_proj"])
def test_stray_scale_beside_bf16(matrix, position):
    offers = projection(bf16_layer())
    offers.insert(position, (f"{STEM}{matrix}.weight_scale_inv", torch.ones(1, 2)))
    assert fails(offers).subject == f"{STEM}{matrix}.weight_scale_inv"


def test_fused_matrix_beside_its_parts():
    offers = [*projection(bf16_layer()), (f"{STEM}wk_weights_proj.weight", torch.ones(144, 256).bfloat16())]
    for order in itertools.permutations(offers):
        assert only(problems_of(order, config={"index_head_dim": 128})).subject == f"{STEM}wk_weights_proj"


def test_layer_under_two_prefixes():
    one = projection(fp8_layer())
    two = renamed(one, "model.", "language_model.")
    for offers in ([*one, *two], [offer for pair in zip(one, two, strict=True) for offer in pair]):
        assert [problem.subject for problem in problems_of(offers)] == [name for name, _ in two]
    subjects = {problem.subject for problem in problems_of([*one[:1], *two[1:]])}  # together, they are complete
    assert {name for name, _ in two[1:]} < subjects


def test_hidden_layers_have_one_prefix():
    """MTP layers may have their own; a model numbers them from num_hidden_layers."""
    layers = [projection(fp8_layer(0)), projection(fp8_layer(1))]
    offers = [offer for layer in layers for offer in layer] + renamed(projection(fp8_layer(2)), "model.", "mtp.")
    assert list(assemble(offers, range(3), config={"num_hidden_layers": 2})) == [0, 1, 2]
    (problem,) = problems_of(offers, range(3))
    assert problem.subject == "mtp.layers.2.self_attn.indexer.wk.weight"


@pytest.mark.parametrize("head_dim", [0, 144])
def test_fused_matrix_needs_rows_of_both(head_dim):
    offers = [(f"{STEM}wk_weights_proj.weight", torch.ones(144, 256).bfloat16())]
    (problem,) = problems_of(offers, config={"index_head_dim": head_dim})
    assert problem.expected.startswith(f"{head_dim} rows of wk")


def test_matrices_that_differ_in_k():
    offers = {**bf16_layer(), GATE: torch.zeros(16, 128).bfloat16()}
    problem = fails(offers.items())
    assert problem.subject == GATE
    assert (problem.expected, problem.found) == ("wk's K = 256", "BF16 [16, 128]")


def test_layer_unlike_the_others():
    for d, h, k in ((128, 16, 384), (128, 32, 256), (64, 16, 256)):
        layers = fp8_layer(0), fp8_layer(1), fp8_layer(2, d, h, k)
        (problem,) = problems_of([offer for layer in layers for offer in projection(layer)], range(3))
        assert problem.subject == f"{INDEXER.format(2)}wk.weight"
        assert problem.expected == "(D, H, K) = (128, 16, 256), like most layers"


def test_failed_or_abandoned_load_leaves_nothing_behind():
    for leaf in ("wk.weight_scale_inv", "wk.weight"):
        stale, fresh = fp8_layer(), fp8_layer()
        assembly = Assembly([0])
        for finish in (True, False):
            assembly.begin()
            assembly.offer(f"{STEM}{leaf}", stale[f"{STEM}{leaf}"])
            if finish:
                with pytest.raises(CheckpointError):
                    assembly.finish()
        assembly.begin()
        for name, tensor in projection(fresh):
            assembly.offer(name, tensor)
        assert same(assembly.finish()[0].wk, matrices(fresh)[0])


def test_calls_out_of_order():
    assembly = Assembly([0])
    for call in (lambda: assembly.offer(WK, torch.ones(1)), assembly.finish):
        with pytest.raises(RuntimeError, match="call begin"):
            call()
    assembly.begin()
    with pytest.raises(CheckpointError, match="layer 0: expected wk and weights_proj"):
        assembly.finish()
    with pytest.raises(RuntimeError, match="call begin"):
        assembly.finish()


def test_layers_that_were_not_asked_for():
    """They are never inspected: another pipeline rank's, or without an indexer that runs."""
    assembly = Assembly([0])
    for _ in range(2):
        assembly.begin()
        for name, tensor in (offer for layer in (0, 7, 78) for offer in projection(fp8_layer(layer))):
            assembly.offer(name, tensor if ".0." in name else tensor[:1])
        assembly.offer(INDEXER.format(7) + "wk.bias", torch.zeros(1))
        assert list(assembly.finish()) == [0]


def test_out_of_memory_in_an_offer(monkeypatch):
    """The caller may free memory and offer the tensor again, or give up."""

    def no_memory(*_):
        raise torch.OutOfMemoryError

    offers = projection(fp8_layer())
    for again in (True, False):
        assembly = Assembly([0])
        assembly.begin()
        assembly.offer(*offers[0])
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr("indexproj.loading.assembly.own", no_memory)
            assembly.offer(*offers[1])
        for offer in offers[1 if again else 2 :]:
            assembly.offer(*offer)
        if again:
            assert same(assembly.finish()[0].wk, matrices(dict(offers))[0])
        else:
            with pytest.raises(CheckpointError) as caught:
                assembly.finish()
            assert only(caught.value.problems).subject == offers[1][0]


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
@pytest.mark.parametrize("position", [0, 1, 2])
def test_tensor_subclass_meta_and_sparse(wrap, found, position):
    offers = projection(fp8_layer())
    name, tensor = offers[position]
    offers[position] = name, wrap(tensor)
    problem = fails(offers)
    assert problem.subject == name
    assert found in problem.found


@pytest.mark.parametrize("scale", [torch.ones(1, device="meta"), torch.ones(1, dtype=torch.complex128)])
@pytest.mark.parametrize("position", [0, 2, 3])
def test_input_scale_may_be_anything(scale, position):
    offers = projection(fp8_layer())
    offers.insert(position, (f"{STEM}wk.input_scale", scale))
    assert list(assemble(offers)) == [0]


def test_mtp_layers_need_num_hidden_layers():
    offers = renamed(projection(fp8_layer()), "layers.0.", "mtp_layers.0.")
    assert assemble(offers, [78], config={"num_hidden_layers": 78})[78].shape == (128, 16, 256)
    missing, layer = problems_of(offers, [78])
    assert (missing.subject, layer.subject) == (offers[0][0], "layer 78")
    assert missing.expected.startswith("num_hidden_layers")
    offers += renamed(projection(fp8_layer()), "layers.0.", "layers.78.")  # two layers with one number
    assert len(problems_of(offers, [78], config={"num_hidden_layers": 78})) == 3


def test_arrival_after_a_layer_with_bad_values():
    tensors = bf16_layer()
    tensors[GATE][0, 0] = torch.nan
    offers = [*tensors.items(), (f"{STEM}wk.bias", torch.ones(1)), (f"{STEM}wk.input_scale", torch.ones(1))]
    assert {problem.subject for problem in problems_of(offers)} == {GATE, f"{STEM}wk.bias"}


def test_bound_layers_hold_no_second_copy():
    """In file order, at most one layer's tensors are held beside the weights."""
    assembly = Assembly(range(8), config={"index_head_dim": 128})
    assembly.begin()
    for layer in range(8):
        stem, tensor = INDEXER.format(layer), EXPORTS["f32"](144, 352).tensors["weight"]
        if layer % 2:
            assembly.offer(f"{stem}wk_weights_proj.weight", tensor)
        else:
            assembly.offer(f"{stem}wk.weight", tensor[:128])
            assembly.offer(f"{stem}weights_proj.weight", tensor[128:])
        del tensor
        if layer in (2, 7):
            held = [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape[1:] == (352,)]
            assert not [tensor for tensor in held if tensor.dtype == torch.float32]
    assert len(assembly.finish()) == 8


def test_parameters_lose_their_gradients():
    weights = assemble([(name, torch.nn.Parameter(tensor)) for name, tensor in projection(bf16_layer())])
    assert not weights[0].fused_weight.requires_grad
