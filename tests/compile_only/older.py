"""Compiles one config per regime and format with the Triton that is imported; prints failed checks as JSON.

test_older.py runs it with other versions of Triton first on the path.
"""

import json
from dataclasses import replace

import triton

from indexproj.benchmarks.compiled import Binary, faults, signature, warm_up
from indexproj.indexer.models import SHAPES
from indexproj.kernels import TARGETS, choose
from indexproj.kernels.formats import parse_pair

PAIRS = ("BF16, BF16", "FP8 128x128, BF16", "MXFP8, MXFP8", "NVFP4, NVFP4", "MXFP4, MXFP4")
SHAPE = SHAPES["deepseek-v3.2"]

if __name__ == "__main__":
    found, count = [], 0
    for target in (TARGETS["sm_90"], TARGETS["gfx942"]):
        for pair in PAIRS:
            problem = replace(signature(SHAPE, parse_pair(pair)), factors=(1.0, 0.0110485))
            for m in (4, 16, 1000, 8192):
                config = choose(m, SHAPE, problem.formats, target)
                binary = Binary.of(warm_up(target, config, problem), target)
                found += [f"{target.name} {pair} {config}: {f}" for f in faults(target, problem.ns, m, config, binary)]
                count += 1
    print(json.dumps({"version": triton.__version__, "count": count, "faults": found}))
