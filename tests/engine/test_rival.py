"""vLLM's own GEMMs: compiled to stand beside our kernels, and to be timed against them."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

from indexproj.benchmarks import contenders
from indexproj.kernels import ProjectionWeights
from support import dense, fp8

X = torch.zeros(1)
CODE = """
import dataclasses, json
from indexproj.indexer.rival import block_scaled_gemm
print(json.dumps([dataclasses.asdict(row) for row in block_scaled_gemm("sm_90", (1, 65536))]))
"""


def test_vllms_block_scaled_gemm_compiles_beside_ours():
    environment = {
        key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"
    }  # nothing compiles there
    result = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    few, many = json.loads(result.stdout)
    assert (few["programs"], few["weight_reads"], many["programs"]) == (1, 1, 1024)
    assert few["mma"] > 0
    assert 0 < few["registers"] <= 255


@pytest.mark.parametrize(
    ("module", "name", "arguments"),
    [
        (contenders.FP8_UTILS, "per_token_group_quant_fp8", (X, 128)),
        (contenders.FP8_UTILS, "w8a8_triton_block_scaled_mm", (X, X, X, X, [128, 128], torch.bfloat16)),
        (contenders.DEEP_GEMM, "is_deep_gemm_supported", ()),
        (contenders.DEEP_GEMM, "fp8_gemm_nt", ((X, X), (X, X), X)),
        (contenders.SKINNY, "shape_dynamic_skinny_gemm", (X, X)),
    ],
)
def test_contenders_of_the_benchmark_are_called_as_vllm_has_them(module, name, arguments):
    """What they compute is checked where there is a GPU."""
    inspect.signature(contenders._installed(module, name)).bind(*arguments)


def test_contenders_that_this_build_lacks_say_so():
    w, x = ProjectionWeights(fp8(128, 512), dense(16, 512)), torch.zeros(5, 512, dtype=torch.bfloat16)
    for name in ("vLLM skinny", "DeepGEMM"):
        with pytest.raises(contenders.UnavailableError, match=r"needs|not installed"):
            contenders.OTHERS[name](x, w)
