"""Wrote the files beside it: wk of a small layer, packed by auto-round 0.16.1 and, for its scales, amd-quark 0.13.

Installing both takes minutes, so the files are kept. MXFP4 has the weight that it was packed from beside it.
"""

from pathlib import Path

import torch
from auto_round import schemes
from auto_round.export.export_to_autoround import qlinear_fp, qlinear_int
from quark.torch.kernel.float8_e5m3.reference import reference_convert_fp32_to_e5m3_bits
from safetensors.torch import save_file

HERE, N, K = Path(__file__).parent, 128, 128


def weight():
    torch.manual_seed(0)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.randn(N, K) * 0.02
    return linear


def write(name, tensors, **extra):
    tensors = {leaf: tensor.contiguous() for leaf, tensor in {**tensors, **extra}.items()}
    save_file(tensors, HERE / f"{name}.safetensors")


def main():
    linear = weight()
    exponents = (linear.weight.detach().view(N, -1, 32).abs().amax(2)).log2().floor() - 2
    for name, module, scheme in (("mxfp4", qlinear_fp, schemes.MXFP4), ("mxint4", qlinear_int, schemes.MXINT4)):
        packed = module.QuantLinear(4, 32, K, N, bias=False, data_type=scheme["data_type"])
        packed.pack(linear, exponents, None)
        tensors = {"weight_packed": packed.weight_packed, "weight_scale": packed.weight_scale}
        write(f"auto_round_{name}", tensors, original=linear.weight.detach())
    scale = linear.weight.detach().view(N, -1, 32).abs().amax(2) / 6
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    write("quark_amdfp4", {"weight": codes, "weight_scale": reference_convert_fp32_to_e5m3_bits(scale).to(torch.uint8)})


if __name__ == "__main__":
    main()
