"""What a GPU could do, and what it is."""

from __future__ import annotations

import shutil
import subprocess

import torch

from indexproj.benchmarks.gates import PAIRS, SHAPES, nbytes

# TB/s of memory and dense bf16 TFLOPS, by a part of the name that torch gives: the vendors' data sheets.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": (2.04, 312),
    "NVIDIA H100 80GB HBM3": (3.35, 989),
    "NVIDIA H200": (4.8, 989),
    "NVIDIA B200": (8.0, 2250),
    "MI300X": (5.3, 1307),
}


def floors(gpu: str, shape: str, pair: str, m: int, seconds: float) -> dict[str, float]:
    """TB/s of the bytes that have to be moved, and, of a GPU in PEAKS, what memory and arithmetic take at least, in us.

    Bytes are those of the weights, of x in bf16 and of k in bf16 and the gate in fp32, once each.
    """
    *ns, k = SHAPES[shape]
    weights = sum(nbytes(kind, n, k) for kind, n in zip(PAIRS[pair], ns, strict=True))
    d, h = ns
    moved, flops = weights + m * (2 * k + 2 * d + 4 * h), 2 * m * k * (d + h)
    found = {"TB/s": moved / seconds / 1e12}
    for name, (bandwidth, rate) in PEAKS.items():
        if name in gpu:
            memory, compute = moved / bandwidth / 1e6, flops / rate / 1e6
            found |= {"memory floor": memory, "compute floor": compute}
            found["share of the roofline"] = max(memory, compute) / (1e6 * seconds)
    return found


def description() -> dict[str, str]:
    """Name, driver and clocks of the GPU at hand, as far as the driver's tool tells; nothing without one."""
    if not torch.cuda.is_available():
        return {}
    found = {"name": torch.cuda.get_device_name(), "runtime": torch.version.hip or torch.version.cuda or "?"}
    fields = "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"
    if tool := shutil.which("nvidia-smi"):
        query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={_uuid()}"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        found |= dict(zip(fields, map(str.strip, answer.stdout.split(",")), strict=False))
    return found


def _uuid() -> str:
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
