"""As much of vLLM as the plugin touches, and a model with indexers."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from indexproj.indexer.vllm import plugin as vllm_plugin
from indexproj.kernels import target

D, H, K = 128, 16, 256


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class MergedColumnParallelLinear(nn.Module):
    def __init__(self, rows=(D, H)):
        super().__init__()
        self.output_sizes = list(rows)
        self.bias, self.skip_bias_add, self.return_bias, self.tp_size = None, False, True, 1
        self.quant_method = UnquantizedLinearMethod()
        self.weight = nn.Parameter(torch.ones(sum(rows), K, dtype=torch.bfloat16), requires_grad=False)


class Model(nn.Module):
    """Has `layers.<n>.self_attn.indexer` for each n; load_weights returns the names that it gets."""

    def __init__(self, layers=(0,), indexer_class=vllm_plugin.INDEXERS[0]):
        super().__init__()
        module, _, name = indexer_class.rpartition(".")
        self.prefix = nn.Module()
        self.prefix.layers = nn.ModuleDict()
        for number in layers:
            indexer = type(name, (nn.Module,), {"__module__": module})()
            indexer.head_dim, indexer.n_head, indexer.wk_weights_proj = D, H, MergedColumnParallelLinear()
            self.prefix.layers[str(number)] = nn.ModuleDict({"self_attn": nn.ModuleDict({"indexer": indexer})})

    def load_weights(self, weights):
        return {name for name, _ in weights}

    load_weights.__module__ = vllm_plugin.MODEL_FILES[0]

    def indexer(self, number=0):
        return self.prefix.layers[str(number)]["self_attn"]["indexer"]

    def projection(self, number=0):
        return self.indexer(number).wk_weights_proj


@pytest.fixture
def vllm(monkeypatch):
    """The modules that the plugin imports, and the config of a model."""

    class BaseModelLoader:
        def __init__(self, load_config):
            pass

        def load_model(self):
            return fake.model

        def create_model(self, vllm_config, model_config, prefix=""):
            return fake.model

    class LayerReloadingInfo:
        def can_load(self):
            pass

    fake = SimpleNamespace(__version__="9.9", envs=SimpleNamespace(VLLM_BATCH_INVARIANT=False))
    classes = LinearMethodBase, MergedColumnParallelLinear, UnquantizedLinearMethod
    fake.linear = SimpleNamespace(**{cls.__name__: cls for cls in classes})
    fake.loader = BaseModelLoader
    fake.layerwise = SimpleNamespace(
        __name__="layerwise",
        finalize_layerwise_processing=lambda model, model_config: None,
        get_layerwise_info=lambda layer: None,
    )
    fake.info = LayerReloadingInfo
    for name, module in {
        "vllm": fake,
        "vllm.envs": fake.envs,
        "vllm.model_executor.layers.linear": fake.linear,
        "vllm.model_executor.model_loader.base_loader": SimpleNamespace(BaseModelLoader=BaseModelLoader),
        "vllm.model_executor.model_loader.reload": SimpleNamespace(layerwise=fake.layerwise),
        "vllm.model_executor.model_loader.reload.types": SimpleNamespace(LayerReloadingInfo=LayerReloadingInfo),
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("method", "model"):
        monkeypatch.delitem(sys.modules, f"indexproj.indexer.vllm.{name}", raising=False)
    monkeypatch.setattr(target, "target_of", lambda device: None)
    parallel = SimpleNamespace(enable_elastic_ep=False)
    fake.config = SimpleNamespace(additional_config={"other": 1}, parallel_config=parallel, lora_config=None)
    yield fake
    sys.modules.pop("indexproj.indexer.vllm.method", None)


def create(vllm, model):
    vllm.model = model
    config = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=4))
    return vllm.loader(None).create_model(vllm.config, config)
