"""config.json: sizes and schedules of the indexers. They are checked against the tensors and never replace them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .problems import Problem

CONFIG = "config.json"
_QUANTIZATION = ("quantization_config", "compression_config")
# auto-round (two), compressed-tensors, Quark (two)
_TRANSFORMS = ("rotation_config", "spinquant_config", "transform_config", "online_r1_rotation", "online_config")
_NO_TRANSFORM: tuple[dict[str, Any], ...] = ({"config_groups": {}}, {"config_groups": None}, {"enable": False})
_SCALE_FORMATS = re.compile(r"(torch\.)?(none|u?e8m0|uint8|(float8_|fp8_)?e[48]m[03]\w*|(b?float|fp)(16|32|64)?)")
_FOREIGN_CODES = re.compile(r"(opt_rtn_)?mx_?int\w*")  # auto-round's MXINT4
_ACTIVATIONS = ("act", "input", "output", "kv_cache", "bias")  # keys about anything but weights start like this
_ALL_RUN = ("deepseek_v32", "glm_moe_dsa")  # without a schedule, all hidden layers of these models run an indexer
_SIZES = ("num_hidden_layers", "num_nextn_predict_layers", "hidden_size", "index_head_dim", "index_n_heads")


class Veto(NamedTuple):
    """An entry of quantization_config that says what dtypes and shapes cannot show, and that no encoding describes."""

    expected: str
    found: str
    role: str | None = None  # counts only for weights with a uint8 tensor in that role: bytes may mean anything


@dataclass(frozen=True)
class Config:
    """Sizes, each None if the file does not give it, which layers run their indexer, and vetoes."""

    num_hidden_layers: int | None = None  # without multi-token-prediction (MTP) layers, which follow
    num_nextn_predict_layers: int | None = None  # MTP layers
    hidden_size: int | None = None  # K
    index_head_dim: int | None = None  # D
    index_n_heads: int | None = None  # H
    # Source -> per hidden layer, True if it runs its indexer, False if it reuses the tokens of an earlier layer.
    schedules: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    vetoes: tuple[Veto, ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()  # contradictions that do not affect what loads
    schedule_problems: tuple[Problem, ...] = ()  # these concern the model as a whole, not a single layer

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """Reads the content of config.json; text_config, which multimodal models nest, takes precedence.

        Args:
            values: the JSON object. Its attribute `repeated`, if any, lists the keys that the file has more than once.
        """
        nested = values.get("text_config")
        text: Mapping[str, Any] = nested if isinstance(nested, dict) else {}
        repeated = ({*getattr(values, "repeated", ())} - text.keys()) | {*getattr(text, "repeated", ())}
        vetoes = tuple(_vetoes(values))
        values = {**values, **text}
        notes: list[list[Problem]] = [[], [], []]
        problems, warnings, schedule_problems = notes
        sizes: dict[str, Any] = {key: values[key] for key in _SIZES if values.get(key) is not None}
        for key, value in list(sizes.items()):
            if type(value) is not int or not 0 <= value < 1_000_000:
                problem = Problem(CONFIG, "", f"{key} to be an integer from 0 to 999999", f"{value!r:.80}")
                (schedule_problems if key == "num_nextn_predict_layers" else problems).append(problem)
                del sizes[key]
        schedules = _schedules(values, sizes.get("num_hidden_layers"), schedule_problems)
        for key in sorted(repeated):
            problem = Problem(CONFIG, "", "every key once", f"{key} more than once", "only the last one counts")
            (problems if key in _SIZES else warnings).append(problem)
        return cls(*map(sizes.get, _SIZES), schedules, vetoes, *map(tuple, notes))  # type: ignore[arg-type, call-arg]

    @property
    def schedule(self) -> Sequence[bool]:
        """The first schedule, which counts; empty if there is none."""
        return next(iter(self.schedules.values()), ())


def _vetoes(values: Mapping[str, Any]) -> Iterator[Veto]:
    """Searches all levels of quantization_config, also those of single layers and groups of them."""
    text = values.get("text_config")
    places = {"": values, "text_config.": text if isinstance(text, dict) else {}}
    entries = [(f"{place}{key}", at.get(key)) for place, at in places.items() for key in _QUANTIZATION]
    while entries:
        path, value = entries.pop()
        key, found = path.rpartition(".")[2], f"{path} = {json.dumps(value, default=str):.80} in {CONFIG}"
        word = value.lower() if isinstance(value, str) else "none"
        if key.startswith(_ACTIVATIONS):
            continue
        if key in _TRANSFORMS and value and value not in _NO_TRANSFORM:
            yield Veto("weights that multiply x as it comes, without a rotation or transform", found)
        elif key in ("scale_format", "scale_fmt", "scale_dtype") and not _SCALE_FORMATS.fullmatch(word):
            yield Veto("scales in E8M0, E4M3 or floating point", found, "scale")
        elif _FOREIGN_CODES.fullmatch(word):
            yield Veto("codes in E2M1", found, "weight")
        elif isinstance(value, dict):
            entries += [(f"{path}.{name}", each) for name, each in value.items()]
        elif isinstance(value, list):
            entries += [(f"{path}.{name}", each) for name, each in enumerate(value)]


def _schedules(values: Mapping[str, Any], layers: int | None, problems: list[Problem]) -> dict[str, list[bool]]:
    """In order of precedence: indexer_types, index_topk_pattern, index_topk_freq, as in transformers and vLLM."""
    if layers is None or ("linear_attn_config" in values and "layer_types" not in values):
        return {}  # without layer_types, the layers that have an indexer are unknown
    schedules: dict[str, list[bool]] = {}
    lists = {"indexer_types": ("full", "shared"), "index_topk_pattern": ("F", "S")}
    lists = {key: words for key, words in lists.items() if values.get(key) is not None}
    for key, (full, shared) in lists.items():
        value, runs = values[key], {full: True, shared: False, "full": True, "shared": False}
        is_list = isinstance(value, list | str) and len(value) >= layers
        if is_list and all(str(word) in runs for word in value):
            schedules[key] = [runs[str(word)] for word in value[:layers]]
        else:
            expected = f"{key} to say {full} or {shared} for each of {layers} layers"
            problems.append(Problem(CONFIG, "", expected, f"{value!r:.80}"))
    # A list overrides the two defaults below, even if it is wrong.
    freq, offset = values.get("index_topk_freq"), values.get("index_skip_topk_offset")
    if freq is None and not lists and values.get("model_type") in _ALL_RUN:
        schedules[f"the default of {values['model_type']}"] = [True] * layers
    offset, default = (2, ", the default") if offset is None else (offset, "")
    if freq is not None and (type(freq) is not int or freq < 1 or type(offset) is not int):
        expected = "index_topk_freq and index_skip_topk_offset to be integers, the first one positive"
        problems.append(Problem(CONFIG, "", expected, f"{freq!r} and {offset!r}"))
    elif freq is not None and (freq > 1 or not lists):  # 1 is also the default
        source = f"index_topk_freq = {freq} (index_skip_topk_offset = {offset}{default})"
        schedules[source] = [max(layer - offset + 1, 0) % freq == 0 for layer in range(layers)]
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and len(kinds) >= layers:
        for runs_in in schedules.values():
            runs_in[:] = [runs and "linear" not in str(kind) for runs, kind in zip(runs_in, kinds, strict=False)]
    return schedules
