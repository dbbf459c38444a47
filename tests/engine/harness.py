"""Runs vLLM's models on a CPU.

Replaces only what vLLM lacks there: the choice of a backend for sparse attention (the CPU's MLA backend serves),
`indexer_op` (a recorder), and the quantization of the query, which is a Triton kernel.
"""

import contextlib
import importlib.machinery
import os
import sys
import tempfile
from unittest import mock

from engine.checkpoints import Q_RANK, K, M, checkpoint, is_projection, write  # before vLLM: sets the environment

# isort: split
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import destroy_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader, reload
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

from indexproj.indexer.vllm import plugin as vllm_plugin

MTP = {"method": "mtp", "num_speculative_tokens": 1}


def engine_config(path, **arguments):
    defaults = {
        "enforce_eager": True,
        "enable_prefix_caching": False,  # or vLLM decides by what the CPU can do, too late for GLM-5.3-Flash
        "max_model_len": 128,
        "max_num_batched_tokens": 128,
        "use_tqdm_on_load": False,
    }
    arguments = {**defaults, **arguments}
    return EngineArgs(model=str(path), skip_tokenizer_init=True, dtype="bfloat16", **arguments).create_engine_config()


@contextlib.contextmanager
def missing_modules():
    """Stands in for modules that GLM-5.3-Flash and dots3-note import and a CPU build lacks."""
    names = ["torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.v2"]
    names += ["vllm.third_party.deep_gemm", "vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"]
    stubs = {name: mock.MagicMock(__path__=[], __spec__=importlib.machinery.ModuleSpec(name, None)) for name in names}
    functions = "compile_flash_attn_varlen_func_from_specs", "flash_attn_varlen_func", "get_scheduler_metadata"
    missing = {name: mock.MagicMock() for name in functions if not hasattr(fa_utils, name)}
    with mock.patch.dict(sys.modules, stubs), mock.patch.multiple(fa_utils, create=True, **missing):
        yield


@contextlib.contextmanager
def sparse_attention():
    """Has the CPU's MLA backend serve as the one for sparse attention, which is missing there."""
    original = CpuPlatform.get_attn_backend_cls.__func__

    def choose(cls, selected_backend, attn_selector_config, num_heads=None):
        if attn_selector_config.use_sparse:
            return AttentionBackendEnum.CPU_MLA.get_path()
        return original(cls, selected_backend, attn_selector_config, num_heads)

    with mock.patch.object(CpuPlatform, "get_attn_backend_cls", classmethod(choose)):
        yield


@contextlib.contextmanager
def cpu_worker(rank=0, world_size=1, file=None):
    """What vLLM's CPU worker does before it loads a model."""
    _set_torch_accelerator_to_noop()
    with sparse_attention(), tempfile.TemporaryDirectory() as directory:
        file = file or f"{directory}/rendezvous"
        os.environ["VLLM_DIST_IDENT"] = file.replace("/", "-")
        init_distributed_environment(world_size, rank, f"file://{file}", rank, "gloo")
        with model_parallel():
            yield


@contextlib.contextmanager
def model_parallel(tensor_parallel_size=1, pipeline_parallel_size=1):
    """Groups of ranks, in place of those there are."""
    destroy_model_parallel()
    with set_current_vllm_config(VllmConfig()):
        initialize_model_parallel(tensor_parallel_size, pipeline_parallel_size)
    yield


@contextlib.contextmanager
def plugin(switch):
    """Registers the plugin, which "0" turns off, and removes its patches on exit."""
    loader, layerwise = BaseModelLoader, reload.layerwise
    before = loader.create_model, layerwise.finalize_layerwise_processing
    with mock.patch.dict(os.environ, {"INDEXPROJ_VLLM": switch}):
        try:
            vllm_plugin.register()
            yield
        finally:
            loader.create_model, layerwise.finalize_layerwise_processing = before


@contextlib.contextmanager
def environment(config):
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        yield


class Created:
    """A model before its weights are loaded."""

    def __init__(self, path, switch="1"):
        self.config = engine_config(path)
        self.loader = get_model_loader(self.config.load_config)
        with plugin(switch), environment(self.config):
            self.model = self.loader.create_model(self.config, self.config.model_config)

    def load(self):
        with environment(self.config):
            self.loader.load_weights(self.model, self.config.model_config)

    def process(self):
        """Ends the load."""
        with environment(self.config):
            process_weights_after_loading(self.model, self.config.model_config, torch.device("cpu"))


def build(path, switch="1", draft=False, **arguments):
    """A model that vLLM's own loader has loaded and processed."""
    return load_model(engine_config(path, **arguments, **({"speculative_config": MTP} if draft else {})), switch, draft)


def load_model(config, switch="1", draft=False):
    config.compilation_config.static_forward_context.clear()
    model_config = config.speculative_config.draft_model_config if draft else config.model_config
    with plugin(switch), set_current_vllm_config(config):
        return get_model_loader(config.load_config).load_model(config, model_config)


class Server:
    """A model with weights of one encoding, as a worker holds it while it serves."""

    def __init__(self, path, makers, switch="1", **arguments):
        tensors, self.truth = checkpoint(makers)
        self.makers = makers
        self.config = engine_config(write(path, tensors), **arguments)
        self.model = load_model(self.config, switch)
        self.pointers = self.addresses()

    def addresses(self):
        return {name: p.data_ptr() for name, p in self.model.named_parameters() if "wk_weights_proj" in name}

    def reload(self, tensors, is_checkpoint_format=True):
        """vLLM's own reload."""
        with plugin("1"), environment(self.config):
            reload_weights(self.config, self.model, tensors.items(), None, is_checkpoint_format)

    def fill(self, byte):
        """Overwrites the projections, like a sleep that gives the memory of all parameters away and takes it back."""
        for module in projections(self.model).values():
            for parameter in module.parameters():
                parameter.data.view(torch.uint8).fill_(byte)

    def check(self, truth):
        """It computes with these values, at the addresses that CUDA graphs would hold."""
        assert_outputs(self.model, truth)
        assert self.addresses() == self.pointers
        for layer in self.model.indexproj.layers.values():
            used = (*layer.operands.wk.tensors, *layer.operands.gate.tensors)
            assert set(map(storage, used)) == set(map(storage, layer.module.parameters()))


def projections(model):
    """Layer index -> module wk_weights_proj."""
    found = {name: module for name, module in model.named_modules() if name.endswith("indexer.wk_weights_proj")}
    return {vllm_plugin.layer_of(name): module for name, module in found.items()}


class Recorder(torch.nn.Module):
    """In place of an indexer_op: keeps its inputs (q, k, weights)."""

    def forward(self, hidden_states, q, k, weights, **kwargs):
        self.inputs = q, k, weights
        return q


def per_token_group_quant_fp8(x, group_size, column_major_scales=False, use_ue8m0=True):
    """e4m3 codes and a scale per group, the least power of two for which the group fits."""
    assert x.shape[-1] == group_size
    assert use_ue8m0
    assert not column_major_scales
    amax = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = torch.exp2((amax / 448).log2().ceil())
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def indexer_inputs(indexer, *arguments, quantizer=("per_token_group_quant_fp8", per_token_group_quant_fp8), seed=0):
    """What Indexer.forward passes to indexer_op: q, k, weights."""
    file, recorder = sys.modules[type(indexer).forward.__module__], Recorder()
    with (
        mock.patch.object(file, *quantizer),
        mock.patch.dict(indexer._modules, {"indexer_op": recorder}),
        torch.no_grad(),
    ):
        indexer(*activations(seed), *arguments)
    return recorder.inputs


def activations(seed=0):
    """x, the query's latent and the positions of M tokens."""
    generator = torch.Generator().manual_seed(seed)
    x, qr = (torch.randn(M, n, generator=generator).bfloat16() for n in (K, Q_RANK))
    return x, qr, torch.arange(M)


def like(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


def assert_close(found, expected, tolerance):
    """Within `tolerance` of the largest expected value."""
    expected = expected.double()
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def assert_outputs(model, truth):
    """Every wk_weights_proj against fp64; truth is layer index -> [D + H, K]."""
    x, *_ = activations()
    for layer, module in projections(model).items():
        assert_close(module(x)[0], x.double() @ truth[layer].T, 2**-8)


def assert_neighbors_equal(stock, swapped):
    """All modules, buffers and parameters but those of the projections are the same, bit by bit."""
    assert [type(module) for module in stock.modules()] == [type(module) for module in swapped.modules()]
    theirs, ours = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (stock, swapped))
    names = [name for name in theirs if not is_projection(name)]
    assert names == [name for name in ours if not is_projection(name)]
    for name in names:
        assert like(theirs[name]) == like(ours[name]), name
        assert torch.equal(bits(theirs[name]), bits(ours[name])), name


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_indexer_inputs_agree(stock, swapped):
    """q is the same, k and weights agree up to bf16: vLLM rounds their weights, or their sums in another order."""
    for layer in projections(swapped):
        attentions = (model.model.layers[layer].self_attn for model in (stock, swapped))
        theirs, ours = (indexer_inputs(each.indexer, each.indexer_rope_emb, seed=layer) for each in attentions)
        assert torch.equal(bits(theirs[0]), bits(ours[0]))
        for found, expected in zip(ours[1:], theirs[1:], strict=True):
            assert like(found) == like(expected)
            assert_close(found, expected, 2**-7)


# Arguments of build, and the layers of each of two ranks.
SIZES = ({"tensor_parallel_size": 2}, [0, 1], [0, 1]), ({"pipeline_parallel_size": 2}, [0], [1])


def run_rank(rank, path, rendezvous, truth):
    """In a spawned process: loads this rank's part of the model from the whole checkpoint."""
    torch.set_num_threads(1)
    with cpu_worker(rank, 2, rendezvous):
        for sizes, *layers in SIZES:
            with model_parallel(**sizes):
                for switch in ("0", "1"):
                    model = build(path, switch, **sizes, distributed_executor_backend="mp")
                    assert list(projections(model)) == layers[rank]
                    assert hasattr(model, "indexproj") == (switch == "1")
                assert_outputs(model, truth)
                torch.distributed.barrier()
