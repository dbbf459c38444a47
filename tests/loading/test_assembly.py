"""A stream of tensors: any order, everything or nothing."""

import gc
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exports import EXPORTS, layer_of, named, stream, stream_problems
from indexproj.loading import Assembly, CheckpointError, LayerPlan
from indexproj.loading.headers import parse
from support import GATE, INDEXER, WK, bf16_layer, fp8_layer, only, same

STEM = INDEXER.format(0)
FUSED = f"{STEM}wk_weights_proj.weight"
bind = LayerPlan.bind


def started(layers=(0,), **options):
    assembly = Assembly(layers, **options)
    assembly.begin()
    return assembly


def projection(*layers):
    return [(name, tensor) for tensors in layers for name, tensor in tensors.items() if parse(name).matrix]


def renamed(tensors, old, new):
    return [(name.replace(old, new), tensor) for name, tensor in tensors]


def fails(offers, *args, **options):
    return only(stream_problems(offers, *args, **options))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_encodings_in_any_order(data):
    """Two layers, one of them fused, load exactly, or every layer that lacks a tensor is named.

    INT4's optional tensors stay: without them it is another matrix.
    """
    torch.manual_seed(data.draw(st.integers(0, 9)))
    wk, gate, both = (EXPORTS[data.draw(st.sampled_from(sorted(EXPORTS)))](n, 128) for n in (128, 16, 144))
    tensors = layer_of(wk, gate) | named(INDEXER.format(1), "wk_weights_proj", both)
    lost = data.draw(st.sets(st.sampled_from(sorted(tensors)), max_size=2))
    lost = {name for name in lost if not name.endswith(("zero_point", "g_idx", "input_scale"))}
    names = data.draw(st.permutations(sorted(set(tensors) - lost)))
    assembly = started([0, 1], config={"index_head_dim": 128})
    for name in names:
        assert assembly.offer(name, tensors[name])
    if not lost:
        loaded = assembly.finish()
        assert torch.equal(loaded[0].wk.dequantize(torch.float64), wk.loaded)
        assert torch.equal(loaded[0].gate.dequantize(torch.float64), gate.loaded)
        assert torch.equal(loaded[1].wk.dequantize(torch.float64), both.loaded[:128])
        assert torch.equal(loaded[1].gate.dequantize(torch.float64), both.loaded[128:])
        return
    with pytest.raises(CheckpointError) as caught:
        assembly.finish()
    for layer in {name.split(".")[2] for name in lost}:
        assert any(f"layers.{layer}." in p.subject or p.subject == f"layer {layer}" for p in caught.value.problems)


@pytest.mark.parametrize("matrix", ["wk", "weights_proj", "wk_weights_proj"])
def test_int4_optional_tensors_last(matrix):
    int4, other = EXPORTS["int4_zero_point"](144, 256), "wk" if matrix == "weights_proj" else "weights_proj"
    offers = {} if matrix.startswith("wk_") else named(STEM, other, EXPORTS["bf16"](16, 256))
    offers |= named(STEM, matrix, int4)
    assert list(offers)[-1].endswith("zero_point")
    weights = stream(offers, config={"index_head_dim": 128} if matrix.startswith("wk_") else {})[0]
    whole = torch.cat((weights.wk.dequantize(torch.float64), weights.gate.dequantize(torch.float64)))
    assert torch.equal(whole[-144:] if matrix == "weights_proj" else whole[:144], int4.loaded)


@pytest.mark.parametrize("layer", [fp8_layer, bf16_layer])
def test_reused_buffer(layer):
    """A streamer may overwrite its buffer after each offer."""
    tensors = projection(layer())
    expected = stream([(name, tensor.clone()) for name, tensor in tensors])[0]
    buffer, assembly = torch.empty(1 << 17, dtype=torch.uint8), started()
    for name, tensor in tensors:
        assembly.offer(name, buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor))
        buffer.fill_(0x55)
    weights = assembly.finish()[0]
    assert same(weights.wk, expected.wk)
    assert same(weights.gate, expected.gate)


def test_offer_returns_true_for_projection_tensors():
    assembly, one = started(), torch.ones(1)
    for leaf in ("wq_b.weight", "wq_b.weight_scale_inv", "k_norm.weight", "index_kpool_compress_gate"):
        assert not assembly.offer(f"{STEM}{leaf}", one)
    assert not assembly.offer("model.norm.weight", one)
    assert not assembly.offer("model.layers.0.mlp.indexer.wk.weight", one)
    assert assembly.offer(INDEXER.format(7) + "wk.weight", one)  # a layer of another pipeline rank
    assert assembly.offer(f"{STEM}wk.input_scale", one)  # never read, but no one else's
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


def test_stray_scale_beside_bf16():
    for matrix, position in itertools.product(("wk", "weights_proj"), range(3)):
        offers = projection(bf16_layer())
        offers.insert(position, (f"{STEM}{matrix}.weight_scale_inv", torch.ones(1, 2)))
        assert fails(offers).subject == f"{STEM}{matrix}.weight_scale_inv"


def test_fused_matrix_beside_its_parts():
    offers = [*projection(bf16_layer()), (FUSED, torch.ones(144, 256).bfloat16())]
    for order in itertools.permutations(offers):
        assert fails(order, config={"index_head_dim": 128}).subject == f"{STEM}wk_weights_proj"


def test_layer_under_two_prefixes():
    one = projection(fp8_layer())
    two = renamed(one, "model.", "language_model.")
    for offers in ([*one, *two], [offer for pair in zip(one, two, strict=True) for offer in pair]):
        assert [problem.subject for problem in stream_problems(offers)] == [name for name, _ in two]
    subjects = {problem.subject for problem in stream_problems([*one[:1], *two[1:]])}  # together, they are complete
    assert {name for name, _ in two[1:]} < subjects


def test_sizes_that_differ():
    problem = fails({**bf16_layer(), GATE: torch.zeros(16, 128).bfloat16()})
    assert (problem.subject, problem.expected, problem.found) == (GATE, "wk's K = 256", "BF16 [16, 128]")
    problem = fails(fp8_layer(), config={"hidden_size": 512})
    assert (problem.subject, problem.expected) == (WK, "512 in dimension 1 of the matrix (hidden_size)")
    for value in ("128", True, 128.0, -1):
        problem = fails(fp8_layer(), config={"num_hidden_layers": value})
        assert problem.expected == "num_hidden_layers to be an integer from 0 to 999999"
    for d, h, k in ((128, 16, 384), (128, 32, 256), (64, 16, 256)):
        problem = fails(projection(fp8_layer(0), fp8_layer(1), fp8_layer(2, d, h, k)), range(3))
        assert problem.subject == f"{INDEXER.format(2)}wk.weight"
        assert problem.expected == "(D, H, K) = (128, 16, 256), like most layers"


def test_failed_or_abandoned_load_leaves_nothing_behind():
    for leaf in ("wk.weight_scale_inv", "wk.weight"):
        stale, fresh, assembly = fp8_layer(), fp8_layer(), Assembly([0])
        for finish in (True, False):
            assembly.begin()
            assembly.offer(f"{STEM}{leaf}", stale[f"{STEM}{leaf}"])
            if finish:
                with pytest.raises(CheckpointError):
                    assembly.finish()
        assert same(stream(fresh, assembly=assembly)[0].wk, stream(fresh)[0].wk)


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
    others = [(name, tensor[:1]) for name, tensor in projection(fp8_layer(7), fp8_layer(78))]
    offers = [*projection(fp8_layer()), *others, (INDEXER.format(7) + "wk.bias", torch.zeros(1))]
    assembly = Assembly([0])
    for _ in range(2):
        assert list(stream(offers, assembly=assembly)) == [0]


def no_memory(*_):
    raise torch.OutOfMemoryError


def test_out_of_memory_in_an_offer(monkeypatch):
    """The caller may free memory and offer the tensor again, or give up."""
    offers = projection(fp8_layer())
    for again in (True, False):
        assembly = started()
        assembly.offer(*offers[0])
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr("indexproj.loading.assembly.own", no_memory)
            assembly.offer(*offers[1])
        for offer in offers[1 if again else 2 :]:
            assembly.offer(*offer)
        if again:
            assert same(assembly.finish()[0].wk, stream(offers)[0].wk)
        else:
            with pytest.raises(CheckpointError) as caught:
                assembly.finish()
            assert only(caught.value.problems).subject == offers[1][0]


def test_out_of_memory_in_finish(monkeypatch):
    """It can be called again; warnings come once."""
    tensors = fp8_layer(0) | fp8_layer(1)
    for number in (0, 1):
        tensors[f"{INDEXER.format(number)}wk.weight_scale_inv"] *= -1
    assembly = started([0, 1])
    for offer in tensors.items():
        assembly.offer(*offer)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("indexproj.kernels.ProjectionWeights.pack", no_memory)
        assembly.finish()
    assert list(assembly.finish()) == [0, 1]
    assert len({str(warning) for warning in assembly.warnings}) == len(assembly.warnings) == 2


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
    for position in range(3):
        offers = projection(fp8_layer())
        name, tensor = offers[position]
        offers[position] = name, wrap(tensor)
        problem = fails(offers)
        assert problem.subject == name
        assert found in problem.found


@pytest.mark.parametrize("thing", [3, None, "codes", [1.0], np.ones((2, 2))])
def test_offer_of_a_non_tensor(thing):
    with pytest.raises(TypeError, match=r"wk\.weight: expected a torch.Tensor, got "):
        started().offer(WK, thing)


def test_meta_device():
    with pytest.raises(ValueError, match="expected a device that holds values, got meta"):
        Assembly([0], device="meta")


@pytest.mark.parametrize("export", ["bf16", "f16", "f32", "fp8_block", "mxfp8", "nvfp4", "mxfp4", "int4"])
def test_scales_of_activations_are_ignored(export):
    """Quark's NVFP4 has input_scale_2, static FP8 of transformers has activation_scale, in any dtype and shape."""
    things = torch.ones(3), torch.ones(1, device="meta"), torch.ones(1, dtype=torch.complex128)
    leaves = ("input_scale", "input_scale_2", "input_global_scale", "act_scale", "activation_scale", "output_scale")
    scales = [
        (f"{STEM}{matrix}.{leaf}", thing)
        for matrix in ("wk", "weights_proj")
        for leaf, thing in zip(leaves, things * 2, strict=True)
    ]
    for position in (0, 2, 9):
        offers = list(layer_of(export).items())
        assert list(stream([*offers[:position], *scales, *offers[position:]])) == [0]


def test_mtp_layers_need_num_hidden_layers():
    offers = renamed(projection(fp8_layer()), "layers.0.", "mtp_layers.0.")
    assert stream(offers, [78], {"num_hidden_layers": 78})[78].shape == (128, 16, 256)
    missing, layer = stream_problems(offers, [78])
    assert (missing.subject, layer.subject) == (offers[0][0], "layer 78")
    assert missing.expected.startswith("num_hidden_layers")
    offers += renamed(projection(fp8_layer()), "layers.0.", "layers.78.")  # two layers with one number
    assert len(stream_problems(offers, [78], {"num_hidden_layers": 78})) == 3


def test_bad_values_in_several_layers():
    tensors = bf16_layer(0) | bf16_layer(1) | bf16_layer(2)
    bad = [f"{INDEXER.format(layer)}weights_proj.weight" for layer in (0, 2)]
    for name in bad:
        tensors[name][0, 0] = torch.nan
    assert [problem.subject for problem in stream_problems(tensors, range(3))] == bad


def test_finish_drops_the_tensors_of_each_layer(monkeypatch):
    held = []

    def counted(plan, *args):
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.shape[1:] == (352,)]
        held.append(sum(tensor.dtype == torch.float32 for tensor in tensors))
        return bind(plan, *args)

    monkeypatch.setattr(LayerPlan, "bind", counted)
    offers = [(INDEXER.format(layer) + "wk_weights_proj.weight", torch.ones(144, 352)) for layer in range(3)]
    assembly = started(range(3), config={"index_head_dim": 128})
    while offers:
        assembly.offer(*offers.pop())
    assembly.finish()
    assert held == [3, 2, 1]


def test_parameters_lose_their_gradients():
    weights = stream([(name, torch.nn.Parameter(tensor)) for name, tensor in projection(bf16_layer())])
    assert not weights[0].fused_weight.requires_grad
