"""Runs vLLM's models on a CPU. `stand_ins` has what a CPU build of vLLM lacks; all else is vLLM's own."""

import contextlib
import importlib.machinery
import os
import sys
from unittest import mock

# Before vLLM: sets the environment.
from engine.checkpoints import Q_RANK, K, M, checkpoint, is_projection, only_projections, write

# isort: split
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import destroy_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.platforms import PlatformEnum
from vllm.platforms.cpu import CpuPlatform
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

from indexproj.indexer.vllm import plugin as vllm_plugin
from indexproj.kernels.formats import spread

MTP = {"method": "mtp", "num_speculative_tokens": 1}
# x and the query's latent of M tokens.
X, QR = (torch.randn(M, n, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (K, Q_RANK))


class TorchKernel(Fp8BlockScaledMMLinearKernel):
    """x in bf16, weights decoded: what vLLM's FP8 kernel for CPUs with AMX computes."""

    apply_input_quant = False

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    def apply_block_scaled_mm(self, A, B, As, Bs):
        return A.float() @ (B.float() * spread(Bs, (128, 128), B.shape)).T


def quantize(q, *args, **kwargs):
    """In place of the Triton kernels that quantize the query: the values, and a scale per row."""
    return q, q.float().abs().amax(-1, keepdim=True)


@contextlib.contextmanager
def stand_ins():
    """A backend for sparse attention, a block-scaled FP8 GEMM, modules of GLM-5.3-Flash and dots3-note."""
    names = ["torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.v2"]
    names += ["vllm.third_party.deep_gemm", "vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"]
    modules = {name: mock.MagicMock(__path__=[], __spec__=importlib.machinery.ModuleSpec(name, None)) for name in names}
    names = "compile_flash_attn_varlen_func_from_specs", "flash_attn_varlen_func", "get_scheduler_metadata"
    functions = {name: mock.MagicMock() for name in names if not hasattr(fa_utils, name)}
    mla = classmethod(lambda *_, **__: AttentionBackendEnum.CPU_MLA.get_path())
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.multiple(fa_utils, create=True, **functions),
        mock.patch.object(CpuPlatform, "get_attn_backend_cls", mla),
        mock.patch.dict(linear._POSSIBLE_FP8_BLOCK_KERNELS, {PlatformEnum.CPU: [TorchKernel]}),
    ):
        yield


@contextlib.contextmanager
def cpu_worker(rendezvous, rank=0, world_size=1):
    """What vLLM's CPU worker does before it loads a model. rendezvous: a file that does not exist."""
    _set_torch_accelerator_to_noop()
    os.environ["VLLM_DIST_IDENT"] = f"{rendezvous}".replace("/", "-")
    init_distributed_environment(world_size, rank, f"file://{rendezvous}", rank, "gloo")
    set_model_parallel()
    with stand_ins():
        yield


def set_model_parallel(tensor_parallel_size=1, pipeline_parallel_size=1):
    """Groups of ranks, in place of those there are."""
    destroy_model_parallel()
    with set_current_vllm_config(VllmConfig()):
        initialize_model_parallel(tensor_parallel_size, pipeline_parallel_size)


def engine_config(path, **arguments):
    defaults = {
        "skip_tokenizer_init": True, "dtype": "bfloat16", "enforce_eager": True, "max_model_len": 128,
        "max_num_batched_tokens": 128, "use_tqdm_on_load": False,
        "enable_prefix_caching": False,  # or vLLM decides by what the CPU can do, too late for GLM-5.3-Flash
    }  # fmt: skip
    return EngineArgs(model=f"{path}", **{**defaults, **arguments}).create_engine_config()


class Worker:
    """A model in vLLM's own loader, which creates, loads and processes it. With load=False, it is only created."""

    def __init__(self, path, switch="1", load=True, draft=False, config=None, **arguments):
        if draft:
            arguments["speculative_config"] = MTP
        self.config = config or engine_config(path, **arguments)
        self.model_config = self.config.speculative_config.draft_model_config if draft else self.config.model_config
        self.loader = get_model_loader(self.config.load_config)
        self.switch = switch
        with self.environment():
            self.model = self.loader.create_model(self.config, self.model_config).eval()
        if load:
            self.load()
            self.process()

    @contextlib.contextmanager
    def environment(self):
        """With the plugin, which "0" turns off, and without its patches afterwards."""
        patched = (BaseModelLoader, "create_model"), (layerwise, "finalize_layerwise_processing")
        with contextlib.ExitStack() as stack:
            for owner, name in patched:
                stack.enter_context(mock.patch.object(owner, name, getattr(owner, name)))
            stack.enter_context(mock.patch.dict(os.environ, {"INDEXPROJ_VLLM": self.switch}))
            stack.enter_context(set_current_vllm_config(self.config))
            stack.enter_context(set_default_torch_dtype(torch.bfloat16))
            vllm_plugin.register()
            yield

    def load(self):
        with self.environment():
            self.loader.load_weights(self.model, self.model_config)

    def process(self):
        """Ends the load."""
        with self.environment():
            process_weights_after_loading(self.model, self.model_config, torch.device("cpu"))


class Server(Worker):
    """A worker with a new checkpoint, while it serves. truth: layer index -> values [D + H, K] fp64."""

    def __init__(self, path, makers, switch="1", **arguments):
        tensors, self.truth = checkpoint(makers)
        super().__init__(write(path, tensors), switch, **arguments)
        self.makers, self.pointers = makers, self.addresses()

    def addresses(self):
        return {name: p.data_ptr() for name, p in self.model.named_parameters() if "wk_weights_proj" in name}

    def update(self, *calls):
        """What a trainer does. Returns the names that the last call returns."""
        for tensors in calls:
            loaded = self.model.load_weights(only_projections(tensors).items())
        return loaded

    def reload(self, tensors, is_checkpoint_format=True):
        """vLLM's own reload."""
        with self.environment():
            reload_weights(self.config, self.model, tensors.items(), None, is_checkpoint_format)

    def reload_and_check(self):
        tensors, self.truth = checkpoint(self.makers)
        self.reload(tensors)
        self.check()

    def check(self):
        """It computes with the true values, at the addresses that CUDA graphs would hold."""
        assert_outputs(self.model, self.truth)
        assert self.addresses() == self.pointers
        for layer in self.model.indexproj.layers.values():
            used = (*layer.operands.wk.tensors, *layer.operands.gate.tensors)
            parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.module.parameters()}
            assert {tensor.untyped_storage().data_ptr() for tensor in used} == parameters


def projections(model):
    """Layer index -> module wk_weights_proj."""
    found = {name: module for name, module in model.named_modules() if name.endswith("indexer.wk_weights_proj")}
    return {vllm_plugin.layer_of(name): module for name, module in found.items()}


def indexer_inputs(indexer, rope=None):
    """What Indexer.forward passes to indexer_op: q, k, weights."""
    file, recorder = sys.modules[type(indexer).forward.__module__], mock.MagicMock()
    quantizers = {"per_token_group_quant_fp8", "fwht128_quant_fp8"} & vars(file).keys()
    with (
        mock.patch.multiple(file, **dict.fromkeys(quantizers, quantize)),
        mock.patch.dict(indexer._modules, {"indexer_op": recorder}),
        torch.no_grad(),
    ):
        indexer(X, QR, torch.arange(M), rope)
    return recorder.call_args.args[1:4]


def like(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.stride()


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def assert_close(found, expected, tolerance):
    """Within `tolerance` of the largest expected value."""
    expected = expected.double()
    assert (found.double() - expected).abs().max() <= tolerance * expected.abs().max()


def assert_outputs(model, truth):
    """Every wk_weights_proj against fp64; truth is layer index -> [D + H, K]."""
    for layer, module in projections(model).items():
        assert_close(module(X)[0], X.double() @ truth[layer].T, 2**-8)


def assert_neighbors_equal(stock, swapped):
    """All modules, buffers and parameters but those of the projections are the same, bit by bit."""
    assert [type(module) for module in stock.modules()] == [type(module) for module in swapped.modules()]
    theirs, ours = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (stock, swapped))
    names = [name for name in theirs if not is_projection(name)]
    assert names == [name for name in ours if not is_projection(name)]
    for name in names:
        assert like(theirs[name]) == like(ours[name]), name
        assert torch.equal(bits(theirs[name]), bits(ours[name])), name


def assert_indexer_inputs_agree(stock, swapped):
    """q is the same, k and weights agree up to bf16: vLLM rounds their weights, or their sums in another order."""
    for layer in projections(swapped):
        attentions = (model.model.layers[layer].self_attn for model in (stock, swapped))
        theirs, ours = (indexer_inputs(each.indexer, each.indexer_rope_emb) for each in attentions)
        assert torch.equal(bits(theirs[0]), bits(ours[0]))
        for found, expected in zip(ours[1:], theirs[1:], strict=True):
            assert like(found) == like(expected)
            assert_close(found, expected, 2**-7)
