"""Compiles one config of each regime and pair with whatever Triton is imported; prints what speaks against it, as JSON.

Run by test_older.py with other versions of Triton ahead on the path.
"""

import json

import triton

from indexproj.benchmarks.compiled import compile_for
from indexproj.benchmarks.gates import PAIRS, SHAPES, faults
from indexproj.kernels import TARGETS, choose

SHAPE = SHAPES["deepseek-v3.2"]

found, count = [], 0
for name in ("sm_90", "gfx942"):
    for kinds in PAIRS.values():
        for m in (4, 16, 1000):
            config = choose(m, SHAPE, kinds, TARGETS[name])
            binary = compile_for(TARGETS[name], config, SHAPE, kinds, factors=(1.0, 0.0110485))
            found += [f"{name} {kinds} {config}: {fault}" for fault in faults(TARGETS[name], SHAPE, m, config, binary)]
            count += 1
print(json.dumps({"version": triton.__version__, "count": count, "faults": found}))
