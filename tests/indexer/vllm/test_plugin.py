"""The plugin with a fake vLLM; tests/engine runs the real one."""

import ast
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from fake_vllm import (
    D,
    H,
    K,
    LinearMethodBase,
    Model,
    UnquantizedLinearMethod,
    create,
)
from indexproj.indexer.vllm import plugin as vllm_plugin
from indexproj.indexer.vllm.glm5next import GLM5NEXT, ONE_LAUNCH, TWO_GEMMS, UnexpectedError, one_launch
from indexproj.indexer.vllm.plugin import register
from indexproj.kernels import dispatch, target


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
    table = {(1, shape, ()): (None, ())} if shape else {}
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
