"""Checkpoints written by compressed-tensors, ModelOpt and torchao load as the values that these libraries decode."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import modelopt.torch.quantization as mtq
import pytest
import torch
from compressed_tensors.compressors import compress_module
from compressed_tensors.compressors.mx_utils import decompress_mx_scale
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized import unpack_from_int32
from compressed_tensors.quantization import preset_name_to_scheme
from compressed_tensors.quantization.lifecycle import initialize_module_for_quantization
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam, maybe_pad_tensor_for_block_quant
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import load_file
from torch import Tensor
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import Float8WeightOnlyConfig, quantize_
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from indexproj.loading import Checkpoint, CheckpointError, Plan, load
from support import INDEXER, write_checkpoint

WK, GATE = (INDEXER.format(0) + matrix for matrix in ("wk.", "weights_proj."))

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of zeros and of what newer versions of torch will do


def uneven(n, k, width, dtype=torch.bfloat16):
    """A weight whose groups of `width` columns and blocks of 128 rows differ by up to 2**14; some of it is 0."""
    count = math.ceil(k / width)
    sizes = torch.randint(-3, 4, (n, count)) - 2 * (torch.arange(count) % 4) - 2 * (torch.arange(n) // 128)[:, None]
    weight = torch.randn(n, k) * torch.exp2(sizes).repeat_interleave(width, 1)[:, :k]
    weight[1] = 0
    weight[2, -32:] = 0
    return weight.to(dtype)


class Format(NamedTuple):
    write: Callable[[Path, Tensor, Tensor], None]  # a checkpoint with such weights of wk and weights_proj
    decode: Callable[[dict[str, Tensor]], Tensor]  # by the last part of their names: the library's reading, in fp64
    encoding: str
    width: int  # columns that share a scale
    k: int  # an unaligned K that the format allows
    rtol: float = 0


def linear(weight):
    module = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    module.weight.data = weight.clone()
    return module


def compress(weight, preset):
    """Sets scales and zero points like llm-compressor's min-max observer."""
    module = linear(weight)
    initialize_module_for_quantization(module, preset_name_to_scheme(preset, ["Linear"]))
    args = module.quantization_scheme.weights
    if args.strategy == "block":
        height, width = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
        groups, dims = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)), (1, 3)
    elif args.group_size:
        groups, dims = weight.unflatten(1, (-1, args.group_size)), (2,)
    else:
        groups, dims = weight, (0, 1) if args.strategy == "tensor" else (1,)
    low, high = (each.view(module.weight_scale.shape) for each in (groups.amin(dims), groups.amax(dims)))
    divisor = None
    if args.strategy == "tensor_group":
        divisor = module.weight_global_scale.data.copy_(generate_gparam(*weight.float().aminmax()))
    scale, zero_point = calculate_qparams(low, high, args, global_scale=divisor)
    module.weight_scale.data.copy_(scale)
    module.weight_zero_point.data.copy_(zero_point)
    compress_module(module)
    return module.state_dict()


def decode(tensors, preset):
    args = preset_name_to_scheme(preset, ["Linear"]).weights
    scale, zero_point = tensors["weight_scale"], tensors.get("weight_zero_point")
    if args.type == "int":
        codes = unpack_from_int32(tensors["weight_packed"], args.num_bits, tensors["weight_shape"])
        if zero_point is not None:
            zero_point = unpack_from_int32(zero_point, args.num_bits, scale.shape, packed_dim=0)
    elif args.num_bits == 4:
        n, half = tensors["weight_packed"].shape
        codes = unpack_fp4_from_uint8(tensors["weight_packed"], n, 2 * half, dtype=torch.float64)
    else:
        codes = tensors["weight"]
    if args.scale_dtype == torch.uint8:
        scale = decompress_mx_scale(scale)
    divisor = tensors["weight_global_scale"].double() if "weight_global_scale" in tensors else None
    return dequantize(codes, scale.double(), zero_point, args, global_scale=divisor)


def export(path, wk, gate, config):
    """A GLM-5 of one layer, as transformers builds it and ModelOpt exports it."""
    shapes = {"hidden_size": wk.shape[1], "index_head_dim": wk.shape[0], "index_n_heads": gate.shape[0]}
    model_config = GlmMoeDsaConfig(
        **shapes, architectures=["GlmMoeDsaForCausalLM"], vocab_size=128, intermediate_size=128,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=128,
        qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=1, index_topk=16,
    )  # fmt: skip
    model = GlmMoeDsaForCausalLM(model_config).bfloat16().eval()
    indexer = model.model.layers[0].self_attn.indexer
    indexer.wk.weight.data, indexer.weights_proj.weight.data = wk, gate
    mtq.quantize(model, config, lambda model: model(torch.arange(64)[None]))
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=path)


def modelopt(kind, index=(), k_per_element=1, **keywords):
    def read(tensors):
        codes, scale = tensors["weight"], tensors["weight_scale"][index]
        if "weight_scale_2" in tensors:
            scale, keywords["double_scale"] = scale.double(), tensors["weight_scale_2"].double()
        shape = torch.Size((codes.shape[0], k_per_element * codes.shape[1]))
        return kind(shape, torch.bfloat16, codes).dequantize(dtype=torch.float64, scale=scale, **keywords)

    return read


def flattened(weight):
    """As torchao's checkpoints name the parts of a tensor."""
    tensors, _ = flatten_tensor_state_dict({"wk.weight": weight})
    return {name.removeprefix("wk."): tensor for name, tensor in tensors.items()}


def torchao_float8(weight):
    weight[1] = weight[0]  # of a row of zeros, it makes NaN
    module = torch.nn.Sequential(linear(weight))
    quantize_(module, Float8WeightOnlyConfig())
    return flattened(module[0].weight)


def each(convert, **options):
    """Writes a checkpoint of matrices that are converted one by one."""

    def write(path, *weights):
        tensors = {}
        for stem, weight in zip((WK, GATE), weights, strict=True):
            tensors |= {stem + leaf: tensor.contiguous() for leaf, tensor in convert(weight, **options).items()}
        write_checkpoint(path, tensors)

    return write


def _compressed(encoding, width, k, preset, rtol=0):
    return Format(each(compress, preset=preset), partial(decode, preset=preset), encoding, width, k, rtol)


def _exported(encoding, width, k, config, read):
    return Format(partial(export, config=config), read, encoding, width, k)


# The reciprocal of the divisor is rounded to fp32, which is within 2**-24; the library's quotient in fp64 adds 2**-53.
DIVISOR = 2**-24 + 2**-50
WHOLE = 512  # wider than any row
AWQ = {**mtq.INT4_AWQ_CFG, "algorithm": {"method": "awq_lite", "alpha_step": 0.5}}  # a short search
NVFP4, MXFP4 = (modelopt(kind, (), 2, block_sizes={-1: n}) for kind, n in ((NVFP4QTensor, 16), (MXFP4QTensor, 32)))

FORMATS = {
    "compressed-tensors NVFP4A16": _compressed("NVFP4 (divisor)", 16, 400, "NVFP4A16", DIVISOR),
    "compressed-tensors FP8": _compressed("FP8 per tensor", WHOLE, 420, "FP8"),
    "compressed-tensors FP8_DYNAMIC": _compressed("FP8 per row", WHOLE, 420, "FP8_DYNAMIC"),
    "compressed-tensors FP8_BLOCK": _compressed("FP8 128x128", 128, 420, "FP8_BLOCK"),
    "compressed-tensors MXFP4A16": _compressed("MXFP4", 32, 416, "MXFP4A16"),
    "compressed-tensors MXFP8A16": _compressed("MXFP8", 32, 416, "MXFP8A16"),
    "compressed-tensors W4A16": _compressed("INT4", 128, 384, "W4A16"),
    "compressed-tensors W4A16_ASYM": _compressed("INT4", 128, 384, "W4A16_ASYM"),
    "ModelOpt NVFP4": _exported("NVFP4", 16, 400, mtq.NVFP4_DEFAULT_CFG, NVFP4),
    "ModelOpt FP8": _exported("FP8 per tensor", WHOLE, 420, mtq.FP8_DEFAULT_CFG, modelopt(FP8QTensor)),
    "ModelOpt FP8_PC_PT": _exported(
        "FP8 per row", WHOLE, 420, mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG, modelopt(FP8QTensor, (slice(None), None))
    ),
    "ModelOpt FP8_PB_WO": _exported(
        "FP8 128x128", 128, 420, mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
        modelopt(FP8QTensor, (slice(None), 0, slice(None), 0), block_sizes={-1: 128, -2: 128}),
    ),
    "ModelOpt MXFP8": _exported("MXFP8", 32, 416, mtq.MXFP8_DEFAULT_CFG, modelopt(MXFP8QTensor)),
    "ModelOpt MXFP4": _exported("MXFP4", 32, 416, mtq.MXFP4_DEFAULT_CFG, MXFP4),
    "torchao Float8WeightOnly": Format(
        each(torchao_float8), lambda tensors: tensors["_weight_qdata"].double() * tensors["_weight_scale"].double(),
        "FP8 per row (torchao)", WHOLE, 420,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_format(tmp_path, name):
    form = FORMATS[name]
    form.write(tmp_path, *(uneven(n, form.k, form.width) for n in (192, 20)))
    (file,) = tmp_path.glob("*.safetensors")
    stored, plan, weights = load_file(file), Plan.of(Checkpoint(tmp_path)).layers[0], load(tmp_path)[0]
    for stem, planned, matrix in ((WK, plan.wk, weights.wk), (GATE, plan.gate, weights.gate)):
        assert planned.encoding.name == form.encoding
        expected = form.decode({name.removeprefix(stem): stored[name] for name in stored if name.startswith(stem)})
        assert expected.isfinite().all()
        assert expected.count_nonzero() > expected.numel() / 2
        expected = expected.bfloat16().double() if form.encoding == "INT4" else expected
        torch.testing.assert_close(matrix.dequantize(torch.float64), expected, rtol=form.rtol, atol=0)


REFUSED = {
    # Its words look like twice as many 4-bit integers in groups of 256; only the shape tells.
    "compressed-tensors W8A16": (each(compress, preset="W8A16"), "weight_shape"),
    "compressed-tensors W8A8": (each(compress, preset="W8A8"), "weight"),
    "compressed-tensors MXFP6A16": (each(compress, preset="MXFP6A16"), "weight_scale"),
    "ModelOpt W4A8_NVFP4_FP8": (partial(export, config=mtq.W4A8_NVFP4_FP8_CFG), "weight_scale"),
    "ModelOpt INT4_AWQ": (partial(export, config=AWQ), "weight_scale"),
    # Its scales may be in a GEMM library's order.
    "torchao MXTensor": (each(lambda w: flattened(MXTensor.to_mx(w, torch.float8_e4m3fn, 32))), "_weight_scale"),
}


@pytest.mark.parametrize(("write", "leaf"), REFUSED.values(), ids=REFUSED)
def test_unsupported_formats(tmp_path, write, leaf):
    write(tmp_path, uneven(128, 256, 128), uneven(32, 256, 128))
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path)
    assert {WK + leaf, GATE + leaf} <= {problem.subject for problem in caught.value.problems}
