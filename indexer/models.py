"""Published models: the shapes of their projections, and the pairs of encodings that their checkpoints hold.

Imports neither torch nor the kernels, so that `--help` can list them.
"""

from __future__ import annotations

# (D, H, K): rows of wk, rows of weights_proj, hidden size.
SHAPES = {"deepseek-v3.2": (128, 64, 7168), "glm-5": (128, 32, 6144)}
# Encodings of wk and weights_proj.
PAIRS = (
    "BF16, BF16",
    "FP8 128x128, BF16",
    "FP8 128x128, FP8 128x128",
    "MXFP8, MXFP8",
    "NVFP4, BF16",
    "NVFP4, NVFP4",
    "MXFP4, BF16",
    "MXFP4, MXFP4",
)
