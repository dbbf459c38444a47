"""Checkpoints that are FP8 throughout, as DeepSeek-V3.2 and GLM-5.2 are published: stock against swapped.

vLLM's block-scaled FP8 GEMM needs AMX on a CPU. Here a kernel of the same base class computes it in torch, from the
parameters that vLLM's own method creates, loads and processes. `indexer_op` and everything after it do not run.
"""

from unittest import mock

import pytest
import torch
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.platforms import PlatformEnum

from engine import harness
from engine.checkpoints import DEEPSEEK, INDEXER, LAYERS, deepseek, write
from engine.harness import build, projections
from indexproj.indexer.cli.fixture import MODELS
from indexproj.indexer.cli.synthetic import quantize_blocks
from indexproj.kernels.formats import spread

WIDE = ("embed_tokens.", "lm_head.", "weights_proj.", "eh_proj.", "shared_head.")  # matrices that stay BF16


class TorchKernel(Fp8BlockScaledMMLinearKernel):
    """x in bf16, weights decoded: what vLLM's kernel for AMX computes."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    def apply_block_scaled_mm(self, A, B, As, Bs):
        return A.float() @ (B.float() * spread(Bs, (128, 128), B.shape)).T


def fp8_checkpoint(directory, model="deepseek-v3.2"):
    """Path, and layer -> [D + H, K] fp64, the values of its projection."""
    tensors, truth = {}, {}
    for name, tensor in deepseek().items():
        if tensor.ndim == 2 and not any(part in name for part in WIDE):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(tensor.float())
        else:
            tensors[name] = tensor
    for layer in range(LAYERS + 1):
        stem = INDEXER.format(layer)
        codes, scale = (tensors[f"{stem}wk.weight{suffix}"].double() for suffix in ("", "_scale_inv"))
        wk = codes * spread(scale, (128, 128), codes.shape)
        truth[layer] = torch.cat([wk, tensors[f"{stem}weights_proj.weight"].double()])
    quantization = MODELS[model].config["quantization_config"]
    return write(directory, tensors, {**DEEPSEEK, "quantization_config": quantization}), truth


@pytest.fixture(scope="module", params=["deepseek-v3.2", "glm-5.2-fp8"])
def checkpoint(request, tmp_path_factory):
    with mock.patch.dict(linear._POSSIBLE_FP8_BLOCK_KERNELS, {PlatformEnum.CPU: [TorchKernel]}):
        yield fp8_checkpoint(tmp_path_factory.mktemp("fp8"), request.param)


@pytest.mark.parametrize("draft", [False, True], ids=["main", "mtp"])
def test_fp8_checkpoint_agrees_with_stock(checkpoint, draft):
    """Everything but the projection is the same; k and weights differ by vLLM's rounding of wk to bf16."""
    path, truth = checkpoint
    stock, swapped = (build(path, switch, draft=draft) for switch in ("0", "1"))
    harness.assert_neighbors_equal(stock, swapped)
    neighbors = [type(module.quant_method) for name, module in swapped.named_modules() if name.endswith("wq_b")]
    assert neighbors == len(projections(swapped)) * [Fp8LinearMethod]
    assert list(projections(swapped)) == ([LAYERS] if draft else list(range(LAYERS)))
    harness.assert_outputs(swapped, truth)
    if not draft:
        harness.assert_indexer_inputs_agree(stock, swapped)
