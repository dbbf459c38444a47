"""Checkpoints written by compressed-tensors, ModelOpt and torchao load as the values that these libraries decode.

Expected values come from the library's own unpacking and dequantization, in fp64 where it allows that.
"""

import math
from collections.abc import Callable
from functools import partial
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
from modelopt.torch.export.quant_utils import postprocess_state_dict
from modelopt.torch.export.unified_export_hf import _export_quantized_weight
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
    produce: Callable[[Tensor], dict[str, Tensor]]  # weight -> tensors by the last part of their names
    decode: Callable[[dict[str, Tensor]], Tensor]  # the library's reading of them, in fp64
    encoding: str
    width: int  # columns that share a scale
    k: int  # an unaligned K that the format allows
    rtol: float = 0


def linear(weight):
    module = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    module.weight.data = weight.clone()
    return module


def scheme_of(preset, changes):
    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.weights = scheme.weights.model_copy(update=changes)
    return scheme


def calibrate(module):
    """Sets scales and zero points like llm-compressor's min-max observer."""
    weight, args = module.weight.data, module.quantization_scheme.weights
    if args.strategy == "block":
        height, width = args.block_structure
        padded = maybe_pad_tensor_for_block_quant(weight, (height, width))
        groups, dims = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)), (1, 3)
    elif args.group_size:
        groups, dims = weight.unflatten(1, (-1, args.group_size)), (2,)
    else:
        groups, dims = weight, (0, 1) if args.strategy == "tensor" else (1,)
    shape = module.weight_scale.shape
    low, high = groups.amin(dims).view(shape), groups.amax(dims).view(shape)
    divisor = None
    if args.strategy == "tensor_group":
        divisor = module.weight_global_scale.data.copy_(generate_gparam(*weight.float().aminmax()))
    scale, zero_point = calculate_qparams(low, high, args, global_scale=divisor)
    module.weight_scale.data.copy_(scale)
    module.weight_zero_point.data.copy_(zero_point)


def compress(weight, preset, **changes):
    module = linear(weight)
    initialize_module_for_quantization(module, scheme_of(preset, changes))
    calibrate(module)
    compress_module(module)
    return dict(module.state_dict())


def decode(tensors, preset, **changes):
    args = scheme_of(preset, changes).weights
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


def export(weight, config):
    """The steps of `export_hf_checkpoint` for one Linear."""
    model = torch.nn.Sequential(linear(weight))
    mtq.quantize(model, config, lambda model: model(torch.randn(8, weight.shape[1], dtype=weight.dtype)))
    _export_quantized_weight(model[0], torch.bfloat16)
    tensors = postprocess_state_dict(model.state_dict(), 0, None)
    return {name.removeprefix("0."): tensor.contiguous() for name, tensor in tensors.items()}


def modelopt(kind, index=(), k_per_element=1, **keywords):
    def read(tensors):
        codes, scale = tensors["weight"], tensors["weight_scale"][index]
        if "weight_scale_2" in tensors:
            scale, keywords["double_scale"] = scale.double(), tensors["weight_scale_2"].double()
        shape = torch.Size((codes.shape[0], k_per_element * codes.shape[1]))
        return kind(shape, torch.bfloat16, codes).dequantize(dtype=torch.float64, scale=scale, **keywords)

    return read


def torchao_file(weight):
    return flattened(MXTensor.to_mx(weight, torch.float8_e4m3fn, 32))


def flattened(weight):
    """As torchao's checkpoints name the parts of a tensor."""
    tensors, _ = flatten_tensor_state_dict({"wk.weight": weight})
    return {name.removeprefix("wk."): tensor for name, tensor in tensors.items()}


def torchao_float8(weight):
    weight[1] = weight[0]  # of a row of zeros, it makes NaN
    module = torch.nn.Sequential(linear(weight))
    quantize_(module, Float8WeightOnlyConfig())
    return flattened(module[0].weight)


def torchao_float8_decode(tensors):
    return tensors["_weight_qdata"].double() * tensors["_weight_scale"].double()


def _compressed(encoding, width, k, preset, rtol=0, **changes):
    produce, read = (partial(function, preset=preset, **changes) for function in (compress, decode))
    return Format(produce, read, encoding, width, k, rtol)


def _exported(encoding, width, k, config, read):
    return Format(partial(export, config=config), read, encoding, width, k)


# The reciprocal of the divisor is rounded to fp32, which is within 2**-24; the library's quotient in fp64 adds 2**-53.
DIVISOR = 2**-24 + 2**-50
WHOLE = 512  # wider than any row
NVFP4 = modelopt(NVFP4QTensor, (), 2, block_sizes={-1: 16})
MXFP4 = modelopt(MXFP4QTensor, (), 2, block_sizes={-1: 32})

FORMATS = {
    "compressed-tensors NVFP4A16": _compressed("NVFP4 (divisor)", 16, 400, "NVFP4A16", DIVISOR),
    "compressed-tensors FP8": _compressed("FP8 per tensor", WHOLE, 420, "FP8"),
    "compressed-tensors FP8_DYNAMIC": _compressed("FP8 per row", WHOLE, 420, "FP8_DYNAMIC"),
    "compressed-tensors FP8_BLOCK": _compressed("FP8 128x128", 128, 420, "FP8_BLOCK"),
    "compressed-tensors MXFP4A16": _compressed("MXFP4", 32, 416, "MXFP4A16"),
    "compressed-tensors MXFP8A16": _compressed("MXFP8", 32, 416, "MXFP8A16"),
    "compressed-tensors W4A16": _compressed("INT4", 128, 384, "W4A16"),
    "compressed-tensors W4A16_ASYM": _compressed("INT4", 128, 384, "W4A16_ASYM"),
    "compressed-tensors W4A16_ASYM by row": _compressed(
        "INT4", WHOLE, 424, "W4A16_ASYM", strategy="channel", group_size=None
    ),
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
    "torchao Float8WeightOnly": Format(torchao_float8, torchao_float8_decode, "FP8 per row (torchao)", WHOLE, 420),
}  # fmt: skip


def write(path, wk, gate):
    tensors = {f"{stem}{leaf}": tensor for stem, leaves in ((WK, wk), (GATE, gate)) for leaf, tensor in leaves.items()}
    return write_checkpoint(path, {name: tensor.contiguous() for name, tensor in tensors.items()})


def check(plan, matrix, expected, form):
    assert (plan.encoding.name, plan.encoding.exact is None) == (form.encoding, form.encoding != "INT4")
    assert expected.isfinite().all()
    assert expected.count_nonzero() > expected.numel() / 2
    values = expected if plan.encoding.exact is None else expected.bfloat16().double()
    torch.testing.assert_close(matrix.dequantize(torch.float64), values, rtol=form.rtol, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_format(tmp_path, name):
    form = FORMATS[name]
    wk, gate = (form.produce(uneven(n, form.k, form.width)) for n in (192, 20))
    path = write(tmp_path, wk, gate)
    plan, weights = Plan.of(Checkpoint(path)).layers[0], load(path)[0]
    check(plan.wk, weights.wk, form.decode(wk), form)
    check(plan.gate, weights.gate, form.decode(gate), form)


REFUSED = {
    # Their words look like twice, or half, as many 4-bit integers in groups of 256, or 64; only the shape tells.
    "compressed-tensors W8A16": (partial(compress, preset="W8A16"), "weight_shape"),
    "compressed-tensors W2A16": (partial(compress, preset="W2A16"), "weight_shape"),
    "compressed-tensors W8A8": (partial(compress, preset="W8A8"), "weight"),
    "compressed-tensors MXFP6A16": (partial(compress, preset="MXFP6A16"), "weight_scale"),
    "ModelOpt W4A8_NVFP4_FP8": (partial(export, config=mtq.W4A8_NVFP4_FP8_CFG), "weight_scale"),
    "ModelOpt INT4_AWQ": (partial(export, config=mtq.INT4_AWQ_CFG), "weight_scale"),
    "torchao MXTensor": (torchao_file, "_weight_scale"),  # may be in a GEMM library's order
}


@pytest.mark.parametrize(("produce", "leaf"), REFUSED.values(), ids=REFUSED)
def test_unsupported_formats(tmp_path, produce, leaf):
    path = write(tmp_path, produce(uneven(128, 256, 128)), produce(uneven(32, 256, 128)))
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert {WK + leaf, GATE + leaf} <= {problem.subject for problem in caught.value.problems}


def glm(width):
    """A GLM-5 of two layers, as transformers builds it."""
    config = GlmMoeDsaConfig(
        architectures=["GlmMoeDsaForCausalLM"], vocab_size=128, hidden_size=256, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=128,
        qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=2,
        index_topk=16, index_head_dim=128, index_n_heads=32,
    )  # fmt: skip
    model = GlmMoeDsaForCausalLM(config).bfloat16().eval()
    for layer in model.model.layers:
        layer.self_attn.indexer.wk.weight.data = uneven(128, 256, width)
        layer.self_attn.indexer.weights_proj.weight.data = uneven(32, 256, width)
    return model


@pytest.mark.parametrize(
    ("name", "config"), [("NVFP4", mtq.NVFP4_DEFAULT_CFG), ("FP8_PB_WO", mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG)]
)
def test_model_exported_by_modelopt(tmp_path, name, config):
    """All layers of the checkpoint, against the library's reading of its tensors."""
    form = FORMATS[f"ModelOpt {name}"]
    model = mtq.quantize(glm(form.width), config, lambda model: model(torch.arange(64)[None]))
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=tmp_path)
    stored, layers = load_file(tmp_path / "model.safetensors"), load(tmp_path)
    assert list(layers) == [0, 1]
    for number, plan in Plan.of(Checkpoint(tmp_path)).layers.items():
        for stem, matrix, loaded in ((WK, plan.wk, layers[number].wk), (GATE, plan.gate, layers[number].gate)):
            stem = stem.replace("layers.0", f"layers.{number}")
            leaves = {name.removeprefix(stem): tensor for name, tensor in stored.items() if name.startswith(stem)}
            check(matrix, loaded, form.decode(leaves), form)
