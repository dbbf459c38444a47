"""What the plugin patches or relies on in vLLM, checked in the source of 0.31, 0.32 (which is installed) and 0.33."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import vllm

from indexproj.indexer.vllm.plugin import GLM5NEXT, INDEXERS, MODEL_FILES, ONE_LAUNCH, UnexpectedError, one_launch

LAYERS, LOADER = "vllm.model_executor.layers", "vllm.model_executor.model_loader"
BASE, RELOAD = f"{LOADER}.base_loader.BaseModelLoader", f"{LOADER}.reload.layerwise"
V32, GLM, DOTS3 = "vllm.models.deepseek_v32", "vllm.models.glm5next.common.model", "vllm.models.dots3_note.nvidia"
DOWNLOADS = Path(__file__).parent.parent.parent / "build/vllm"
# Besides the modules of INDEXERS: load_weights of inner models, a caller, a comment, and a fusion pass.
USERS = {*MODEL_FILES, *(name.rpartition(".")[0] for name in INDEXERS), f"{V32}.nvidia.model", f"{V32}.amd.model"}
USERS |= {f"{V32}.amd.rocm", "vllm._aiter_ops", "vllm.compilation.passes.fusion.allreduce_rms_fusion"}
USERS -= {"vllm.model_executor.models.glm4_1v", f"{DOTS3}.multimodal"}
CREATES = (
    "self.wk_weights_proj = MergedColumnParallelLinear(hidden_size, [self.head_dim, self.n_head], bias=False, "
    "quant_config=None, disable_tp=True, prefix=f'{prefix}.wk_weights_proj')"
)
# Module, class, function or method -> parts of its code.
SOURCE = {
    **{name: ["def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]])"] for name in MODEL_FILES},
    f"{GLM}.Glm5NextForConditionalGeneration": ["Generation(Glm4vForConditionalGeneration, "],
    # dots3-note: Indexer of deepseek_v2 in layers that are numbered as in the checkpoint
    f"{DOTS3}.model": ["class Dots3NoteFullAttention(DeepseekV2MLAAttention)"],
    f"{DOTS3}.multimodal.Dots3NoteForCausalLM": ["'model.': 'language_model.model.'"],
    **{f"{name}.__init__": [CREATES, "self.head_dim = config.index_head_dim", "self.n_head = config.index_n_heads"]
       for name in INDEXERS},
    # create_model and the end of reloads, and their arguments, which `register` checks
    f"{BASE}.create_model": ["(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str='')"],
    f"{BASE}.load_model": ["model = self.create_model("],
    f"{RELOAD}.get_layerwise_info": ["(layer: torch.nn.Module)"],
    f"{RELOAD}.finalize_layerwise_processing": [
        "(model: torch.nn.Module, model_config: ModelConfig)", "if info.load_numel_total > 0:\n                logger."
    ],
    f"{RELOAD}.finalize_layerwise_reload": ["finalize_layerwise_processing(*args, **kwargs)"],
    f"{LOADER}.reload.types.LayerReloadingInfo": ["load_numel_total: int | None"],
    # a reload makes new parameters on the meta device
    f"{RELOAD}.initialize_layerwise_reload": ["restore_layer_on_meta(layer, info)"],
    # every linear method processes its weights; those made for a GPU are subclasses
    f"{LOADER}.utils.process_weights_after_loading": [
        "method = getattr(module, 'quant_method', None)", "isinstance(quant_method, QuantizeMethodBase)",
        "quant_method.process_weights_after_loading(module)",
    ],
    f"{V32}.nvidia.glm52_low_latency_gemm": ["class GLM52LowLatencyLinearMethod(UnquantizedLinearMethod)"],
    # ranks that get weights from others, and the weight cache
    "vllm.config.parallel": ["enable_elastic_ep: bool = False"],
    "vllm.distributed.elastic_ep.elastic_execute.batch_transfer_weights": ["model.state_dict()"],
    f"{LAYERS}.quantization.base_config.QuantizeMethodBase": ["supports_pre_processed_weights: bool = False"],
    "vllm.config.vllm.VllmConfig.compute_hash": ["json.dumps(additional_config, sort_keys=True)"],
    "vllm.envs": ["VLLM_BATCH_INVARIANT: bool"],
    f"{LAYERS}.linear.ColumnParallelLinear.forward": ["self.quant_method.apply(self, input_, bias)"],
    f"{LAYERS}.linear.UnquantizedLinearMethod": ["class UnquantizedLinearMethod(LinearMethodBase)"],
    "vllm.lora.layers.utils._get_lora_device": ["base_layer.qweight.device"],
}  # fmt: skip


@pytest.fixture(scope="module", params=["0.31.0", "0.32.0", "0.33.0"])
def source(request):
    if vllm.__version__.startswith(request.param):
        root = Path(vllm.__file__).parent.parent
        return {path.relative_to(root).as_posix(): path.read_text() for path in (root / "vllm").rglob("*.py")}
    name = f"vllm-{request.param}-*.whl"
    if not list(DOWNLOADS.glob(name)):
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            DOWNLOADS,
            f"vllm=={request.param}",
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"vLLM {request.param} cannot be downloaded: {result.stderr.strip().splitlines()[-1]}")
    with zipfile.ZipFile(*DOWNLOADS.glob(name)) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist() if name.endswith(".py")}


def text_of(source, name):
    """The code of a module, class, function or method, by its full name."""
    parts = name.split(".")
    cut = next(n for n in range(len(parts), 0, -1) if f"{'/'.join(parts[:n])}.py" in source)
    node = ast.parse(source[f"{'/'.join(parts[:cut])}.py"])
    for part in parts[cut:]:
        (node,) = [child for child in node.body if getattr(child, "name", None) == part][:1]
    return ast.unparse(node)


@pytest.mark.parametrize("name", SOURCE)
def test_source_contains(source, name):
    text = text_of(source, name)
    assert not [part for part in SOURCE[name] if part not in text]


def test_no_other_file_uses_wk_weights_proj(source):
    paths = {f"{module.replace('.', '/')}.py" for module in USERS}
    assert {path for path, text in source.items() if "wk_weights_proj" in text} == paths


def test_one_launch_replaces_two_gemms(source):
    forward = text_of(source, f"{GLM5NEXT}.forward")
    changed = one_launch(forward)
    before, after = changed.split(f"    {ONE_LAUNCH}\n")
    assert forward.startswith(before)
    assert forward.endswith(after.rstrip())
    assert "_wp_fp32" not in changed
    for old, new in (("torch.mm", "torch.matmul"), (".float()", ".double()"), ("kw, _", "_, kw")):
        with pytest.raises(UnexpectedError, match="expected the statements\nkw, _ = "):
            one_launch(forward.replace(old, new))
