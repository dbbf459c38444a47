"""Tiny checkpoints with real tensor names, and the real models that vLLM makes of them on a CPU.

What vLLM lacks on a CPU is replaced here, and nothing else: the choice of a backend for sparse attention (the CPU's MLA
backend serves), `indexer_op` (a recorder), and the query's quantization, a Triton kernel there.
"""

# ruff: noqa: E402
import contextlib
import json
import logging
import os
import sys
import tempfile
import zlib
from pathlib import Path
from unittest import mock

# Before vLLM and Triton are imported:
os.environ["VLLM_PLUGINS"] = ""  # the plugin is switched on and off by hand
os.environ["TRITON_INTERPRET"] = "1"
sys.modules.setdefault("kernels", None)  # see tests/conftest.py; spawned processes do not read that

import torch
from safetensors.torch import save_file
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.config.logging import LoggingConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import configure_logging
from vllm.model_executor.model_loader import get_model_loader, reload
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

from indexproj.indexer.cli.synthetic import random_weight
from indexproj.indexer.vllm import plugin as vllm_plugin

M, K, D, H = 5, 256, 128, 16
HEADS, Q_RANK, KV_RANK, NOPE, ROPE, V, INNER, VOCAB = 2, 128, 64, 32, 64, 32, 128, 128
LAYERS = 2
INDEXER = "model.layers.{}.self_attn.indexer."

DEEPSEEK = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "torch_dtype": "bfloat16",
    "hidden_size": K,
    "index_head_dim": D,
    "index_n_heads": H,
    "index_topk": 64,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": Q_RANK,
    "kv_lora_rank": KV_RANK,
    "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE,
    "v_head_dim": V,
    "vocab_size": VOCAB,
    "intermediate_size": INNER,
    "moe_intermediate_size": INNER,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1000,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

HY_V4 = {
    **{key: value for key, value in DEEPSEEK.items() if not key.startswith(("rope", "first_k"))},
    "architectures": ["HYV4ForCausalLM"],
    "model_type": "hy_v4",
    "mlp_layer_types": ["dense"] * LAYERS,
    "layer_types": ["deepseek_sparse_attention"] * LAYERS,
    "indexer_types": ["full"] * LAYERS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "enable_ihc": False,
    "gated_mla": False,
    "learnable_sink": False,
    "pad_token_id": 0,
}


def value(name, *shape):
    """Values of its own for every name, the same ones in every run; around 1 where there is one dimension."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    return random_weight(*shape, generator).bfloat16()


def decoder_layer(prefix, has_indexer=True):
    """Name -> tensor of a layer with a dense MLP, as DeepSeek-V3.2 and GLM-5 name them."""
    shapes = {
        "self_attn.q_a_proj.weight": (Q_RANK, K),
        "self_attn.q_b_proj.weight": (HEADS * (NOPE + ROPE), Q_RANK),
        "self_attn.kv_a_proj_with_mqa.weight": (KV_RANK + ROPE, K),
        "self_attn.kv_b_proj.weight": (HEADS * (NOPE + V), KV_RANK),
        "self_attn.o_proj.weight": (K, HEADS * V),
        "self_attn.q_a_layernorm.weight": (Q_RANK,),
        "self_attn.kv_a_layernorm.weight": (KV_RANK,),
        "mlp.gate_proj.weight": (INNER, K),
        "mlp.up_proj.weight": (INNER, K),
        "mlp.down_proj.weight": (K, INNER),
        "input_layernorm.weight": (K,),
        "post_attention_layernorm.weight": (K,),
    }
    if has_indexer:
        shapes |= {
            "self_attn.indexer.k_norm.weight": (D,),
            "self_attn.indexer.k_norm.bias": (D,),
            "self_attn.indexer.weights_proj.weight": (H, K),
            "self_attn.indexer.wk.weight": (D, K),
            "self_attn.indexer.wq_b.weight": (H * D, Q_RANK),
        }
    return {f"{prefix}.{name}": value(f"{prefix}.{name}", *shape) for name, shape in shapes.items()}


def deepseek(layers=LAYERS, indexers=None):
    """All tensors of a BF16 checkpoint, one MTP layer included."""
    shapes = {"embed_tokens.weight": (VOCAB, K), "norm.weight": (K,)}
    tensors = {f"model.{name}": value(name, *shape) for name, shape in shapes.items()}
    tensors["lm_head.weight"] = value("lm_head.weight", VOCAB, K)
    for layer in range(layers + 1):
        tensors |= decoder_layer(f"model.layers.{layer}", indexers is None or layer in indexers or layer == layers)
    mtp = {
        "embed_tokens.weight": (VOCAB, K),
        "eh_proj.weight": (K, 2 * K),
        "enorm.weight": (K,),
        "hnorm.weight": (K,),
        "shared_head.head.weight": (VOCAB, K),
        "shared_head.norm.weight": (K,),
    }
    return tensors | {f"model.layers.{layers}.{name}": value(name, *shape) for name, shape in mtp.items()}


def hy_v4():
    """The same of HY-V4, whose MTP layer has another name and parts."""
    last = f"model.layers.{LAYERS}."
    tensors = {name.replace(last, "model.mtp_layers.0."): tensor for name, tensor in deepseek().items()}
    lost = ("mtp_layers.0.embed_tokens", "mtp_layers.0.shared_head")
    tensors = {name: tensor for name, tensor in tensors.items() if not any(part in name for part in lost)}
    return tensors | {"model.mtp_layers.0.final_layernorm.weight": value("final_layernorm", K)}


def with_projection(tensors, matrices):
    """The checkpoint with the tensors of its projections replaced.

    Args:
        matrices: stem of a layer's names -> the new tensors.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not is_projection(name)}
    stems = dict.fromkeys(name[: name.index("indexer.") + 8] for name in tensors if is_projection(name))
    for stem in stems:
        kept |= matrices(stem)
    return kept


def is_projection(name):
    return ".indexer.wk" in name or ".indexer.weights_proj" in name


def write(directory: Path, tensors, config=DEEPSEEK) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def engine_config(path, **arguments):
    defaults = {
        "enforce_eager": True,
        "enable_prefix_caching": False,  # or vLLM decides by what the CPU can do, too late for GLM-5.3-Flash
        "max_model_len": 128,
        "max_num_batched_tokens": 128,
        "use_tqdm_on_load": False,
    }
    arguments = {**defaults, **arguments}
    arguments = EngineArgs(model=str(path), skip_tokenizer_init=True, dtype="bfloat16", **arguments)
    return arguments.create_engine_config()


def show_log():
    """Passes vLLM's log on to pytest; configured before, as the first config that is created would undo that."""
    configure_logging(LoggingConfig())
    logging.getLogger("vllm").propagate = True


@contextlib.contextmanager
def cpu_worker(rank=0, world_size=1, file=None, tensor_parallel=1, pipeline_parallel=1):
    """What vLLM's worker for CPUs does before it loads a model, with the sparse backend that is missing there."""
    original = CpuPlatform.get_attn_backend_cls.__func__

    def choose(cls, selected_backend, attn_selector_config, num_heads=None):
        if attn_selector_config.use_sparse:
            return AttentionBackendEnum.CPU_MLA.get_path()
        return original(cls, selected_backend, attn_selector_config, num_heads)

    _set_torch_accelerator_to_noop()
    with (
        mock.patch.object(CpuPlatform, "get_attn_backend_cls", classmethod(choose)),
        tempfile.TemporaryDirectory() as d,
    ):
        file = file or f"{d}/rendezvous"
        os.environ["VLLM_DIST_IDENT"] = file.replace("/", "-")
        init_distributed_environment(world_size, rank, f"file://{file}", rank, "gloo")
        with set_current_vllm_config(VllmConfig()):
            initialize_model_parallel(tensor_parallel, pipeline_parallel)
        yield


@contextlib.contextmanager
def plugin(switch):
    """vLLM with the plugin registered, which "0" turns off; what was patched is put back."""
    before = BaseModelLoader.create_model, reload.layerwise.finalize_layerwise_processing
    with mock.patch.dict(os.environ, {"INDEXPROJ_VLLM": switch}):
        try:
            vllm_plugin.register()
            yield
        finally:
            BaseModelLoader.create_model, reload.layerwise.finalize_layerwise_processing = before


@contextlib.contextmanager
def environment(config):
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        yield


def create(path, switch="1", draft=False, model_class=None, **arguments):
    """A model before its weights are loaded, and its config."""
    config = engine_config(path, **arguments)
    model_config = config.speculative_config.draft_model_config if draft else config.model_config
    loader = get_model_loader(config.load_config)
    with plugin(switch), environment(config):
        return loader.create_model(config, model_config), config, loader, model_config


def build(path, switch="1", draft=False, **arguments):
    """A model with its weights, as vLLM's own loader loads and processes them."""
    config = engine_config(path, **arguments)
    model_config = config.speculative_config.draft_model_config if draft else config.model_config
    loader = get_model_loader(config.load_config)
    with plugin(switch), set_current_vllm_config(config):
        return loader.load_model(config, model_config)


def projections(model):
    """Layer index -> vLLM's module wk_weights_proj."""
    found = {name: module for name, module in model.named_modules() if name.endswith("indexer.wk_weights_proj")}
    return {vllm_plugin.layer_of(name): module for name, module in found.items()}


class Recorder(torch.nn.Module):
    """In place of an indexer_op: keeps what it is given (q, k, weights)."""

    def forward(self, hidden_states, q, k, weights, **kwargs):
        self.inputs = q, k, weights
        return q


def per_token_group_quant_fp8(x, group_size, column_major_scales=False, use_ue8m0=True):
    """e4m3 codes and a scale per group, the least power of two by which the group fits."""
    assert x.shape[-1] == group_size
    assert use_ue8m0
    assert not column_major_scales
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = torch.exp2((amax / 448).log2().ceil())
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def indexer_inputs(attention, x, qr, positions):
    """What Indexer.forward hands to indexer_op: q, k, weights."""
    indexer, file = attention.indexer, sys.modules[type(attention.indexer).forward.__module__]
    recorder = Recorder()
    with (
        mock.patch.object(file, "per_token_group_quant_fp8", per_token_group_quant_fp8),
        mock.patch.dict(indexer._modules, {"indexer_op": recorder}),
        torch.no_grad(),
    ):
        indexer(x, qr, positions, attention.indexer_rope_emb)
    return recorder.inputs


def activations(seed=0):
    """x, the query's latent and the positions of M tokens."""
    generator = torch.Generator().manual_seed(seed)
    x, qr = (torch.randn(M, n, generator=generator).bfloat16() for n in (K, Q_RANK))
    return x, qr, torch.arange(M)


def like(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


def outputs_are_right(model, truth):
    """Every wk_weights_proj of a model against fp64 of the weights, [D + H, K] by layer."""
    x, *_ = activations()
    for layer, module in projections(model).items():
        exact = x.double() @ truth[layer].T
        assert (module(x)[0].double() - exact).abs().max() <= 2**-8 * exact.abs().max()
