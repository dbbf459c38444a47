"""The plugin beside a vLLM that is made up; tests/engine has the real one."""

import ast
import importlib.machinery
import logging
import sys
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
    """`layers.<n>.self_attn.indexer` for each n, and a load_weights that returns what it was given."""

    def __init__(self, layers=(0,), kind=vllm_plugin.INDEXERS[0], layer=MergedColumnParallelLinear):
        super().__init__()
        self.prefix = nn.Module()
        self.prefix.layers = nn.ModuleDict()
        for number in layers:
            attention = nn.Module()
            attention.indexer = indexer_class(kind)(layer())
            self.prefix.layers[str(number)] = nn.ModuleDict({"self_attn": attention})

    def load_weights(self, weights):
        return {name for name, _ in weights}

    load_weights.__module__ = vllm_plugin.MODEL_FILES[0]

    def projection(self, number):
        return self.prefix.layers[str(number)]["self_attn"].indexer.wk_weights_proj


@pytest.fixture
def vllm(monkeypatch):
    """The modules that the plugin imports, with the model that a loader is going to create."""

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

    def finalize_layerwise_processing(model, model_config):
        pass

    def get_layerwise_info(layer):
        pass

    class LayerReloadingInfo:
        def can_load(self):
            pass

    made = module("vllm", __version__="9.9")
    made.envs = module("vllm.envs", VLLM_BATCH_INVARIANT=False)
    for name in ("model_executor", "model_executor.layers", "model_executor.models", "model_executor.model_loader"):
        module(f"vllm.{name}")
    for file in vllm_plugin.MODEL_FILES:
        module(file)
    made.linear = module(
        "vllm.model_executor.layers.linear",
        LinearMethodBase=LinearMethodBase,
        MergedColumnParallelLinear=MergedColumnParallelLinear,
        UnquantizedLinearMethod=UnquantizedLinearMethod,
    )
    made.loader = module("vllm.model_executor.model_loader.base_loader", BaseModelLoader=BaseModelLoader)
    made.layerwise = module(
        "vllm.model_executor.model_loader.reload.layerwise",
        finalize_layerwise_processing=finalize_layerwise_processing,
        get_layerwise_info=get_layerwise_info,
    )
    made.types = module("vllm.model_executor.model_loader.reload.types", LayerReloadingInfo=LayerReloadingInfo)
    made.reload = module("vllm.model_executor.model_loader.reload", layerwise=made.layerwise)
    monkeypatch.delitem(sys.modules, "indexproj.indexer.vllm.model", raising=False)
    monkeypatch.setattr("indexproj.kernels.target.target_of", lambda device: None)
    made.model = Model()
    yield made
    sys.modules.pop("indexproj.indexer.vllm.model", None)


def create(vllm, model=None):
    vllm.model = model or vllm.model
    config = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=4))
    parallel = SimpleNamespace(enable_elastic_ep=False)
    vllm.config = SimpleNamespace(additional_config={"other": 1}, parallel_config=parallel)
    return vllm.loader.BaseModelLoader().create_model(vllm.config, config)


def is_swapped(model):
    return type(model.projection(0).quant_method).__name__ == "IndexerMethod"


def test_models_are_swapped_as_they_are_created(vllm, caplog):
    register()
    assert is_swapped(create(vllm))
    assert not caplog.records


def test_registering_twice_changes_nothing(vllm):
    register()
    patched = vllm.loader.BaseModelLoader.create_model, vllm.layerwise.finalize_layerwise_processing
    register()
    assert patched == (vllm.loader.BaseModelLoader.create_model, vllm.layerwise.finalize_layerwise_processing)


def test_switched_off(vllm, monkeypatch):
    monkeypatch.setenv("INDEXPROJ_VLLM", "0")
    original = vllm.loader.BaseModelLoader.create_model
    register()
    assert vllm.loader.BaseModelLoader.create_model is original


def test_a_switch_that_means_nothing(monkeypatch):
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


def told_in_another_way(vllm):
    del vllm.types.LayerReloadingInfo.can_load


@pytest.mark.parametrize("change", [renamed, another_signature, moved, told_in_another_way])
def test_an_unknown_vllm_is_left_alone(vllm, change, caplog):
    change(vllm)
    before = dict(vllm.loader.BaseModelLoader.__dict__), dict(vllm.layerwise.__dict__)
    register()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "indexproj 0.1.0 does not support vLLM 9.9 and leaves its indexers alone" in record.getMessage()
    assert before == (dict(vllm.loader.BaseModelLoader.__dict__), dict(vllm.layerwise.__dict__))


def test_quiet_where_vllm_has_no_such_model(vllm, monkeypatch, caplog):
    renamed(vllm)
    for file in vllm_plugin.MODEL_FILES:
        monkeypatch.delitem(sys.modules, file)
    register()
    assert not caplog.records


def test_quiet_about_models_without_an_indexer(vllm, caplog):
    register()
    model = create(vllm, Model(kind="vllm.models.other.Indexer"))
    assert not is_swapped(model)
    assert not caplog.records


def quantized():
    layer = MergedColumnParallelLinear()
    layer.quant_method = LinearMethodBase()
    return layer


@pytest.mark.parametrize(
    "layer", [nn.Identity, quantized, lambda: MergedColumnParallelLinear((H, D))], ids=["type", "quantized", "rows"]
)
def test_an_unknown_layer_is_left_alone(vllm, layer, caplog):
    register()
    model = Model(layer=layer)
    before = model.load_weights
    create(vllm, model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "9.9" in record.getMessage()
    assert "wk_weights_proj: expected" in record.getMessage()
    assert model.load_weights == before


def without_heads(vllm, model):
    del model.prefix.layers["0"]["self_attn"].indexer.n_head


def without_a_method(vllm, model):
    del model.projection(0).quant_method


def without_a_class(vllm, model):
    del vllm.linear.UnquantizedLinearMethod


def with_an_unreadable_forward(vllm, model):
    indexer = model.prefix.layers["0"]["self_attn"].indexer
    type(indexer).__module__, type(indexer).__qualname__ = GLM5NEXT.rsplit(".", 1)
    exec("def forward(self): pass", namespace := {})
    type(indexer).forward = namespace["forward"]


@pytest.mark.parametrize("change", [without_heads, without_a_method, without_a_class, with_an_unreadable_forward])
def test_what_is_renamed_does_not_stop_a_server(vllm, change, caplog):
    register()
    model = Model()
    change(vllm, model)
    create(vllm, model)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "9.9" in record.getMessage()
    assert type(getattr(model.projection(0), "quant_method", None)).__name__ != "IndexerMethod"


def test_a_model_without_an_indexer_needs_no_config(vllm):
    register()
    vllm.model = Model(kind="vllm.models.other.Indexer")
    assert vllm.loader.BaseModelLoader().create_model(SimpleNamespace(), SimpleNamespace()) is vllm.model


def test_a_model_that_loads_in_its_own_way_is_left_alone(vllm, caplog):
    class Other(Model):
        def load_weights(self, weights):
            pass

    register()
    with caplog.at_level(logging.INFO):
        assert not is_swapped(create(vllm, Other()))
    assert "the load_weights of Other is from" in caplog.text


def test_fp16_is_left_alone(vllm, caplog):
    model = Model()
    model.half()
    register()
    with caplog.at_level(logging.INFO):
        assert not is_swapped(create(vllm, model))
    assert "torch.float16" in caplog.text


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_batch_invariance_is_vllms_choice(vllm, batch_invariant):
    vllm.envs.VLLM_BATCH_INVARIANT = batch_invariant
    register()
    assert create(vllm).indexproj.batch_invariant is batch_invariant


def test_a_device_without_kernels_is_left_alone(vllm, monkeypatch, caplog):
    def target_of(device):
        raise RuntimeError(f"the kernels need a GPU, not a {device}")

    monkeypatch.setattr("indexproj.kernels.target.target_of", target_of)
    register()
    with caplog.at_level(logging.INFO):
        assert not is_swapped(create(vllm))
    assert "to vLLM: the kernels need a GPU, not a cpu" in caplog.text


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model."])
def test_tensors_are_taken_out_by_layer_whatever_the_prefix(vllm, prefix):
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


def test_mtp_layers_by_their_own_numbers(vllm):
    register()
    model = create(vllm, Model((4,)))
    tensors = {name.replace("layers.0", "mtp_layers.0"): tensor for name, tensor in bf16_layer(0).items()}
    model.load_weights(tensors.items())
    model.projection(4).quant_method.process_weights_after_loading(model.projection(4))
    assert model.projection(4).weight.isfinite().all()
    # By this vLLM tells apart the compiled code that it keeps on disk.
    assert vllm.config.additional_config == {
        "other": 1, "indexproj": {"Model": "0.1.0: wk in BF16, weights_proj in BF16"}
    }  # fmt: skip


def test_uninitialised_rows_are_refused(vllm):
    register()
    model = create(vllm, Model((0, 1)))
    model.projection(0).weight.data[:D] = 1  # half of it
    with pytest.raises(CheckpointError) as caught:
        model.projection(0).quant_method.process_weights_after_loading(model.projection(0))
    assert [problem.subject for problem in caught.value.problems] == [
        f"prefix.layers.{layer}.self_attn.indexer.wk_weights_proj" for layer in (0, 1)
    ]


SOURCE = f"""
def forward(self, hidden_states):
    q = 1
{"".join(f"    {line}" + chr(10) for line in TWO_GEMMS.strip().splitlines())}
    return k, weights
"""


def test_one_launch_replaces_the_statements_and_nothing_else():
    body = ast.parse(one_launch(SOURCE)).body[0].body
    assert [ast.unparse(statement) for statement in body] == ["q = 1", ONE_LAUNCH, "return (k, weights)"]


@pytest.mark.parametrize("change", [("torch.mm", "torch.matmul"), (".float()", ".double()"), ("kw, _", "_, kw")])
def test_one_launch_refuses_other_statements(change):
    with pytest.raises(UnexpectedError, match="expected the statements\nkw, _ = "):
        one_launch(SOURCE.replace(*change))
