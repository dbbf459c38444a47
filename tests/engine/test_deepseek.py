"""DeepseekV3ForCausalLM, vLLM's own, on checkpoints that its own loader reads: as it is, and with the plugin."""

import pytest
import torch

from engine.harness import DEEPSEEK, H, K, Q_RANK, build, deepseek, indexer_inputs, is_projection, projections, write

M = 5


def activations(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, qr = (torch.randn(M, n, generator=generator).bfloat16() for n in (K, Q_RANK))
    return x, qr, torch.arange(M)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory):
    """The same BF16 checkpoint, loaded by vLLM as it is and by vLLM with the plugin."""
    path = write(tmp_path_factory.mktemp("bf16"), deepseek())
    return build(path, "0"), build(path, "1")


def test_nothing_but_the_projection_differs(bf16):
    stock, swapped = (dict(model.named_parameters()) for model in bf16)
    assert [name for name in stock if not is_projection(name)] == [name for name in swapped if not is_projection(name)]
    for name, tensor in stock.items():
        if not is_projection(name):
            assert torch.equal(tensor, swapped[name]), name
    assert dict(bf16[0].named_buffers()).keys() == dict(bf16[1].named_buffers()).keys()
    classes = ([type(module) for module in model.modules()] for model in bf16)
    assert next(classes) == next(classes)


def test_what_the_indexer_hands_on_agrees(bf16):
    for layer in range(2):
        inputs = activations(layer)
        stock, swapped = (indexer_inputs(model.model.layers[layer].self_attn, *inputs) for model in bf16)
        assert torch.equal(stock[0].view(torch.uint8), swapped[0].view(torch.uint8))  # the query does not pass through
        for ours, theirs in zip(swapped[1:], stock[1:], strict=True):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape and ours.stride() == theirs.stride()
            difference = (ours.double() - theirs.double()).abs().max()
            assert difference <= 2**-7 * theirs.double().abs().max()
