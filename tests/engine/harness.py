"""Runs vLLM's models on a CPU. `stand_ins` has what a CPU build of vLLM lacks; all else is vLLM's own."""

import contextlib
import importlib.machinery
import os
import re
import sys
import zlib
from unittest import mock

# Before vLLM: sets the environment.
from engine.checkpoints import Q_RANK, K, M, checkpoint, only_projections, write

# isort: split
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.inplace import reload_weights
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.platforms import PlatformEnum
from vllm.utils.torch_utils import set_default_torch_dtype
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
    mla = classmethod(lambda *_, **__: "vllm.v1.attention.backends.mla.cpu_mla.CPUMLABackend")
    kernels = "vllm.model_executor.kernels.linear._POSSIBLE_FP8_BLOCK_KERNELS"
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch.multiple("vllm.v1.attention.backends.fa_utils", create=True, **dict.fromkeys(names, mock.DEFAULT)),
        mock.patch("vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls", mla),
        mock.patch.dict(kernels, {PlatformEnum.CPU: [TorchKernel]}),
    ):
        yield


@contextlib.contextmanager
def cpu_worker(rendezvous, rank=0, world_size=1):
    """What vLLM's CPU worker does before it loads a model. rendezvous: a file that does not exist."""
    _set_torch_accelerator_to_noop()
    os.environ["VLLM_DIST_IDENT"] = f"{rendezvous}".replace("/", "-")
    parallel_state.init_distributed_environment(world_size, rank, f"file://{rendezvous}", rank, "gloo")
    set_model_parallel()
    with stand_ins():
        yield


def set_model_parallel(tensor_parallel_size=1, pipeline_parallel_size=1):
    """Groups of ranks, in place of those there are."""
    parallel_state.destroy_model_parallel()
    with set_current_vllm_config(VllmConfig()):
        parallel_state.initialize_model_parallel(tensor_parallel_size, pipeline_parallel_size)


def engine_config(path, enable_elastic_ep=False, **arguments):
    config = EngineArgs(
        model=f"{path}", skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=128,
        max_num_batched_tokens=128, use_tqdm_on_load=False,
        enable_prefix_caching=False,  # or vLLM decides by what the CPU can do, too late for GLM-5.3-Flash
        **arguments,
    ).create_engine_config()  # fmt: skip
    config.parallel_config.enable_elastic_ep = enable_elastic_ep  # which needs several GPUs
    return config


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
        with (
            mock.patch.multiple(BaseModelLoader, create_model=BaseModelLoader.create_model),
            mock.patch.multiple(layerwise, finalize_layerwise_processing=layerwise.finalize_layerwise_processing),
            mock.patch.dict(os.environ, {"INDEXPROJ_VLLM": self.switch}),
            set_current_vllm_config(self.config),
            set_default_torch_dtype(torch.bfloat16),
        ):
            vllm_plugin.register()
            yield

    def load(self):
        with self.environment():
            self.loader.load_weights(self.model, self.model_config)

    def process(self):
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

    def update(self, tensors, *patterns):
        """What a trainer does: for each pattern, it sends the tensors of projections whose names match."""
        for pattern in patterns or [".*"]:
            found = {name: tensor for name, tensor in tensors.items() if re.fullmatch(pattern, name)}
            self.model.load_weights(only_projections(found).items())

    def reload(self, tensors, is_checkpoint_format=True):
        with self.environment():
            reload_weights(self.config, self.model, tensors.items(), None, is_checkpoint_format)

    def renew(self, act=reload, makers=None, to_bf16=False):
        """A new checkpoint arrives, by default in the first one's encodings."""
        tensors, truth = checkpoint(makers or self.makers)
        self.truth = {layer: rounded(values) if to_bf16 else values for layer, values in truth.items()}
        act(self, tensors)
        self.check()

    def check(self):
        """It computes with the true values, at the addresses that CUDA graphs would hold."""
        assert_outputs(self.model, self.truth)
        assert self.addresses() == self.pointers


def rounded(values):
    return values.bfloat16().double()


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
        torch.compiler.set_stance("force_eager"),  # vLLM's GEMMs cannot be garbage collected while torch.compile runs
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


def neighbors(model):
    """The classes of all modules, and the layout and bits of what they hold except in the projections."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {name: (like(tensor), zlib.crc32(bits(tensor).numpy())) for name, tensor in tensors.items()}
    return [type(module) for module in model.modules()], only_projections(found, False)


def assert_indexer_inputs_agree(stock, swapped):
    """q is the same, k and weights agree up to bf16: vLLM rounds their weights, or their sums in another order."""
    for layer in projections(swapped):
        attentions = (model.model.layers[layer].self_attn for model in (stock, swapped))
        theirs, ours = (indexer_inputs(each.indexer, getattr(each, "indexer_rope_emb", None)) for each in attentions)
        assert torch.equal(bits(theirs[0]), bits(ours[0]))
        for found, expected in zip(ours[1:], theirs[1:], strict=True):
            assert like(found) == like(expected)
            assert_close(found, expected, 2**-7)
