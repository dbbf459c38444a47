"""The plugin that puts the projection into vLLM, where it replaces what wk_weights_proj computes.

vLLM calls `register` in each of its processes, long before there is a model, so nothing of vLLM's models and nothing of
the kernels is imported here; both happen when a model with an indexer is created. No hook that vLLM offers reaches a
single layer of a model (its layer registry replaces a class everywhere), hence the patches; each says what it replaces
and when it can go. What a model has besides is left alone, and if anything is not as expected, all of it is.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import re
import textwrap
from types import MethodType
from typing import Any

# vLLM gives its handlers to the loggers under its own name.
LOGGER = logging.getLogger("vllm.indexproj")
SWITCH = "INDEXPROJ_VLLM"

# The classes that own a wk_weights_proj.
INDEXERS = (
    "vllm.model_executor.models.deepseek_v2.Indexer",
    "vllm.models.deepseek_v32.attention.DeepseekV32Indexer",
    "vllm.models.hy_v4.nvidia.attention.Indexer",
    "vllm.models.glm5next.common.attention.Indexer",
)
GLM5NEXT = INDEXERS[3]
# The files whose load_weights is known to number layers as the checkpoint does.
MODEL_FILES = (
    "vllm.model_executor.models.deepseek_v2",
    "vllm.model_executor.models.deepseek_mtp",
    "vllm.models.deepseek_v32.nvidia.mtp",
    "vllm.models.deepseek_v32.amd.mtp",
    "vllm.models.hy_v4.nvidia.model",
    "vllm.models.hy_v4.amd.model",
    "vllm.models.hy_v4.nvidia.mtp",
    "vllm.models.glm5next.common.model",
    "vllm.model_executor.models.glm4_1v",  # Glm5NextForConditionalGeneration inherits it
    "vllm.models.glm5next.common.mtp",
)
_LAYER = re.compile(r"(?:^|\.)(?:mtp_)?layers\.(\d+)\.")
PACKED = {"wk_weights_proj": ["wk", "weights_proj"]}


class UnexpectedError(Exception):
    """Something in vLLM is not what the patches were written for."""


def register() -> None:
    """Entry point of `vllm.general_plugins`. May be called any number of times.

    Raises:
        ValueError: INDEXPROJ_VLLM has a value that means nothing.
    """
    switch = os.environ.get(SWITCH, "1")
    if switch not in ("0", "1", "bf16"):
        raise ValueError(f"{SWITCH}: expected 0 (off), 1 (on) or bf16 (on, weights decoded to bf16), got {switch!r}")
    if switch == "0":
        return
    try:
        loader, layerwise = find_patched()
    except UnexpectedError as error:
        if any(_exists(file) for file in MODEL_FILES):
            _warn(error)
        return
    patch_model_creation(loader, to_bf16=switch == "bf16")
    patch_reload(layerwise)


def find_patched() -> tuple[Any, Any]:
    """What is going to be patched: vLLM's base class of loaders, and its module of reloads.

    Raises:
        UnexpectedError: one of them, or something that the patches use, is not there or takes other arguments.
    """
    try:
        from vllm.envs import VLLM_BATCH_INVARIANT  # noqa: F401
        from vllm.model_executor.layers.linear import LinearMethodBase, MergedColumnParallelLinear  # noqa: F401
        from vllm.model_executor.model_loader.base_loader import BaseModelLoader
        from vllm.model_executor.model_loader.reload import layerwise
        from vllm.model_executor.model_loader.reload.types import LayerReloadingInfo
    except ImportError as error:
        raise UnexpectedError(str(error)) from error
    for name, owner, arguments in (
        ("create_model", BaseModelLoader, ["self", "vllm_config", "model_config", "prefix"]),
        ("finalize_layerwise_processing", layerwise, ["model", "model_config"]),
        ("get_layerwise_info", layerwise, ["layer"]),
        ("can_load", LayerReloadingInfo, ["self"]),
    ):
        function = getattr(owner, name, None)
        found = list(inspect.signature(function).parameters) if callable(function) else "no such function"
        if found != arguments:
            raise UnexpectedError(f"{owner.__name__}.{name}: expected the arguments {arguments}, found {found}")
    return BaseModelLoader, layerwise


def patch_model_creation(loader: Any, to_bf16: bool) -> None:
    """Replaces `BaseModelLoader.create_model`: what it returns has its indexer projections swapped.

    Why: it is the one place through which every model passes, main or draft, after it was built and before it is
    loaded. vLLM has no hook there.
    Goes when: vLLM lets a plugin choose the linear method of a layer by its name.
    """
    original = loader.create_model
    if hasattr(original, "is_indexproj"):
        return

    @functools.wraps(original)
    def create_model(self: Any, vllm_config: Any, model_config: Any, prefix: str = "") -> Any:
        model = original(self, vllm_config, model_config, prefix)
        swap(model, vllm_config, model_config, to_bf16)
        return model

    create_model.is_indexproj = True  # type: ignore[attr-defined]
    loader.create_model = create_model


def patch_reload(layerwise: Any) -> None:
    """Replaces `layerwise.finalize_layerwise_processing`, the end of every reload in checkpoint format.

    Projections whose tensors have not all come are refused there, once vLLM has put its own weights in place; those
    that are complete are counted as loaded.
    Why: vLLM knows a layer's load only by the elements written to its parameters, and then runs its post-processing;
    of a layer without any it says that it failed to load. It has no hook at the end.
    Goes when: vLLM calls the linear methods of all layers at the end of a reload.
    """
    original = layerwise.finalize_layerwise_processing
    if hasattr(original, "is_indexproj"):
        return

    @functools.wraps(original)
    def finalize_layerwise_processing(model: Any, model_config: Any) -> None:
        swapped = getattr(model, "indexproj", None)  # an IndexerModel
        try:
            if swapped is not None:
                swapped.finish()
        finally:
            for layer in swapped.reloaded() if swapped is not None else ():
                info = layerwise.get_layerwise_info(layer)
                if info.can_load():
                    info.load_numel_total = 0  # nothing is left for vLLM to load
            original(model, model_config)

    finalize_layerwise_processing.is_indexproj = True  # type: ignore[attr-defined]
    layerwise.finalize_layerwise_processing = finalize_layerwise_processing


def swap(model: Any, vllm_config: Any, model_config: Any, to_bf16: bool) -> None:
    """Swaps all projections of a model, or none, in which case a line in the log says why.

    Args:
        model: any; without a known indexer in it nothing happens.
        vllm_config, model_config: what vLLM created it by.
        to_bf16: decode weights to bf16.
    """
    modules = dict(model.named_modules())
    kinds = {cls: kind_of(cls) for cls in set(map(type, modules.values()))}
    indexers = {name: module for name, module in modules.items() if kinds[type(module)]}
    if not indexers:
        return
    try:
        _check(model, indexers)
        if reason := _unsupported(model, vllm_config, indexers):
            LOGGER.info("indexer projections are left to vLLM: %s", reason)
            return
        forwards = {cls: glm5next_forward(cls) for cls, kind in kinds.items() if kind == GLM5NEXT}
        num_hidden_layers = getattr(model_config.hf_text_config, "num_hidden_layers", None)
        # A rank that joins gets dummy weights, and then the tensors of another one, in order: both need one layout.
        to_bf16 = to_bf16 or vllm_config.parallel_config.enable_elastic_ep
        from vllm import envs

        batch_invariant = envs.VLLM_BATCH_INVARIANT
        from .layer import IndexerModel
    except (UnexpectedError, AttributeError, ImportError, OSError) as error:  # the last one: there is no source
        _warn(error)
        return

    layers = {f"{name}.wk_weights_proj": indexer.wk_weights_proj for name, indexer in indexers.items()}
    model.indexproj = IndexerModel(
        model,
        layers,
        vllm_config.additional_config,
        num_hidden_layers,
        to_bf16=to_bf16,
        batch_invariant=batch_invariant,
    )
    if not forwards:
        patch_packed_modules(model)
    for indexer in indexers.values():
        if type(indexer) in forwards:
            indexer.forward = MethodType(forwards[type(indexer)], indexer)


def patch_packed_modules(model: Any) -> None:
    """Adds wk_weights_proj to a model's `packed_modules_mapping`, so that LoRA adapters of wk and weights_proj apply.

    Why: DeepSeek's and GLM's classes lack the entry, and adapters of both are refused or not seen; HY-V4's have it.
    GLM-5.3-Flash lacks it and goes without: its forward does not call the module that an adapter would wrap.
    Goes when: they have it too.
    """
    mapping = getattr(model, "packed_modules_mapping", None)
    if mapping is not None:
        model.packed_modules_mapping = {**PACKED, **mapping}


def glm5next_forward(indexer_class: Any) -> Any:
    """What replaces `Indexer.forward` of GLM-5.3-Flash: itself with a few statements changed, see `one_launch`.

    Why: it computes the gate again, in fp32 from a copy of the weights that it keeps in `_wp_fp32` and never renews;
    ours comes out in fp32 to begin with. A forward cannot be changed from outside.
    Goes when: the gate is read from what wk_weights_proj returns.

    Raises:
        UnexpectedError: it does not contain those statements.
    """
    original = indexer_class.forward
    if original.__closure__:
        raise UnexpectedError(f"{GLM5NEXT}.forward: expected a function without a closure")
    tree = one_launch(textwrap.dedent(inspect.getsource(original)))
    names: dict[str, Any] = {}
    exec(compile(tree, f"<{GLM5NEXT}, changed by indexproj>", "exec"), original.__globals__, names)
    return names["forward"]


_TWO_GEMMS = """
kw, _ = self.wk_weights_proj(hidden_states)
k = kw[:, :self.head_dim]
if self._wp_fp32 is None:
    self._wp_fp32 = self.wk_weights_proj.weight.data[self.head_dim:, :].t().contiguous().float()
weights = torch.mm(hidden_states.float(), self._wp_fp32)
"""
_ONE_LAUNCH = "k, weights = self.wk_weights_proj.quant_method.k_and_gate(self.wk_weights_proj, hidden_states)"


def one_launch(source: str) -> ast.Module:
    """The source of a function, with the statements of _TWO_GEMMS, which stand in a row, replaced by _ONE_LAUNCH.

    Raises:
        UnexpectedError: they do not stand there.
    """
    tree = ast.parse(source)
    (function,) = tree.body
    assert isinstance(function, ast.FunctionDef)
    found = [ast.unparse(statement) for statement in function.body]
    wanted = [ast.unparse(statement) for statement in ast.parse(_TWO_GEMMS).body]
    for start in range(len(found)):
        if found[start : start + len(wanted)] == wanted:
            replacement = ast.parse(_ONE_LAUNCH).body
            function.body[start : start + len(wanted)] = [
                ast.copy_location(statement, function.body[start]) for statement in replacement
            ]
            return ast.fix_missing_locations(tree)
    raise UnexpectedError(f"{GLM5NEXT}.forward: expected the statements {'; '.join(wanted)}")


def kind_of(module_class: Any) -> str | None:
    """The entry of INDEXERS that a class is, or inherits from."""
    names = (f"{base.__module__}.{base.__qualname__}" for base in module_class.__mro__)
    return next((name for name in names if name in INDEXERS), None)


def layer_of(name: str) -> int:
    """Index of the layer that a module or tensor belongs to, by its name."""
    return int(_LAYER.findall(name)[-1])


def _check(model: Any, indexers: dict[str, Any]) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, UnquantizedLinearMethod

    if not callable(getattr(model, "load_weights", None)):
        raise UnexpectedError(f"{type(model).__name__}: expected a load_weights")
    if len({layer_of(name) for name in indexers if _LAYER.search(name)}) < len(indexers):
        raise UnexpectedError(f"expected one indexer in a layer, found {', '.join(indexers)}")
    for name, indexer in indexers.items():
        layer: Any = getattr(indexer, "wk_weights_proj", None)
        if type(layer) is not MergedColumnParallelLinear:
            raise UnexpectedError(f"{name}.wk_weights_proj: expected a MergedColumnParallelLinear, found {type(layer)}")
        d, h = indexer.head_dim, indexer.n_head
        expected = {
            "input_size": layer.weight.shape[1],
            "output_sizes": [d, h],
            "bias": None,
            "skip_bias_add": False,
            "return_bias": True,
            "tp_size": 1,
        }
        found = {attribute: getattr(layer, attribute, "none") for attribute in expected}
        if found != expected or not isinstance(layer.quant_method, UnquantizedLinearMethod):
            raise UnexpectedError(
                f"{name}.wk_weights_proj: expected {expected} without quantization, "
                f"found {found} with {type(layer.quant_method).__name__}"
            )


def _unsupported(model: Any, vllm_config: Any, indexers: dict[str, Any]) -> str | None:
    """Why the projections of a model as expected cannot be ours; None where they can."""
    from ...kernels.target import target_of

    if not isinstance(vllm_config.additional_config, dict):
        return "additional_config is no dict, so vLLM could not tell compiled code with these kernels from code without"
    file = model.load_weights.__module__
    if file not in MODEL_FILES:
        return f"{type(model).__name__} loads its weights by {file}, which is not among {', '.join(MODEL_FILES)}"
    for indexer in indexers.values():
        weight = indexer.wk_weights_proj.weight
        if str(weight.dtype) != "torch.bfloat16":
            return f"the model is in {weight.dtype}, and the kernels need bf16 weights"
        try:
            target_of(weight.device)
        except RuntimeError as error:
            return str(error)
    return None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _warn(error: Exception) -> None:
    import vllm

    ours, theirs = importlib.metadata.version("indexproj"), getattr(vllm, "__version__", "of unknown version")
    LOGGER.warning("indexproj %s does not fit vLLM %s and leaves its indexers alone: %s", ours, theirs, error)
