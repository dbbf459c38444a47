"""The plugin with a fake vLLM; tests/engine runs the real one."""

import ast
import importlib.machinery
import logging
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

from indexproj.indexer.vllm import plugin as vllm_plugin
from indexproj.indexer.vllm.glm5next import GLM5NEXT, ONE_LAUNCH, TWO_GEMMS, UnexpectedError, one_launch
from indexproj.indexer.vllm.plugin import register
from indexproj.loading import CheckpointError
from support import bf16_layer, fp8_layer

D, H, K = 128, 16, 256


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    pass


class MergedColumnParallelLinear(nn.Module):
    def __init__(self, rows=(D, H)):
        super().__init__()
        self.input_size, self.output_sizes = K, list(rows)
        self.bias, self.skip_bias_add, self.return_bias, self.tp_size = None, False, True, 1
        self.quant_method = UnquantizedLinearMethod()
        self.weight = nn.Parameter(torch.zeros(sum(rows), K, dtype=torch.bfloat16), requires_grad=False)


def indexer_class(name):
    def init(self, layer):
        nn.Module.__init__(self)
        self.head_dim, self.n_head, self.wk_weights_proj = D, H, layer

    module, _, name = name.rpartition(".")
    return type(name, (nn.Module,), {"__init__": init, "__module__": module})


class Model(nn.Module):
    """Has `layers.<n>.self_attn.indexer` for each n; load_weights returns the names that it gets."""

    def __init__(self, layers=(0,), kind=vllm_plugin.INDEXERS[0]):
        super().__init__()
        self.prefix = nn.Module()
        self.prefix.layers = nn.ModuleDict()
        for number in layers:
            attention = nn.Module()
            attention.indexer = indexer_class(kind)(MergedColumnParallelLinear())
            self.prefix.layers[str(number)] = nn.ModuleDict({"self_attn": attention})

    def load_weights(self, weights):
        return {name for name, _ in weights}

    load_weights.__module__ = vllm_plugin.MODEL_FILES[0]

    def projection(self, number):
        return self.prefix.layers[str(number)]["self_attn"].indexer.wk_weights_proj


@pytest.fixture
def vllm(monkeypatch):
    """The modules that the plugin imports; `model` is what its loader creates."""

    def module(name, **contents):
        made = ModuleType(name)
        made.__spec__ = importlib.machinery.ModuleSpec(name, None)
        made.__path__ = []
        made.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    class BaseModelLoader:
        def create_model(self, vllm_config, model_config, prefix=""):
            return made.model

    class LayerReloadingInfo:
        def can_load(self):
            pass

    made = module("vllm", __version__="9.9")
    made.envs = module("vllm.envs", VLLM_BATCH_INVARIANT=False)
    stem = "vllm.model_executor"
    for name in (stem, f"{stem}.layers", f"{stem}.models", f"{stem}.model_loader", *vllm_plugin.MODEL_FILES):
        module(name)
    classes = LinearMethodBase, MergedColumnParallelLinear, UnquantizedLinearMethod
    made.linear = module(f"{stem}.layers.linear", **{cls.__name__: cls for cls in classes})
    made.loader = module(f"{stem}.model_loader.base_loader", BaseModelLoader=BaseModelLoader)
    made.layerwise = module(
        f"{stem}.model_loader.reload.layerwise",
        finalize_layerwise_processing=lambda model, model_config: None,
        get_layerwise_info=lambda layer: None,
    )
    made.types = module(f"{stem}.model_loader.reload.types", LayerReloadingInfo=LayerReloadingInfo)
    made.reload = module(f"{stem}.model_loader.reload", layerwise=made.layerwise)
    monkeypatch.delitem(sys.modules, "indexproj.indexer.vllm.model", raising=False)
    monkeypatch.setattr("indexproj.kernels.target.target_of", lambda device: None)
    made.model = Model()
    yield made
    sys.modules.pop("indexproj.indexer.vllm.model", None)


def create(vllm, model=None, additional_config=None):
    vllm.model = model or vllm.model
    config = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=4))
    parallel = SimpleNamespace(enable_elastic_ep=False)
    vllm.config = SimpleNamespace(additional_config=additional_config or {"other": 1}, parallel_config=parallel)
    return vllm.loader.BaseModelLoader().create_model(vllm.config, config)


def is_swapped(model):
    return type(model.projection(0).quant_method).__name__ == "IndexerMethod"


def test_created_model_is_swapped(vllm, caplog):
    register()
    assert is_swapped(create(vllm))
    assert not caplog.records


def test_register_twice_patches_once(vllm):
    register()
    patched = vllm.loader.BaseModelLoader.create_model, vllm.layerwise.finalize_layerwise_processing
    register()
    assert patched == (vllm.loader.BaseModelLoader.create_model, vllm.layerwise.finalize_layerwise_processing)


def test_switch_0_patches_nothing(vllm, monkeypatch):
    monkeypatch.setenv("INDEXPROJ_VLLM", "0")
    original = vllm.loader.BaseModelLoader.create_model
    register()
    assert vllm.loader.BaseModelLoader.create_model is original


def test_unknown_switch_raises(monkeypatch):
    monkeypatch.setenv("INDEXPROJ_VLLM", "yes")
    with pytest.raises(ValueError, match=r"INDEXPROJ_VLLM: expected 0 .*, got 'yes'"):
        register()


def renamed(vllm):
    vllm.loader.BaseModelLoader.build_model = vllm.loader.BaseModelLoader.create_model
    del vllm.loader.BaseModelLoader.create_model


def another_signature(vllm):
    vllm.layerwise.finalize_layerwise_processing = lambda model: None


def moved(vllm):
    del vllm.linear.MergedColumnParallelLinear


def without_can_load(vllm):
    del vllm.types.LayerReloadingInfo.can_load


@pytest.mark.parametrize("change", [renamed, another_signature, moved, without_can_load])
def test_unknown_vllm_is_not_patched(vllm, change, caplog):
    change(vllm)
    before = dict(vllm.loader.BaseModelLoader.__dict__), dict(vllm.layerwise.__dict__)
    register()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "indexproj 0.1.0 does not support vLLM 9.9 and leaves its indexers alone" in record.getMessage()
    assert before == (dict(vllm.loader.BaseModelLoader.__dict__), dict(vllm.layerwise.__dict__))


def test_model_without_indexer_is_not_logged(vllm, caplog):
    """Nor does it need any of the configs."""
    register()
    vllm.model = Model(kind="vllm.models.other.Indexer")
    assert vllm.loader.BaseModelLoader().create_model(SimpleNamespace(), SimpleNamespace()) is vllm.model
    assert not is_swapped(vllm.model)
    assert not caplog.records


def indexer_of(model):
    return model.prefix.layers["0"]["self_attn"].indexer


def other_class(vllm, model):
    indexer_of(model).wk_weights_proj = nn.Identity()


def quantized(vllm, model):
    model.projection(0).quant_method = LinearMethodBase()


def other_rows(vllm, model):
    indexer_of(model).wk_weights_proj = MergedColumnParallelLinear((H, D))


def without_heads(vllm, model):
    del indexer_of(model).n_head


def without_method(vllm, model):
    del model.projection(0).quant_method


def without_class(vllm, model):
    del vllm.linear.UnquantizedLinearMethod


def unreadable_forward(vllm, model):
    indexer = indexer_of(model)
    type(indexer).__module__, type(indexer).__qualname__ = GLM5NEXT.rsplit(".", 1)
    exec("def forward(self): pass", namespace := {})
    type(indexer).forward = namespace["forward"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_class, "wk_weights_proj: expected an unquantized MergedColumnParallelLinear"),
        (quantized, "with LinearMethodBase and"),
        (other_rows, "wk_weights_proj: expected an unquantized MergedColumnParallelLinear"),
        (without_heads, "n_head"),
        (without_method, "with NoneType and"),
        (without_class, "UnquantizedLinearMethod"),
        (unreadable_forward, "could not get source code"),
    ],
)
def test_unexpected_model_warns_and_is_not_swapped(vllm, change, message, caplog):
    register()
    model = Model()
    change(vllm, model)
    before = model.load_weights
    create(vllm, model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "does not support vLLM 9.9" in record.getMessage()
    assert message in record.getMessage()
    assert model.load_weights == before
    assert type(getattr(model.projection(0), "quant_method", None)).__name__ != "IndexerMethod"


def other_load_weights(monkeypatch):
    class Other(Model):
        def load_weights(self, weights):
            pass

    return Other()


def fp16(monkeypatch):
    return Model().half()


def unsupported_device(monkeypatch):
    def target_of(device):
        raise RuntimeError(f"the kernels need a GPU, not a {device}")

    monkeypatch.setattr("indexproj.kernels.target.target_of", target_of)
    return Model()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (other_load_weights, "the load_weights of Other is from"),
        (fp16, "the model is in torch.float16"),
        (unsupported_device, "the kernels need a GPU, not a cpu"),
    ],
)
def test_unsupported_model_is_not_swapped(vllm, monkeypatch, caplog, make, reason):
    register()
    model = make(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert not is_swapped(create(vllm, model))
    assert f"leaves the indexer projections to vLLM: {reason}" in caplog.text


def test_additional_config_of_unknown_type_is_not_swapped(vllm, caplog):
    register()
    with caplog.at_level(logging.INFO):
        assert not is_swapped(create(vllm, additional_config=object()))
    assert "additional_config is not a dict" in caplog.text


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model."])
def test_load_weights_takes_projections_with_any_prefix(vllm, prefix):
    register()
    model = create(vllm, Model((1, 3)))
    tensors = {}
    for layer in (0, 1, 3):
        tensors |= {name.replace("model.", prefix, 1): tensor for name, tensor in fp8_layer(layer).items()}
    passed_on = model.load_weights(tensors.items())
    ours = {f"prefix.layers.{n}.self_attn.indexer.wk_weights_proj.{p}" for n in (1, 3) for p in PARAMETERS}
    assert passed_on == ours | {name for name in tensors if "k_norm" in name or "wq_b" in name}
    for layer in (1, 3):
        expected = tensors[f"{prefix}layers.{layer}.self_attn.indexer.wk.weight"]
        assert torch.equal(model.projection(layer).qweight.view(torch.uint8), expected.view(torch.uint8))
        assert not hasattr(model.projection(layer), "weight")


PARAMETERS = ["qweight", "wk_scale", "weights_proj_weight"]


def test_mtp_layer_and_additional_config(vllm):
    register()
    model = create(vllm, Model((4,)))
    tensors = {name.replace("layers.0", "mtp_layers.0"): tensor for name, tensor in bf16_layer(0).items()}
    model.load_weights(tensors.items())
    model.projection(4).quant_method.process_weights_after_loading(model.projection(4))
    assert model.projection(4).weight.isfinite().all()
    # This is part of the key of vLLM's compile cache.
    assert vllm.config.additional_config == {
        "other": 1, "indexproj": {"Model": "0.1.0: wk in BF16, weights_proj in BF16"}
    }  # fmt: skip


def test_uninitialized_rows_are_refused(vllm):
    register()
    model = create(vllm, Model((0, 1)))
    model.projection(0).weight.data[:D] = 1  # half of it
    with pytest.raises(CheckpointError) as caught:
        model.projection(0).quant_method.process_weights_after_loading(model.projection(0))
    assert [problem.subject for problem in caught.value.problems] == [
        f"prefix.layers.{layer}.self_attn.indexer.wk_weights_proj" for layer in (0, 1)
    ]


def test_imports_go_one_way():
    """Each module imports those before it only, lazily too; and before there is a model, neither vLLM nor kernels."""
    order = ["glm5next", "layer", "model", "plugin", "__init__"]
    for number, name in enumerate(order):
        text = (Path(vllm_plugin.__file__).parent / f"{name}.py").read_text()
        assert set(re.findall(r"^ *from \.(\w+)", text, re.MULTILINE)) <= set(order[:number])
        if name == "layer":
            assert not re.search(r"^ *(from|import) vllm", text, re.MULTILINE)
        elif name != "model":
            assert not re.search(r"^(from|import) (vllm|\.layer|\.model|\.\.\.)", text, re.MULTILINE)


SOURCE = f"""
def forward(self, hidden_states):
    q = 1
{"".join(f"    {line}" + chr(10) for line in TWO_GEMMS.strip().splitlines())}
    return k, weights
"""


def test_one_launch_replaces_two_gemms():
    body = ast.parse(one_launch(SOURCE)).body[0].body
    assert [ast.unparse(statement) for statement in body] == ["q = 1", ONE_LAUNCH, "return (k, weights)"]


@pytest.mark.parametrize("change", [("torch.mm", "torch.matmul"), (".float()", ".double()"), ("kw, _", "_, kw")])
def test_one_launch_requires_two_gemms(change):
    with pytest.raises(UnexpectedError, match="expected the statements\nkw, _ = "):
        one_launch(SOURCE.replace(*change))
