"""What config.json says of the indexers. It can contradict the tensors, and never stands in for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .problems import Problem

CONFIG = "config.json"
# Where nothing is said of them, all hidden layers of these models run an indexer.
_ALL_RUN = ("deepseek_v32", "glm_moe_dsa")
_SIZES = ("num_hidden_layers", "num_nextn_predict_layers", "hidden_size", "index_head_dim", "index_n_heads")


@dataclass(frozen=True)
class Config:
    """The sizes, each None where the file has none, and which layers run their indexer.

    Attributes:
        num_hidden_layers: layers without the multi-token-prediction (MTP) ones, which come behind them.
        num_nextn_predict_layers: how many MTP layers there are.
        hidden_size: K.
        index_head_dim: D.
        index_n_heads: H.
        schedules: what says so -> per hidden layer, whether its indexer runs or shares the choice of an earlier one.
            The first one decides; engines differ in which of them they read.
        problems: what cannot be right in the file itself.
    """

    num_hidden_layers: int | None = None
    num_nextn_predict_layers: int | None = None
    hidden_size: int | None = None
    index_head_dim: int | None = None
    index_n_heads: int | None = None
    schedules: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Config:
        """From the content of config.json; what a multimodal model nests in text_config counts first."""
        text = values.get("text_config")
        values = {**values, **text} if isinstance(text, dict) else values
        problems: list[Problem] = []
        sizes = {key: _size(key, values[key], problems) for key in _SIZES if values.get(key) is not None}
        schedules = _schedules(values, sizes.get("num_hidden_layers"), problems)
        return cls(**sizes, schedules=schedules, problems=tuple(problems))

    @property
    def schedule(self) -> Sequence[bool]:
        """The one that decides; empty where there is none."""
        return next(iter(self.schedules.values()), ())


def _size(key: str, value: Any, problems: list[Problem]) -> int | None:
    if type(value) is int and 0 <= value < 1_000_000:
        return value
    problems.append(Problem(CONFIG, "", f"{key} to be an integer from 0 to 999999", f"{value!r:.80}"))
    return None


def _schedules(values: Mapping[str, Any], layers: int | None, problems: list[Problem]) -> dict[str, list[bool]]:
    """By precedence: indexer_types, index_topk_pattern, index_topk_freq, as transformers and vLLM read them."""
    if layers is None or ("linear_attn_config" in values and "layer_types" not in values):
        return {}  # without layer_types nobody can say which layers have an indexer at all
    schedules: dict[str, list[bool]] = {}
    is_listed = False  # if only by a list that is at fault, nothing else speaks in its place
    for key, runs in (
        ("indexer_types", {"full": True, "shared": False}),
        ("index_topk_pattern", {"F": True, "S": False}),
    ):
        value = values.get(key)
        if value is None:
            continue
        is_listed = True
        words = {**runs, "full": True, "shared": False}
        if (
            not isinstance(value, list | str)
            or len(value) < layers
            or not words.keys() >= {str(word) for word in value}
        ):
            expected = f"{key} to say {' or '.join(runs)} for each of {layers} layers"
            problems.append(Problem(CONFIG, "", expected, f"{value!r:.80}"))
        else:
            schedules[key] = [words[str(word)] for word in value[:layers]]
    freq, offset = values.get("index_topk_freq"), values.get("index_skip_topk_offset")
    if not is_listed and freq is None and values.get("model_type") in _ALL_RUN:
        schedules[f"the default of {values['model_type']}"] = [True] * layers
    default = "" if offset is not None else ", the default"
    offset = 2 if offset is None else offset
    if freq is not None:
        if type(freq) is not int or freq < 1 or type(offset) is not int:
            expected = "index_topk_freq and index_skip_topk_offset to be integers, the first one positive"
            problems.append(Problem(CONFIG, "", expected, f"{freq!r} and {offset!r}"))
        elif freq > 1 or not is_listed:  # 1 is also the default, which the other two override
            source = f"index_topk_freq = {freq} (index_skip_topk_offset = {offset}{default})"
            schedules[source] = [max(layer - offset + 1, 0) % freq == 0 for layer in range(layers)]
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and len(kinds) >= layers:
        for runs_in in schedules.values():
            runs_in[:] = [runs and "linear" not in str(kind) for runs, kind in zip(runs_in, kinds, strict=False)]
    return schedules
