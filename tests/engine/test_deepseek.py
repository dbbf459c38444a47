"""DeepseekV3ForCausalLM, vLLM's own, on checkpoints that its own loader reads: as it is, and with the plugin."""

import re
from pathlib import Path

import pytest
import torch

from engine.harness import (
    D,
    H,
    K,
    M,
    activations,
    build,
    deepseek,
    indexer_inputs,
    is_projection,
    like,
    projections,
    write,
)
from engine.kinds import KINDS, checkpoint, load, outcomes

ROOT = Path(__file__).parent.parent.parent


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
            assert like(ours) == like(theirs)
            difference = (ours.double() - theirs.double()).abs().max()
            assert difference <= 2**-7 * theirs.double().abs().max()


DOCUMENTED = dict(
    re.findall(r"^\| ([^|]+) \| (\w[^|]* \| [^|]+) \|$", (ROOT / "docs/vllm.md").read_text(), re.MULTILINE)
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_kinds_of_checkpoints(tmp_path, kind):
    """The table in docs/vllm.md is what happens, and the plugin loads right whatever can be."""
    words = outcomes(kind, tmp_path)
    assert " | ".join(words) == DOCUMENTED[kind.name]
    assert words[1].startswith("right, ") or (words[1] == "refused" and (kind.lost or kind.is_stray))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.lost and not kind.is_stray], ids=lambda k: k.name)
def test_forward_on_every_kind(tmp_path, kind):
    """vLLM's own forward of the module, against fp64 of the decoded weights."""
    path, truth = checkpoint(kind, tmp_path)
    model, process = load(kind, path, "1")
    process()
    x, *_ = activations()
    for layer, module in projections(model).items():
        output, bias = module(x)
        assert bias is None
        assert like(output) == (torch.bfloat16, (M, D + H), (D + H, 1))
        exact = x.double() @ truth[layer].T
        assert (output.double() - exact).abs().max() <= 2**-8 * exact.abs().max()
        # `.weight` is there for others to read where it can hold the values.
        dense = truth[layer].shape[0] * K * 2 == sum(tensor.nbytes for tensor in module.parameters())
        assert hasattr(module, "weight") == dense
        if dense:
            assert torch.equal(module.weight.double(), truth[layer])
