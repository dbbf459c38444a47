"""A stream of tensors: any order, everything or nothing, in place if it comes again."""

import gc
import itertools
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exports import EXPORTS, layer_of, named, stream, stream_problems
from indexproj.kernels import ProjectionWeights
from indexproj.loading import Assembly, CheckpointError
from indexproj.loading.headers import parse
from support import GATE, INDEXER, WK, bf16_layer, fp8_layer, only, same

STEM = INDEXER.format(0)
CONFIG = {"index_head_dim": 128}


def projection(*layers):
    return [(name, tensor) for tensors in layers for name, tensor in tensors.items() if parse(name).matrix]


def equal(weights, others):
    return same(weights.wk, others.wk) and same(weights.gate, others.gate)


def streamed(tensors):
    """As a streamer may: transposed in memory, in a buffer that it overwrites after each offer."""
    for name, tensor in tensors.items():
        buffer = tensor.T.clone(memory_format=torch.contiguous_format).T if tensor.dim() == 2 else tensor.clone()
        yield name, buffer
        buffer.untyped_storage().fill_(0x55)


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
    tensors |= {f"{STEM}{leaf}": torch.ones(1, dtype=torch.cfloat) for leaf in ("wk.act_scale", "wk.output_scale")}
    offers = streamed({name: tensors[name] for name in data.draw(st.permutations(sorted(set(tensors) - lost)))})
    if lost:
        subjects = [problem.subject for problem in stream_problems(offers, [0, 1], CONFIG)]
        for layer in {name.split(".")[2] for name in lost}:
            assert any(f"layers.{layer}." in subject or subject == f"layer {layer}" for subject in subjects)
        return
    loaded = stream(offers, [0, 1], CONFIG)
    for layer, expected in enumerate((torch.cat((wk.loaded, gate.loaded)), both.loaded)):
        matrices = loaded[layer].wk, loaded[layer].gate
        assert torch.equal(torch.cat([matrix.dequantize(torch.float64) for matrix in matrices]), expected)
        assert all(tensor.is_contiguous() for matrix in matrices for tensor in matrix.tensors)


def test_offer_ignores_other_tensors():
    """Those of other layers, such as another pipeline rank's, are never inspected."""
    others = [*projection(*(fp8_layer(layer, k=384) for layer in (7, 8, 78))), (INDEXER.format(9) + "wk.bias", None)]
    assembly = Assembly([0])
    assembly.begin()
    for name in ("wq_b.weight", "wq_b.weight_scale_inv", "k_norm.weight", "index_kpool_compress_gate"):
        assert not assembly.offer(f"{STEM}{name}", torch.ones(1))
    for name in ("model.norm.weight", "model.layers.0.mlp.indexer.wk.weight"):
        assert not assembly.offer(name, torch.ones(1))
    for name, tensor in (*others, (f"{STEM}wk.input_scale", None)):
        assert assembly.offer(name, torch.ones(1) if tensor is None else tensor)
    for name, tensor in projection(fp8_layer()):
        assert assembly.offer(name, torch.nn.Parameter(tensor))
    (weights,) = assembly.finish().values()
    assert not any(tensor.requires_grad for tensor in (*weights.wk.tensors, *weights.gate.tensors))


@pytest.mark.parametrize("leaf", ["wk.weight_scale_inv", "weights_proj.weight_scale_inv", "wk_weights_proj.weight"])
def test_stray_tensor_in_any_order(leaf):
    stray = torch.ones(144, 256).bfloat16() if leaf.startswith("wk_") else torch.ones(1, 2)
    for offers in itertools.permutations([*projection(bf16_layer()), (STEM + leaf, stray)]):
        problem = only(stream_problems(offers, config=CONFIG))
        assert problem.subject == STEM + leaf.removesuffix(".weight")


def test_fused_matrix_under_another_prefix():
    offers = [*projection(bf16_layer()), (f"draft.{STEM}wk_weights_proj.weight", torch.ones(144, 256).bfloat16())]
    assert only(stream_problems(offers, config=CONFIG)).expected == f"all tensors of layer 0 under {STEM}"


@pytest.mark.parametrize("leaf", ["wk.weight_scale_inv", "wk.weight"])
def test_failed_or_abandoned_load_leaves_nothing_behind(leaf):
    fresh, assembly = fp8_layer(), Assembly([0])
    stale = {STEM + leaf: fp8_layer()[STEM + leaf]}
    assert stream_problems(stale, assembly=assembly)
    assembly.begin()
    assembly.offer(*stale.popitem())
    assert equal(stream(fresh, assembly=assembly)[0], stream(fresh)[0])


def test_calls_out_of_order():
    assembly = Assembly([0])
    for _ in range(2):
        for call in (lambda: assembly.offer(WK, torch.ones(1)), assembly.finish):
            with pytest.raises(RuntimeError, match="call begin"):
                call()
        problem = only(stream_problems({}, assembly=assembly))
        assert (problem.subject, problem.expected) == ("layer 0", "wk and weights_proj of its indexer")


def test_out_of_memory(monkeypatch):
    """The caller may free memory and call offer() or finish() again; warnings come once, and problems are kept."""

    def without_memory(owner, name, call):
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(owner, name, Mock(side_effect=torch.OutOfMemoryError))
            call()

    assembly, offers = Assembly([0, 1]), projection(fp8_layer(0), fp8_layer(1))
    offers = [(name, -tensor if name.endswith("scale_inv") else tensor) for name, tensor in offers]
    assembly.begin()
    without_memory(torch.Tensor, "to", lambda: assembly.offer(f"draft.{offers[0][0]}", offers[0][1]))
    for offer in offers:
        assembly.offer(*offer)
    without_memory(ProjectionWeights, "pack", assembly.finish)
    assert list(assembly.finish()) == [0, 1]
    assert len({str(warning) for warning in assembly.warnings}) == len(assembly.warnings) == 2
    assembly.begin()
    for name, tensor in offers:
        assembly.offer(name, torch.nan * tensor if name == GATE else tensor)
    without_memory(ProjectionWeights, "pack", assembly.finish)
    with pytest.raises(CheckpointError, match=r"layers\.0.*NaN"):
        assembly.finish()


def test_finish_drops_the_tensors_of_each_layer(monkeypatch):
    """Of INT4 weights, nothing else keeps the int32 words."""
    alive, pack = [], ProjectionWeights.pack
    gc.collect()  # or garbage of earlier tests may go meanwhile

    def count_and_pack(*matrices):
        alive.append(sum(type(each) is torch.Tensor and each.dtype == torch.int32 for each in gc.get_objects()))
        return pack(*matrices)

    monkeypatch.setattr(ProjectionWeights, "pack", count_and_pack)
    stream(layer_of("int4") | layer_of("int4", layer=1) | layer_of("int4", layer=2), range(3))
    assert [count - alive[2] for count in alive] == [2, 1, 0]


def test_tensor_subclass_meta_and_sparse():
    """Like DTensor and torchao's tensors, they have a dtype and a shape, but other data."""
    subclass = type("Wrapped", (torch.Tensor,), {})
    tensors = dict(projection(fp8_layer()))
    for name, tensor in tensors.items():
        wrapped = tensor.as_subclass(subclass), tensor.to("meta"), tensor.bfloat16().to_sparse()
        for found, other in zip(("Wrapped", "meta", "sparse_coo"), wrapped, strict=True):
            problem = only(stream_problems({**tensors, name: other}))
            assert problem.subject == name
            assert found in problem.found


def test_arguments_of_the_wrong_type():
    for thing in (3, None, [1.0]):
        with pytest.raises(TypeError, match=r"wk\.weight: expected a torch.Tensor, got "):
            stream({WK: thing})
    with pytest.raises(TypeError, match=r"config: expected the content of config.json as a dict, got list"):
        Assembly([0], config=[])
    with pytest.raises(ValueError, match="expected a device that holds values, got meta"):
        Assembly([0], device="meta")


@pytest.mark.parametrize("export", EXPORTS)
def test_reload_keeps_memory(export):
    """Each load gives what a first load of its tensors gives, in the memory of the first one, under any names."""
    apart = [layer_of(export, export) for _ in range(2)]
    fused = [named(STEM, "wk_weights_proj", EXPORTS[export](144, 256)) for _ in range(2)]
    for loads in ((*apart, apart[1], apart[0], *fused), (*fused, *apart)):
        assembly = Assembly([0], config=CONFIG)
        live = stream(loads[0], assembly=assembly).pop(0)  # the dict belongs to the caller
        before = [tensor.data_ptr() for tensor in live.wk.tensors + live.gate.tensors]
        for load in loads:
            assert stream(load, assembly=assembly)[0] is live
            assert equal(live, stream(load, config=CONFIG)[0])
            assert [tensor.data_ptr() for tensor in live.wk.tensors + live.gate.tensors] == before


@pytest.mark.parametrize("make", [bf16_layer, fp8_layer])
def test_failed_load_changes_nothing(make):
    assembly, new, last = Assembly([0, 1]), make(0) | make(1), INDEXER.format(1) + "wk.weight"
    live = stream(make(0) | make(1), assembly=assembly)
    values = {layer: weights.map(torch.clone) for layer, weights in live.items()}
    nan = new[last].clone()
    nan.view(torch.uint8)[0, :2] = 0x7F
    for bad in (
        make(0),
        {name: tensor for name, tensor in new.items() if name != last},
        {**new, last: nan},
        {**new, last: new[last][:, :128]},
        {**new, f"{INDEXER.format(1)}wk.bias": torch.zeros(1)},
        [*new.items(), *new.items()],
    ):
        assert stream_problems(bad, assembly=assembly)
        assert all(equal(live[layer], values[layer]) for layer in live)
    assert stream(new, assembly=assembly) == live
    assert not any(equal(live[layer], values[layer]) for layer in live)


@pytest.mark.parametrize("mode", [True, False])
def test_reload_across_inference_mode(mode):
    assembly = Assembly([0])
    with torch.inference_mode(mode):
        live = stream(fp8_layer(), assembly=assembly)[0]
    with torch.inference_mode(not mode):
        assert stream(fp8_layer(), assembly=assembly)[0] is live


def test_reload_in_another_encoding_is_a_warning(caplog):
    """Its weights are new objects, which a holder of CUDA graphs must know."""
    assembly, loads = Assembly([0, 1]), []
    for make in (fp8_layer, fp8_layer, bf16_layer):
        assert not caplog.records
        tensors = make(0) | make(1)
        loads.append(stream(tensors, assembly=assembly))
    assert only(caplog.records).getMessage() == (
        "layer {0-1}: expected FP8 128x128, BF16 (128, 16, 256) as before, found BF16, BF16 (128, 16, 256); the "
        "weights are new objects: capture CUDA graphs again"
    )
    assert len(assembly.warnings) == 2
    assert loads[0][0] is loads[1][0] is not loads[2][0]
    assert torch.equal(loads[2][0].wk.values, tensors[WK])
