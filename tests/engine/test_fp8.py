"""Checkpoints that are FP8 throughout, as DeepSeek-V3.2 and GLM-5.2 are published: stock against swapped.

vLLM's GEMM for FP8 in blocks needs AMX on a CPU, so a kernel of the same base class computes it in torch here: from the
parameters that vLLM's own method creates, loads and processes. Not run at all: `indexer_op` and what comes behind it.
"""

from unittest import mock

import pytest
import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.platforms import PlatformEnum

from engine import harness
from engine.harness import (
    DEEPSEEK,
    LAYERS,
    activations,
    build,
    deepseek,
    indexer_inputs,
    is_projection,
    like,
    outputs_are_right,
    projections,
    write,
)
from indexproj.indexer.cli.fixture import MODELS
from indexproj.indexer.cli.synthetic import quantize_blocks
from indexproj.kernels.matrix import spread

MTP = {"method": "mtp", "num_speculative_tokens": 1}
HEADS, KV_RANK = 4, 128  # vLLM does not decode kv_b_proj where that has less than a block, or one alone
WIDE = ("embed_tokens.", "lm_head.", "weights_proj.", "eh_proj.", "shared_head.")  # matrices that stay BF16


class TorchKernel(Fp8BlockScaledMMLinearKernel):
    """x in bf16, weights decoded: what vLLM's kernel for AMX computes."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    def apply_block_scaled_mm(self, A, B, As, Bs):
        return A.float() @ (B.float() * spread(Bs, (128, 128), B.shape)).T


@pytest.fixture(scope="module", params=["deepseek-v3.2", "glm-5.2-fp8"])
def checkpoint(request, tmp_path_factory):
    """Path, and layer -> [D + H, K] fp64, what it says of the projection."""
    tensors = {}
    with mock.patch.multiple(harness, HEADS=HEADS, KV_RANK=KV_RANK):
        wide = deepseek()
    for name, tensor in wide.items():
        if tensor.ndim == 2 and not any(part in name for part in WIDE):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(tensor.float())
        else:
            tensors[name] = tensor
    truth = {}
    for layer in range(LAYERS + 1):
        stem = f"model.layers.{layer}.self_attn.indexer."
        codes, scale = (tensors[f"{stem}wk.weight{suffix}"].double() for suffix in ("", "_scale_inv"))
        wk = codes * spread(scale, (128, 128), codes.shape)
        truth[layer] = torch.cat([wk, tensors[f"{stem}weights_proj.weight"].double()])
    config = {
        **DEEPSEEK,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "kv_lora_rank": KV_RANK,
        "quantization_config": MODELS[request.param].config["quantization_config"],
    }
    with mock.patch.dict(linear._POSSIBLE_FP8_BLOCK_KERNELS, {PlatformEnum.CPU: [TorchKernel]}):
        yield write(tmp_path_factory.mktemp("fp8"), tensors, config), truth


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("draft", [False, True], ids=["main", "mtp"])
def test_nothing_but_the_projection_differs(checkpoint, draft):
    path, truth = checkpoint
    arguments = {"draft": True, "speculative_config": MTP} if draft else {}
    stock, swapped = (build(path, switch, **arguments) for switch in ("0", "1"))
    theirs, ours = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (stock, swapped))
    assert [name for name in theirs if not is_projection(name)] == [name for name in ours if not is_projection(name)]
    for name, tensor in theirs.items():
        if not is_projection(name):
            assert like(tensor) == like(ours[name]), name
            assert torch.equal(bits(tensor), bits(ours[name])), name
    neighbours = [type(module.quant_method) for name, module in swapped.named_modules() if name.endswith("wq_b")]
    assert neighbours == len(projections(swapped)) * [Fp8LinearMethod]
    assert list(projections(swapped)) == ([LAYERS] if draft else list(range(LAYERS)))
    outputs_are_right(swapped, truth)


def test_what_the_indexer_hands_on_agrees(checkpoint):
    """k and weights differ by the rounding of wk to bf16, which vLLM upcasts to it."""
    stock, swapped = (build(checkpoint[0], switch) for switch in ("0", "1"))
    for layer in range(LAYERS):
        theirs, ours = (indexer_inputs(m.model.layers[layer].self_attn, *activations(layer)) for m in (stock, swapped))
        assert torch.equal(theirs[0].view(torch.uint8), ours[0].view(torch.uint8))
        for found, expected in zip(ours[1:], theirs[1:], strict=True):
            assert like(found) == like(expected)
            assert (found.double() - expected.double()).abs().max() <= 2**-7 * expected.double().abs().max()
