"""What the numerical tests of the kernels share."""

from dataclasses import replace

import torch

from indexproj.kernels.launch import Signature, launch


def relative_error(outputs, exact, dims=(0, 1)):
    """max |difference| / max |reference|, the larger one of all outputs; NaN counts as wrong."""
    errors = []
    for output, truth in zip(outputs, exact, strict=True):
        assert output.shape == truth.shape
        errors.append(((output.double() - truth).abs().amax(dims) / truth.abs().amax(dims).clamp(min=1e-300)).max())
    return torch.stack(errors).max().item()


def largest_row_error(outputs, exact):
    """The same per row, so that large rows hide nothing; 0 in a row of zeros."""
    return relative_error(outputs, exact, 1)


def run(x, w, config=None, activation=None):
    """fp32 outputs of one launch with a given config."""
    outs = tuple(torch.full((len(x), n), torch.nan, device=x.device) for n in w.shape[:2])
    signature = Signature.of(w.shape, w.formats, activation, (torch.float32,) * 2, device=w.device)
    launch(x, (w.wk.operands, w.gate.operands), outs, replace(signature, x_dtype=x.dtype), config)
    return outs


def surrounded(w, offset=0):
    """The same weights with NaN before and after every tensor, which starts offset elements after a multiple of 16."""

    def embed(tensor):
        around = torch.full((tensor.nbytes + 2048,), 0xFF, dtype=torch.uint8, device=tensor.device)
        start = 1024 + offset * tensor.itemsize
        return around[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    return w.map(embed)


def uneven(m, k):
    """bf16 x whose groups of 128 differ by up to 2**40, with a row of zeros, a tiny row and a huge element."""
    groups = torch.exp2(torch.randint(-20, 20, (m, -(-k // 128))).float()).repeat_interleave(128, 1)[:, :k]
    x = (torch.randn(m, k) * groups).bfloat16()
    if m > 2:
        x[0] = 0
        x[1] *= 2.0**-40
        x[2, k // 2] = 2.0**100
    return x
