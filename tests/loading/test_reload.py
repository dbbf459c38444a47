"""Loading again: values change in place, all at once, and only if the whole load is right."""

import pytest
import torch

from exports import EXPORTS, layer_of, named, stream, stream_problems
from indexproj.loading import Assembly
from support import INDEXER, WK, bf16_layer, fp8_layer, same

STEM = INDEXER.format(0)
CONFIG = {"index_head_dim": 128}


def send(assembly, *layers):
    return stream({name: tensor for layer in layers for name, tensor in layer.items()}, assembly=assembly)


def pointers(weights):
    return [tensor.data_ptr() for matrix in (weights.wk, weights.gate) for tensor in matrix.tensors]


def equal(weights, others):
    return same(weights.wk, others.wk) and same(weights.gate, others.gate)


@pytest.mark.parametrize("export", EXPORTS)
def test_reload_keeps_memory(export):
    """Each load gives what a first load of its tensors gives, in the memory of the first one, under any names."""
    apart = [layer_of(export, export) for _ in range(2)]
    fused = [named(STEM, "wk_weights_proj", EXPORTS[export](144, 256)) for _ in range(2)]
    for loads in ((*apart, apart[1], apart[0], *fused), (*fused, *apart)):
        assembly = Assembly([0], config=CONFIG)
        live = send(assembly, loads[0]).pop(0)  # the dict belongs to the caller
        before = pointers(live)
        for load in loads:
            assert send(assembly, load)[0] is live
            assert equal(live, stream(load, config=CONFIG)[0])
            assert pointers(live) == before


@pytest.mark.parametrize("make", [bf16_layer, fp8_layer])
def test_failed_load_changes_nothing(make):
    """Neither in its own layer nor in others."""
    old, new = ({layer: make(layer) for layer in (0, 1)} for _ in range(2))
    assembly = Assembly([0, 1])
    live = send(assembly, *old.values())
    values = {layer: weights.map(torch.clone) for layer, weights in live.items()}
    last = INDEXER.format(1) + "wk.weight"
    nan = new[1][last].clone()
    nan.view(torch.uint8)[0, :2] = 0x7F
    for bad in (
        {},
        {name: tensor for name, tensor in new[1].items() if name != last},
        {**new[1], last: nan},
        {**new[1], last: new[1][last][:, :128]},
        {**new[1], f"{INDEXER.format(1)}wk.bias": torch.zeros(1)},
    ):
        assert stream_problems(new[0] | bad, assembly=assembly)
        assert all(equal(live[layer], values[layer]) for layer in live)
    assert stream_problems([*new[0].items(), *new[1].items(), *new[0].items()], assembly=assembly)
    assert all(equal(live[layer], values[layer]) for layer in live)
    assert send(assembly, *new.values()) == live
    assert not any(equal(live[layer], values[layer]) for layer in live)


@pytest.mark.parametrize("modes", [(True, False), (False, True)])
def test_reload_across_inference_mode(modes):
    assembly, tensors = Assembly([0]), fp8_layer()
    loaded = []
    for mode in modes:
        with torch.inference_mode(mode):
            loaded.append(send(assembly, tensors)[0])
        tensors = fp8_layer()
    assert loaded[0] is loaded[1]


def test_reload_in_another_encoding_is_a_warning(caplog):
    """Its weights are new objects, which a holder of CUDA graphs must know."""
    assembly, live = Assembly([0, 1]), {}
    for make, is_new in ((fp8_layer, False), (fp8_layer, False), (bf16_layer, True), (bf16_layer, False)):
        caplog.clear()
        tensors = make(0), make(1)
        before, live = live, send(assembly, *tensors)
        assert [record.getMessage() for record in caplog.records] == is_new * [
            "layer {0-1}: expected FP8 128x128, BF16 (128, 16, 256) as before, found BF16, BF16 (128, 16, 256); the "
            "weights are new objects: capture CUDA graphs again"
        ]
        assert len(assembly.warnings) == 2 * is_new
        assert not before or (live[0] is not before[0]) == is_new
    assert torch.equal(live[0].wk.weight, tensors[0][WK])
