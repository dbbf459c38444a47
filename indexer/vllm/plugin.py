"""Puts the projection into vLLM, in place of what wk_weights_proj computes.

vLLM calls `register` in every process, before there is a model. So this module imports neither vLLM's models nor the
kernels; swapping does. If anything in vLLM is unexpected, nothing changes. See docs/upstream.md.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import logging
import os
import re
from types import MethodType
from typing import Any

from .glm5next import GLM5NEXT, UnexpectedError, glm5next_forward

LOGGER = logging.getLogger("vllm.indexproj")  # below "vllm", so that it gets vLLM's handlers
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


def register() -> None:
    """Entry point of `vllm.general_plugins`, called any number of times. Raises ValueError for an unknown switch."""
    switch = os.environ.get("INDEXPROJ_VLLM", "1")
    if switch not in ("0", "1", "bf16"):
        raise ValueError(f"INDEXPROJ_VLLM: expected 0 (off), 1 (on) or bf16 (on, decodes to bf16), got {switch!r}")
    if switch == "0":
        return
    try:
        loader, layerwise = find_patched()
    except (UnexpectedError, ImportError) as error:
        _warn(error)
    else:
        if not hasattr(loader.create_model, "is_indexproj"):
            patch_loaders(loader, to_bf16=switch == "bf16")
            patch_reload(layerwise)


def find_patched() -> tuple[Any, Any]:
    """Imports what `register` patches. Raises UnexpectedError or ImportError if it is not as the patches expect."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.model_executor.model_loader.reload import layerwise
    from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo

    for owner, name, arguments in (
        (BaseModelLoader, "__init__", ["self", "load_config"]),
        (BaseModelLoader, "create_model", ["self", "vllm_config", "model_config", "prefix"]),
        (layerwise, "finalize_layerwise_processing", ["model", "model_config"]),
        (layerwise, "get_layerwise_info", ["layer"]),
        (LayerReloadingInfo, "can_load", ["self"]),
    ):
        function = getattr(owner, name, None)
        found = list(inspect.signature(function).parameters) if callable(function) else "no such function"
        if found != arguments:
            raise UnexpectedError(f"{owner.__name__}.{name}: expected the arguments {arguments}, found {found}")
    return BaseModelLoader, layerwise


def patch_loaders(loader: Any, to_bf16: bool) -> None:
    """Wraps `BaseModelLoader.create_model`, to swap projections, and `__init__`, to warn of other load_models."""
    create, init = loader.create_model, loader.__init__

    @functools.wraps(create)
    def create_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        model = create(self, vllm_config, model_config, prefix)
        swap(model, vllm_config, model_config, to_bf16)
        return model

    @functools.wraps(init)
    def initialize(self: Any, load_config: Any) -> None:
        init(self, load_config)
        load = self.load_model

        @functools.wraps(load)
        def load_model(*args: Any, **kwargs: Any) -> Any:
            model = load(*args, **kwargs)
            if not hasattr(model, "indexproj") and indexers_of(model):
                model.indexproj, who = None, type(self).__name__
                LOGGER.warning("indexproj leaves the indexer projections to vLLM: %s does not call create_model", who)
            return model

        self.load_model = load_model

    create_model.is_indexproj = True  # type: ignore[attr-defined]
    loader.create_model, loader.__init__ = create_model, initialize


def patch_reload(layerwise: Any) -> None:
    """Wraps `layerwise.finalize_layerwise_processing`, the end of a reload. Raises after vLLM has ended it."""
    original = layerwise.finalize_layerwise_processing

    @functools.wraps(original)
    def finalize_layerwise_processing(model: Any, model_config: Any) -> None:
        swapped = getattr(model, "indexproj", None)  # an IndexerModel
        try:
            if swapped:
                swapped.finish()
        finally:
            for module in swapped.take_updated() if swapped else ():
                info = layerwise.get_layerwise_info(module)
                if info.can_load():
                    info.load_numel_total = 0  # or vLLM warns that nothing was written to the layer
            original(model, model_config)

    layerwise.finalize_layerwise_processing = finalize_layerwise_processing


def swap(model: Any, vllm_config: Any, model_config: Any, to_bf16: bool) -> None:
    """Swaps all projections of a model, or none and logs why. Does nothing to a model without a projection."""
    if not (indexers := indexers_of(model)):
        return
    model.indexproj = None
    try:
        if reason := _unsupported(model, vllm_config, indexers):
            LOGGER.info("indexproj leaves the indexer projections to vLLM: %s", reason)
            return
        glm5next = [name for name, indexer in indexers.items() if indexer_name(type(indexer)) == GLM5NEXT]
        forwards: dict[str, Any] = {name: glm5next_forward(indexers[name].__class__) for name in glm5next}
        from vllm import envs

        from .method import IndexerMethod
        from .model import IndexerModel

        names = {layer_of(name): f"{name}.wk_weights_proj" for name in indexers}
        text: dict[str, Any] = {}
        config = {"num_hidden_layers": getattr(model_config.hf_text_config, "num_hidden_layers", None)}
        config["text_config"] = text
        for values, source in ((text, "hf_text_config"), (config, "hf_config")):
            for key in ("quantization_config", "compression_config"):
                if (value := getattr(getattr(model_config, source, None), key, None)) is not None:
                    values[key] = value.to_dict() if hasattr(value, "to_dict") else value
        # A rank that joins gets dummy weights, then the tensors of another rank in order: both need one layout.
        to_bf16 = to_bf16 or vllm_config.parallel_config.enable_elastic_ep
        swapped = IndexerModel(model, names, config, to_bf16, envs.VLLM_BATCH_INVARIANT)
    except (UnexpectedError, AttributeError, ImportError) as error:
        _warn(error)
        return
    model.indexproj, swapped.compile_key = swapped, vllm_config.additional_config
    for layer in swapped.layers.values():
        layer.module.quant_method = IndexerMethod(layer, swapped)
    for name, forward in forwards.items():
        if forward:
            indexers[name].forward = MethodType(forward, indexers[name])
        else:
            LOGGER.info("indexproj keeps vLLM's forward of %s, which computes the gate once more, in fp32", name)
            indexers[name]._wp_fp32 = swapped.layers[layer_of(name)].copy_gate()
    # For LoRA only: trainers read the mapping to find `.weight`. GLM-5.3-Flash's forward would bypass an adapter.
    mapping = getattr(model, "packed_modules_mapping", None)
    if mapping is not None and vllm_config.lora_config and not forwards:
        model.packed_modules_mapping = {"wk_weights_proj": ["wk", "weights_proj"], **mapping}


def indexers_of(model: Any) -> dict[str, Any]:
    """Name -> module that owns a wk_weights_proj."""
    owned = [name for name, _ in model.named_modules() if name.endswith(".indexer.wk_weights_proj")]
    return {name.rpartition(".")[0]: model.get_submodule(name.rpartition(".")[0]) for name in owned}


def indexer_name(module_class: Any) -> str | None:
    """The entry of INDEXERS that a class is or inherits from; None for all other classes."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in module_class.__mro__)
    return next((name for name in names if name in INDEXERS), None)


def layer_of(name: str) -> Any:
    """The layer index in the name of a module or tensor; None if it has none."""
    found = re.findall(r"(?:^|\.)(?:mtp_)?layers\.(\d+)\.", name)
    return int(found[-1]) if found else None


def _unsupported(model: Any, vllm_config: Any, indexers: dict[str, Any]) -> str | None:
    """Why the kernels should not serve a model, or None. Raises UnexpectedError if vLLM built it in an unknown way."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, UnquantizedLinearMethod

    from ...kernels.dispatch import table_of
    from ...kernels.target import target_of

    if unknown := [f"{name} is a {type(i).__module__}" for name, i in indexers.items() if not indexer_name(type(i))]:
        raise UnexpectedError(f"{unknown[0]}, expected one of {', '.join(INDEXERS)}")
    if not isinstance(vllm_config.additional_config, dict):
        return "additional_config is not a dict, so vLLM's compile cache would mix up code with and without the kernels"
    if (file := model.load_weights.__module__) not in MODEL_FILES:
        return f"the load_weights of {type(model).__name__} is from {file}, expected one of {', '.join(MODEL_FILES)}"
    if len(set(map(layer_of, indexers)) - {None}) < len(indexers):
        raise UnexpectedError(f"expected one indexer per layer, found {', '.join(indexers)}")
    for name, indexer in indexers.items():
        layer, rows = indexer.wk_weights_proj, [indexer.head_dim, indexer.n_head]
        method, module = getattr(layer, "quant_method", None), f"{name}.wk_weights_proj"
        expected = {"output_sizes": rows, "bias": None, "skip_bias_add": False, "return_bias": True, "tp_size": 1}
        found = {attribute: getattr(layer, attribute, "none") for attribute in expected}
        is_linear = type(layer) is MergedColumnParallelLinear and isinstance(method, UnquantizedLinearMethod)
        if not is_linear or found != expected:
            raise UnexpectedError(
                f"{module}: expected an unquantized MergedColumnParallelLinear with {expected}, "
                f"found {type(layer).__name__} with {type(method).__name__} and {found}"
            )
        if str(layer.weight.dtype) != "torch.bfloat16":
            return f"the model is in {layer.weight.dtype}, expected torch.bfloat16"
        device, shape = layer.weight.device, (*rows, layer.weight.shape[1])
        try:
            target_of(device)
        except RuntimeError as error:
            return f"{module} is on {device}, maybe because its weights are offloaded: {error}"
        if type(method) is not UnquantizedLinearMethod:
            tuned = type(method).__name__
            if shape not in (measured for _, measured, _ in getattr(table_of(device), "configs", ())):
                return f"{module} has {tuned} for this GPU, and `indexproj tune` has not measured {shape}"
            LOGGER.info("indexproj replaces %s of %s: its tuned table has %s", tuned, module, shape)
    return None


def _warn(error: Exception) -> None:
    import vllm

    ours, theirs = importlib.metadata.version("indexproj"), getattr(vllm, "__version__", "of unknown version")
    LOGGER.warning("indexproj %s does not support vLLM %s and leaves its indexers alone: %s", ours, theirs, error)
