"""Published models: shapes, format pairs and checkpoint layouts.

Imports neither torch nor the kernels, so `--help` can list them.
"""

from dataclasses import dataclass
from typing import Any

# (D, H, K): rows of wk, rows of weights_proj, hidden size. All GLM-5.x models and HY-V4 have the shape "glm-5".
# DeepSeek-V4 has three matrices for one x: of its compressor, weights_proj, and of its indexer's compressor.
SHAPES: dict[str, tuple[int, ...]] = {
    "deepseek-v3.2": (128, 64, 7168), "glm-5": (128, 32, 6144),
    "deepseek-v4-pro": (2048, 64, 512, 7168), "deepseek-v4-flash": (2048, 64, 512, 4096),
}  # fmt: skip
# Formats of wk and weights_proj, or of DeepSeek-V4's matrices, in published checkpoints.
PAIRS = (
    "FP8 128x128, BF16", "FP8 128x128, FP8 128x128", "BF16, BF16", "BF16, BF16, BF16", "MXFP8, MXFP8", "NVFP4, BF16",
    "NVFP4, NVFP4", "MXFP4, BF16", "MXFP4, MXFP4",
)  # fmt: skip


def fits(shape: str, pair: str) -> bool:
    """Whether the pair has as many formats as the shape has matrices."""
    return len(pair.split(", ")) == len(SHAPES[shape]) - 1


@dataclass(frozen=True)
class Model:
    """The layout of a published checkpoint, as far as the indexer is concerned."""

    shape: str  # key of SHAPES
    norm_dtype: str  # torch dtype of k_norm
    indexer_layers: tuple[int, ...]  # with indexer weights; the last one is the MTP layer, after all hidden layers
    # config.json, without the keys that depend on how many layers are written. With a quantization_config, wk and wq_b
    # are FP8 in 128x128 blocks, otherwise BF16.
    config: dict[str, Any]


_COMMON = {"index_topk": 2048, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "torch_dtype": "bfloat16"}
_DEEPSEEK = {
    **_COMMON, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "num_attention_heads": 128,
    "q_lora_rank": 1536,
}  # fmt: skip
_GLM = {
    **_COMMON, "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "num_attention_heads": 64,
    "q_lora_rank": 2048,
}  # fmt: skip
_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
# `indexers_proj` names no tensor; the published ignore list has the same mistake.
_GLM_FP8 = {**_FP8, "modules_to_not_convert": ["lm_head", "self_attn.indexers_proj"]}

MODELS = {
    "deepseek-v3.2": Model(
        shape="deepseek-v3.2", norm_dtype="float32", indexer_layers=tuple(range(62)),
        config=_DEEPSEEK | {"quantization_config": _FP8},
    ),
    "glm-5-bf16": Model(shape="glm-5", norm_dtype="bfloat16", indexer_layers=tuple(range(79)), config=_GLM),
    "glm-5.2-fp8": Model(
        shape="glm-5", norm_dtype="bfloat16", indexer_layers=(0, 1, *range(2, 78, 4), 78),
        config=_GLM | {"index_topk_freq": 4, "index_skip_topk_offset": 3, "quantization_config": _GLM_FP8},
    ),
}  # fmt: skip
