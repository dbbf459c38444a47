"""vLLM's own GEMM, compiled to stand beside our kernels."""

import json
import os
import subprocess
import sys

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
