"""Wrote the files beside it: wk of a small layer, packed by auto-round 0.16.1, llm-compressor 0.14.0, amd-quark 0.13.

Installing these takes minutes, so the files are kept. "original" is the weight that was packed; the metadata have
llm-compressor's quantization_config. Usage: python write.py {auto_round,quark,llm_compressor}
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE, N, K = Path(__file__).parent, 128, 128


def weight():
    torch.manual_seed(0)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.randn(N, K) * 0.02
    return linear


def write(name, tensors, config=None, **extra):
    tensors = {leaf: tensor.contiguous() for leaf, tensor in {**tensors, **extra}.items()}
    save_file(tensors, HERE / f"{name}.safetensors", config and {"quantization_config": json.dumps(config)})


def auto_round():
    from auto_round import schemes
    from auto_round.export.export_to_autoround import qlinear_fp, qlinear_int

    linear = weight()
    exponents = (linear.weight.detach().view(N, -1, 32).abs().amax(2)).log2().floor() - 2
    for name, module, scheme in (("mxfp4", qlinear_fp, schemes.MXFP4), ("mxint4", qlinear_int, schemes.MXINT4)):
        packed = module.QuantLinear(4, 32, K, N, bias=False, data_type=scheme["data_type"])
        packed.pack(linear, exponents, None)
        tensors = {"weight_packed": packed.weight_packed, "weight_scale": packed.weight_scale}
        write(f"auto_round_{name}", tensors, original=linear.weight.detach())


def quark():
    from quark.torch.kernel.float8_e5m3.reference import reference_convert_fp32_to_e5m3_bits

    scale = weight().weight.detach().view(N, -1, 32).abs().amax(2) / 6
    codes = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    write("quark_amdfp4", {"weight": codes, "weight_scale": reference_convert_fp32_to_e5m3_bits(scale).to(torch.uint8)})


def llm_compressor(directory="llm-compressor"):
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import QuIPModifier
    from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

    config = GlmMoeDsaConfig(
        vocab_size=128, hidden_size=K, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=128, qk_rope_head_dim=32, qk_nope_head_dim=32,
        v_head_dim=32, first_k_dense_replace=2, index_topk=16, index_head_dim=N, index_n_heads=32,
    )  # fmt: skip
    model = GlmMoeDsaForCausalLM(config).bfloat16()
    model.model.layers[0].self_attn.indexer.wk.weight.data = weight().weight.data.bfloat16()
    model.save_pretrained(f"{directory}/model")
    quip = QuIPModifier(rotations=["v"], transform_type="hadamard", ignore=["lm_head"])
    for name, scheme, first in (("mxfp4", "MXFP4A16", []), ("nvfp4", "NVFP4A16", []), ("quip", "MXFP4A16", [quip])):
        model = GlmMoeDsaForCausalLM.from_pretrained(f"{directory}/model", dtype=torch.bfloat16)
        recipe = [*first, QuantizationModifier(targets=["Linear"], scheme=scheme, ignore=["lm_head"])]
        oneshot(model=model, recipe=recipe)
        model.save_pretrained(f"{directory}/{name}", save_compressed=True)
        stem = "model.layers.0.self_attn.indexer.wk."
        tensors = load_file(f"{directory}/{name}/model.safetensors").items()
        written = {leaf.removeprefix(stem): tensor for leaf, tensor in tensors if leaf.startswith(stem)}
        config = json.loads(Path(f"{directory}/{name}/config.json").read_text())["quantization_config"]
        write(f"llm_compressor_{name}", written, config, original=weight().weight.detach().bfloat16())


if __name__ == "__main__":
    globals()[sys.argv[1]]()
