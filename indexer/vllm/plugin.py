"""Puts the projection into vLLM, in place of what wk_weights_proj computes.

vLLM calls `register` in every process, before there is a model. So this module imports neither vLLM's models nor the
kernels; swapping does. If anything in vLLM is unexpected, nothing changes. See docs/upstream.md.
"""

import ast
import functools
import importlib.metadata
import inspect
import logging
import os
import re
import textwrap
from types import MethodType
from typing import Any

LOGGER = logging.getLogger("vllm.indexproj")  # below "vllm", so that it gets vLLM's handlers
GLM5NEXT = "vllm.models.glm5next.common.attention.Indexer"  # of GLM-5.3-Flash
# The classes that own a wk_weights_proj.
INDEXERS = (
    "vllm.model_executor.models.deepseek_v2.Indexer", "vllm.models.deepseek_v32.attention.DeepseekV32Indexer",
    "vllm.models.hy_v4.nvidia.attention.Indexer", GLM5NEXT,
)  # fmt: skip
# The modules whose load_weights is known to number layers as the checkpoint does.
MODEL_FILES = (
    "vllm.model_executor.models.deepseek_v2", "vllm.model_executor.models.deepseek_mtp",
    "vllm.models.deepseek_v32.nvidia.mtp", "vllm.models.deepseek_v32.amd.mtp", "vllm.models.hy_v4.nvidia.mtp",
    "vllm.models.hy_v4.nvidia.model", "vllm.models.hy_v4.amd.model", "vllm.models.dots3_note.nvidia.multimodal",
    "vllm.models.glm5next.common.model", "vllm.models.glm5next.common.mtp",
    "vllm.model_executor.models.glm4_1v",  # Glm5NextForConditionalGeneration inherits its load_weights
)  # fmt: skip
# In GLM5NEXT.forward, which computes the gate once more, in fp32, from a copy of its weights that no reload renews.
TWO_GEMMS = """
kw, _ = self.wk_weights_proj(hidden_states)
k = kw[:, :self.head_dim]
if self._wp_fp32 is None:
    self._wp_fp32 = self.wk_weights_proj.weight.data[self.head_dim:, :].t().contiguous().float()
weights = torch.mm(hidden_states.float(), self._wp_fp32)
"""
ONE_LAUNCH = "k, weights = self.wk_weights_proj.quant_method.k_and_gate(self.wk_weights_proj, hidden_states)"


class UnexpectedError(Exception):
    """Something in vLLM differs from what the patches were written for."""


def register() -> None:
    """Entry point of `vllm.general_plugins`, called any number of times. Raises ValueError for an unknown switch."""
    switch = os.environ.get("INDEXPROJ_VLLM", "1")
    if switch not in ("0", "1", "bf16"):
        raise ValueError(f"INDEXPROJ_VLLM: expected 0 (off), 1 (on) or bf16 (on, decodes to bf16), got {switch!r}")
    if switch == "0":
        return
    try:
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        from vllm.model_executor.model_loader.reload import layerwise

        for function, expected in (
            (BaseModelLoader.create_model, ["self", "vllm_config", "model_config", "prefix"]),
            (layerwise.finalize_layerwise_processing, ["model", "model_config"]),
            (layerwise.get_layerwise_info, ["layer"]),
        ):
            if (found := list(inspect.signature(function).parameters)) != expected:
                raise UnexpectedError(f"{function.__qualname__}: expected the arguments {expected}, found {found}")
    except (UnexpectedError, AttributeError, ImportError) as error:
        _warn(error)
        return
    if not hasattr(BaseModelLoader.create_model, "is_indexproj"):
        patch(BaseModelLoader, layerwise, to_bf16=switch == "bf16")


def patch(loader: Any, layerwise: Any, to_bf16: bool) -> None:
    """Wraps what creates a model, to swap projections before weights are loaded, and what ends a reload."""
    create, finalize = loader.create_model, layerwise.finalize_layerwise_processing

    @functools.wraps(create)
    def create_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        model = create(self, vllm_config, model_config, prefix)
        swap(model, vllm_config, model_config, to_bf16)
        return model

    @functools.wraps(finalize)
    def finalize_layerwise_processing(model: Any, model_config: Any) -> None:
        swapped = getattr(model, "indexproj", None)  # an IndexerModel
        try:
            for module in swapped.finish() if swapped else ():
                # or vLLM warns that nothing was written to the layer
                layerwise.get_layerwise_info(module).load_numel_total = 0
        finally:  # an error is raised after vLLM has ended the reload
            finalize(model, model_config)

    create_model.is_indexproj = True  # type: ignore[attr-defined]
    loader.create_model, layerwise.finalize_layerwise_processing = create_model, finalize_layerwise_processing


def swap(model: Any, vllm_config: Any, model_config: Any, to_bf16: bool) -> None:
    """Swaps all projections of a model, or none and logs why. Does nothing to a model without a projection."""
    owned = [name for name, _ in model.named_modules() if name.endswith(".indexer.wk_weights_proj")]
    indexers = {name: model.get_submodule(name.rpartition(".")[0]) for name in owned}
    if not indexers:
        return
    try:
        if reason := _unsupported(model, vllm_config, indexers):
            LOGGER.info("indexproj leaves the indexer projections to vLLM: %s", reason)
            return
        glm5next = [indexer for indexer in indexers.values() if GLM5NEXT in class_names(indexer)]
        forwards = {indexer: MethodType(glm5next_forward(type(indexer).forward), indexer) for indexer in glm5next}
        from vllm import envs

        from ...loading.config import Config
        from .method import IndexerMethod
        from .model import IndexerModel

        layers = model_config.hf_text_config.num_hidden_layers  # of a multimodal model, wherever it is nested
        config = Config.of({**model_config.hf_config.to_dict(), "num_hidden_layers": layers})
        # A rank that joins gets dummy weights, then the tensors of another rank in order: both need one layout.
        to_bf16 = to_bf16 or vllm_config.parallel_config.enable_elastic_ep
        names = {layer_of(name): name for name in indexers}
        swapped = IndexerModel(model, names, config, to_bf16, envs.VLLM_BATCH_INVARIANT)
    except (UnexpectedError, AttributeError, ImportError, OSError) as error:
        _warn(error)
        return
    model.indexproj, swapped.compile_key = swapped, vllm_config.additional_config
    for layer in swapped.layers.values():
        layer.module.quant_method = IndexerMethod(layer, swapped)
    for indexer, forward in forwards.items():
        indexer.forward = forward
    # For LoRA only: trainers read the mapping to find `.weight`. GLM-5.3-Flash's forward would bypass an adapter.
    mapping = getattr(model, "packed_modules_mapping", None)
    if mapping is not None and vllm_config.lora_config and not forwards:
        model.packed_modules_mapping = {"wk_weights_proj": ["wk", "weights_proj"], **mapping}


@functools.cache
def glm5next_forward(original: Any) -> Any:
    """Compiles GLM5NEXT.forward with ONE_LAUNCH in place of TWO_GEMMS.

    Raises UnexpectedError if it does not have them, and OSError if its source is missing.
    """
    names: dict[str, Any] = {}
    source = one_launch(textwrap.dedent(inspect.getsource(original)))
    exec(compile(source, "<string>", "exec"), original.__globals__, names)  # a file name would be read, for a cache key
    return names["forward"]


def one_launch(source: str) -> str:
    """Replaces TWO_GEMMS by ONE_LAUNCH in the source of a function. Raises UnexpectedError if it does not have them."""
    found, wanted = (ast.unparse(ast.parse(text)) + "\n" for text in (source, TWO_GEMMS))
    statements = textwrap.indent(wanted, "    ")
    if statements not in found:
        raise UnexpectedError(f"{GLM5NEXT}.forward: expected the statements\n{wanted}")
    return found.replace(statements, f"    {ONE_LAUNCH}\n")


def class_names(module: Any) -> list[str]:
    """The full names of the module's class and of those that it inherits from."""
    return [f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__]


def layer_of(name: str) -> Any:
    """The layer index in the name of a module; None if it has none."""
    found = re.findall(r"\blayers\.(\d+)\.", name)
    return int(found[-1]) if found else None


def _unsupported(model: Any, vllm_config: Any, indexers: dict[str, Any]) -> str | None:
    """Why the kernels should not serve a model, or None. Raises UnexpectedError if vLLM built it in an unknown way."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, UnquantizedLinearMethod

    from ...kernels.target import target_of

    if len(set(map(layer_of, indexers)) - {None}) < len(indexers):
        raise UnexpectedError(f"expected one indexer per layer, found {', '.join(indexers)}")
    for name, indexer in indexers.items():
        if not set(INDEXERS) & set(class_names(indexer)):
            raise UnexpectedError(f"{name} is in a {type(indexer)}, expected one of {', '.join(INDEXERS)}")
        layer = indexer.wk_weights_proj
        method = getattr(layer, "quant_method", None)
        rows = [indexer.head_dim, indexer.n_head]
        expected = {"output_sizes": rows, "bias": None, "skip_bias_add": False, "return_bias": True, "tp_size": 1}
        found = {attribute: getattr(layer, attribute, "none") for attribute in expected}
        is_linear = type(layer) is MergedColumnParallelLinear and isinstance(method, UnquantizedLinearMethod)
        if not is_linear or found != expected:
            raise UnexpectedError(
                f"{name}: expected an unquantized MergedColumnParallelLinear with {expected}, "
                f"found {type(layer).__name__} with {type(method).__name__} and {found}"
            )
        if str(layer.weight.dtype) != "torch.bfloat16":
            return f"the model is in {layer.weight.dtype}, expected torch.bfloat16"
        if type(method) is not UnquantizedLinearMethod:
            return f"{name} has {type(method).__name__}, which vLLM has tuned for this GPU"
        try:
            target_of(layer.weight.device)
        except RuntimeError as error:
            return f"{name} is on {layer.weight.device}, maybe because its weights are offloaded: {error}"
    if not isinstance(vllm_config.additional_config, dict):
        return "additional_config is not a dict, so vLLM's compile cache would mix up code with and without the kernels"
    if (file := model.load_weights.__module__) not in MODEL_FILES:
        return f"the load_weights of {type(model).__name__} is from {file}, expected one of {', '.join(MODEL_FILES)}"
    return None


def _warn(error: Exception) -> None:
    import vllm

    ours, theirs = importlib.metadata.version("indexproj"), getattr(vllm, "__version__", "of unknown version")
    LOGGER.warning("indexproj %s does not support vLLM %s and leaves its indexers alone: %s", ours, theirs, error)
