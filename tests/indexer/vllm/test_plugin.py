"""The plugin with a fake vLLM; tests/engine runs the real one."""

import ast
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from indexproj.indexer.vllm import plugin as vllm_plugin
from indexproj.indexer.vllm.glm5next import GLM5NEXT, ONE_LAUNCH, TWO_GEMMS, UnexpectedError, one_launch
from indexproj.indexer.vllm.model import IndexerLayer, State
from indexproj.indexer.vllm.plugin import register
from indexproj.kernels import dispatch, target
from indexproj.kernels.dispatch import TunedTable
from indexproj.loading import CheckpointError
from indexproj.loading.config import Config
from indexproj.loading.names import parse
from support import bf16_layer, fp8_layer

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


def is_swapped(model):
    return type(getattr(model.projection(), "quant_method", None)).__name__ == "IndexerMethod"


def test_created_model_is_swapped(vllm, caplog):
    register()
    assert is_swapped(create(vllm, Model()))
    assert not caplog.records


def test_register_twice_patches_once(vllm):
    register()
    patched = vllm.loader.create_model, vllm.layerwise.finalize_layerwise_processing
    register()
    assert patched == (vllm.loader.create_model, vllm.layerwise.finalize_layerwise_processing)


def test_switch_0_patches_nothing(vllm, monkeypatch):
    monkeypatch.setenv("INDEXPROJ_VLLM", "0")
    original = vllm.loader.create_model
    register()
    assert vllm.loader.create_model is original


def test_unknown_switch_raises(monkeypatch):
    monkeypatch.setenv("INDEXPROJ_VLLM", "yes")
    with pytest.raises(ValueError, match=r"INDEXPROJ_VLLM: expected 0 .*, got 'yes'"):
        register()


UNKNOWN_VLLM = {
    "function renamed": lambda vllm: delattr(vllm.loader, "create_model"),
    "method renamed": lambda vllm: delattr(vllm.info, "can_load"),
    "loader takes more": lambda vllm: setattr(vllm.loader, "__init__", lambda self, load_config, device: None),
    "other arguments": lambda vllm: setattr(vllm.layerwise, "finalize_layerwise_processing", lambda model: None),
}


@pytest.mark.parametrize("change", UNKNOWN_VLLM)
def test_unknown_vllm_is_not_patched(vllm, change, caplog):
    UNKNOWN_VLLM[change](vllm)
    before = dict(vllm.loader.__dict__), dict(vllm.layerwise.__dict__)
    register()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "indexproj 0.1.0 does not support vLLM 9.9 and leaves its indexers alone" in record.getMessage()
    assert before == (dict(vllm.loader.__dict__), dict(vllm.layerwise.__dict__))


def test_model_without_indexer_is_not_logged(vllm, caplog):
    """Nor does it need any of the configs."""
    register()
    vllm.model = Model(layers=())
    assert vllm.loader(None).create_model(SimpleNamespace(), SimpleNamespace()) is vllm.model
    assert not hasattr(vllm.model, "indexproj")
    assert not caplog.records


def test_unknown_indexer_class_is_logged(vllm, caplog):
    """GLM-5.3-Flash's in vLLM 0.30; one that is unknown leaves all to vLLM."""
    register()
    model, other = Model((0, 1)), Model((1,), "vllm.models.glm5next.nvidia.attention.Indexer")
    model.prefix.layers["1"] = other.prefix.layers["1"]
    assert not is_swapped(create(vllm, model))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "layers.1.self_attn.indexer is a vllm.models.glm5next.nvidia.attention, expected" in record.getMessage()


@pytest.mark.parametrize("layers", [(), (0,)])
def test_loader_that_bypasses_create_model_is_logged(vllm, caplog, layers):
    """Once, though ModelExpress wraps a loader in a loader."""

    class Loader(vllm.loader):
        def load_model(self, prefix=""):
            return vllm.model if prefix else Loader(None).load_model(prefix="model")

    register()
    vllm.model = Model(layers)
    assert Loader(None).load_model() is vllm.model
    warning = "indexproj leaves the indexer projections to vLLM: Loader does not call create_model"
    assert [record.getMessage() for record in caplog.records] == [warning] * len(layers)


@pytest.mark.parametrize("change", [None, "unsupported"])
def test_loader_that_calls_create_model_is_not_logged(vllm, caplog, change):
    """A model that is not swapped has one line, which says why."""
    register()
    model = Model().half() if change else Model()
    create(vllm, model)
    vllm.loader(None).load_model()
    assert not caplog.records


@pytest.mark.parametrize("lora", [None, object()])
def test_packed_modules_mapping_only_with_lora(vllm, lora):
    """Trainers read the mapping to look for `.weight` of each module."""
    register()
    vllm.config.lora_config, model = lora, Model()
    model.packed_modules_mapping = {"qkv": ["q", "k", "v"]}
    create(vllm, model)
    assert ("wk_weights_proj" in model.packed_modules_mapping) == (lora is not None)


class TunedMethod(UnquantizedLinearMethod):
    pass


@pytest.mark.parametrize("shape", [None, (D, H, 2 * K), (D, H, K)])
def test_tuned_linear_method_stays_unless_measured(vllm, monkeypatch, caplog, shape):
    register()
    table = TunedTable({(1, shape, ()): None}, {}) if shape else None
    monkeypatch.setattr(dispatch, "table_of", lambda device: table)
    model = Model()
    model.projection().quant_method = TunedMethod()
    with caplog.at_level(logging.INFO):
        create(vllm, model)
    assert is_swapped(model) == (shape == (D, H, K))
    (record,) = caplog.records
    assert record.levelname == "INFO"
    expected = "replaces TunedMethod of" if is_swapped(model) else "has TunedMethod for this GPU, and"
    assert expected in record.getMessage()


def unreadable_forward(vllm, model):
    cls = type(model.indexer())
    cls.__module__, cls.__qualname__ = GLM5NEXT.rsplit(".", 1)  # and it does not read _wp_fp32
    exec("def forward(self): pass", namespace := {})
    cls.forward = namespace["forward"]


def unsupported_device(vllm, model):
    def target_of(device):
        raise RuntimeError(f"the kernels need a GPU, not a {device}")

    target.target_of = target_of


UNKNOWN = "wk_weights_proj: expected an unquantized MergedColumnParallelLinear"
# What to change, the level of the log line, and a part of it.
UNSUPPORTED_MODEL = {
    "class": (lambda _, model: setattr(model.indexer(), "wk_weights_proj", nn.Identity()), "WARNING", UNKNOWN),
    "rows": (lambda _, model: setattr(model.projection(), "output_sizes", [H, D]), "WARNING", UNKNOWN),
    "method": (lambda _, model: setattr(model.projection(), "quant_method", LinearMethodBase()), "WARNING", UNKNOWN),
    "no heads": (lambda _, model: delattr(model.indexer(), "n_head"), "WARNING", "n_head"),
    "no method": (lambda _, model: delattr(model.projection(), "quant_method"), "WARNING", "with NoneType"),
    "no class": (lambda vllm, _: delattr(vllm.linear, "UnquantizedLinearMethod"), "WARNING", "Unquantized"),
    "forward": (unreadable_forward, "WARNING", "expected one that reads _wp_fp32; could not get source code"),
    "load_weights": (lambda _, model: setattr(model, "load_weights", print), "INFO", "load_weights of Model is from"),
    "fp16": (lambda _, model: model.half(), "INFO", "the model is in torch.float16"),
    "device": (unsupported_device, "INFO", "wk_weights_proj is on cpu, maybe because its weights are offloaded"),
    "config": (lambda vllm, _: setattr(vllm.config, "additional_config", ""), "INFO", "additional_config is not"),
}


@pytest.mark.parametrize("change", UNSUPPORTED_MODEL)
def test_unsupported_model_is_not_swapped(vllm, change, caplog):
    register()
    model, (make, level, message) = Model(), UNSUPPORTED_MODEL[change]
    make(vllm, model)
    before = model.load_weights
    with caplog.at_level(logging.INFO):
        create(vllm, model)
    (record,) = caplog.records
    assert record.levelname == level
    assert message in record.getMessage()
    assert ("indexproj 0.1.0 does not support vLLM 9.9" in record.getMessage()) == (level == "WARNING")
    assert model.load_weights == before
    assert not is_swapped(model)


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


@pytest.mark.parametrize("where", ["hf_config", "hf_text_config"])
def test_quantization_config_has_a_veto(vllm, where):
    register()
    model = vllm.model = Model()
    config = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=4), hf_config=SimpleNamespace())
    getattr(config, where).quantization_config = {"rotation_config": {"block_size": 32}}
    vllm.loader(None).create_model(vllm.config, config)
    model.load_weights(bf16_layer().items())
    with pytest.raises(CheckpointError, match="rotation_config"):
        model.projection().quant_method.process_weights_after_loading(None)


def test_rounding_is_logged_once(vllm, caplog):
    register()
    model = Model(layers=(0, 1, 2))
    create(vllm, model)
    for layer in range(3):
        weights = {name: (tensor.float() * 1.001) for name, tensor in bf16_layer(layer).items()}
        model.load_weights(weights.items())
    with caplog.at_level("WARNING"):
        model.projection().quant_method.process_weights_after_loading(None)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "model.layers.{0-2}.self_attn.indexer.wk.weight" in lines[0]
    assert "rounded to BF16" in lines[0]


@pytest.mark.parametrize("rows", [slice(0), slice(D), slice(D, None)], ids=["none", "wk", "weights_proj"])
def test_uninitialized_rows_are_refused(vllm, rows):
    register()
    model = create(vllm, Model((0, 1)))
    model.projection().weight.data[rows] = 1  # the others are NaN
    with pytest.raises(CheckpointError) as caught:
        model.projection().quant_method.process_weights_after_loading(model.projection())
    assert [problem.subject for problem in caught.value.problems] == [
        f"prefix.layers.{layer}.self_attn.indexer.wk_weights_proj" for layer in (0, 1)
    ]


def test_layer_states():
    """What each call leaves."""
    layer = IndexerLayer("layer", 0, MergedColumnParallelLinear(), Config(), to_bf16=False)
    _, gate, wk, scale, _ = [(parse(name), tensor) for name, tensor in fp8_layer().items()]

    def after(call, *arguments):
        call(*arguments)
        return layer.state.name, len(layer.problems)

    assert after(layer.finish) == ("EMPTY", 1)  # there are no weights
    assert after(layer.abandon) == ("EMPTY", 0)
    assert after(layer.offer, *wk) == ("COLLECTING", 0)
    assert after(layer.finish) == ("EMPTY", 2)  # tensors are missing
    assert after(layer.abandon) == ("EMPTY", 0)
    assert after(layer.offer, *wk) == ("COLLECTING", 0)
    assert after(layer.abandon) == ("EMPTY", 0)
    assert [after(layer.offer, *item)[0] for item in (wk, gate, scale)] == ["COLLECTING", "COLLECTING", "UPDATED"]
    assert after(layer.finish) == ("UPDATED", 0)
    assert after(layer.offer, *wk) == ("UPDATED", 1)  # one too many
    layer.state, layer.problems = State.READY, []  # as IndexerModel does after a load
    assert after(layer.finish) == ("READY", 0)
    assert after(layer.offer, *wk) == ("COLLECTING", 0)
    assert after(layer.settle) == ("COLLECTING", 0)  # without its scale
    assert after(layer.abandon) == ("READY", 0)
    assert after(layer.offer, *gate) == ("COLLECTING", 0)
    assert after(layer.settle) == ("UPDATED", 0)


def test_imports_go_one_way():
    """Each module imports those before it only, lazily too; and before there is a model, neither vLLM nor kernels."""
    order = ["glm5next", "model", "method", "plugin", "__init__"]
    for number, name in enumerate(order):
        text = (Path(vllm_plugin.__file__).parent / f"{name}.py").read_text()
        assert set(re.findall(r"^ *from \.(\w+)", text, re.MULTILINE)) <= set(order[:number])
        if name == "model":
            assert not re.search(r"^ *(from|import) vllm", text, re.MULTILINE)
        elif name != "method":
            assert not re.search(r"^(from|import) (vllm|\.model|\.method|\.\.\.)", text, re.MULTILINE)


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
