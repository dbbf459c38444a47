"""config.json: sizes and schedules of the indexers. They are checked against the tensors and never replace them."""

import contextlib
import fnmatch
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .headers import FUSED, GATE, WK, Header
from .problems import Problem

CONFIG = "config.json"
_QUANTIZATION = ("quantization_config", "compression_config")
# auto-round (two), compressed-tensors, Quark (two)
_TRANSFORMS = ("rotation_config", "spinquant_config", "transform_config", "online_r1_rotation", "online_config")
# Key -> values under which uint8 scales are E8M0. auto-round's scale_dtype may be that of its computation.
_E8M0 = r"none|(torch\.)?(uint8|\w*e8m0\w*)"
_FLOAT = r"(torch\.)?(b?float|bf|fp)(16|32|64)?"
_SCALE_FORMATS = {"scale_format": _E8M0, "scale_fmt": _E8M0, "scale_dtype": f"{_E8M0}|{_FLOAT}"}
_FOREIGN_CODES = re.compile(r"(opt_rtn_)?mx_?int\w*")  # auto-round's MXINT4
_ACTIVATIONS = re.compile(r"act_\w+|activation\w*|(input|output)_(tensors|activations)|kv_cache\w*|bias")
_BY_LAYER = ("extra_config", "layer_quant_config")  # auto-round's and Quark's entries: name or pattern -> settings
_PREFIXES = ("", "model.", "language_model.model.", "model.language_model.")  # of "layers.", which one varies
_PLAIN = re.compile(r"[\w.-]+")  # a name, or a regular expression in which only dots are special
_RUNS = {"full": True, "F": True, "shared": False, "S": False}
_ALL_RUN = ("deepseek_v32", "glm_moe_dsa")  # without a schedule, all hidden layers of these models run an indexer
_SIZES = ("num_hidden_layers", "num_nextn_predict_layers", "hidden_size", "index_head_dim", "index_n_heads")


class Scope(NamedTuple):
    """The modules that an entry of quantization_config concerns."""

    targets: Sequence[Any]  # (parts of) names, classes, regular expressions with or without "re:", globs, layer numbers
    ignore: Sequence[Any] = ()  # names, or "re:" and a regular expression

    def may_hold(self, module: str) -> bool:
        """False only if no target can mean a module such as "model.layers.0.self_attn.indexer.wk", or it is ignored."""
        names, leaf = _spellings(module), module.rpartition(".")[2]
        ignored = names if module[: module.rfind("layers.")] in _PREFIXES else (module,)
        try:
            for each in filter(lambda each: isinstance(each, str), self.ignore):
                if each in ignored or (each.startswith("re:") and any(re.match(each[3:], name) for name in ignored)):
                    return False
            if leaf == FUSED:
                names += tuple(name.replace(FUSED, part) for name in names for part in (WK, GATE))
            targets = [each.replace(FUSED, leaf) if isinstance(each, str) else each for each in self.targets]
            return any(_may_mean(target, names) for target in targets)
        except (re.error, OverflowError):
            return True


@functools.lru_cache(maxsize=256)
def _spellings(module: str) -> tuple[str, ...]:
    """Names that a quantizer may know the module by, its own first: with other prefixes, and in other releases."""
    names = [module, *(prefix + module[max(module.rfind("layers."), 0) :] for prefix in _PREFIXES)]
    return tuple(dict.fromkeys([*names, *(name.replace(".attn.", ".self_attn.") for name in names)]))


def _may_mean(target: Any, names: tuple[str, ...]) -> bool:
    is_mtp = "mtp" in names[0]
    if type(target) is int:
        return is_mtp or any(f"layers.{target}." in name for name in names)
    if not isinstance(target, str) or target[:1].isupper():  # unknown, or a class
        return True
    if "{" in target and not target.startswith("re:"):  # a glob with alternatives, or a regular expression
        return True
    if is_mtp and "layers" in target:  # by another number
        return True
    if _PLAIN.fullmatch(target):  # quantizers write an entry per expert, and most of them end here
        longest = max(target.split("."), key=len)
        if not any(longest in name for name in names):
            return False
    forms = [] if target.startswith("*") else [target.removeprefix("re:")]
    forms += [] if target.startswith("re:") else [fnmatch.translate(f"*{target}")]
    return any(re.search(form, name) for form in forms for name in names)


class Veto(NamedTuple):
    """An entry of quantization_config that says what dtypes and shapes cannot show, and that no encoding describes."""

    expected: str
    found: str
    scopes: tuple[Scope, ...]  # counts only for modules in all of them
    role: str | None = None  # counts only for weights with a uint8 tensor in that role: bytes may mean anything

    def concerns(self, module: str, headers: Mapping[str, Header]) -> bool:
        """True if it may be about a matrix with these headers by role."""
        is_meant = self.role is None or (self.role in headers and headers[self.role].dtype == "U8")
        return is_meant and all(scope.may_hold(module) for scope in self.scopes)


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
    vetoes: Sequence[Veto] = ()
    problems: Sequence[Problem] = ()
    schedule_problems: Sequence[Problem] = ()  # these concern the model as a whole, not a single layer

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Config":
        """Reads the content of config.json; text_config, which multimodal models nest, takes precedence.

        Raises TypeError for anything but a mapping.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"config: expected the content of config.json as a dict, got {type(values).__name__}")
        nested = values.get("text_config")
        text: Mapping[str, Any] = nested if isinstance(nested, dict) else {}
        vetoes = tuple(_vetoes(values))
        values = {**values, **{key: value for key, value in text.items() if value is not None}}
        problems: list[Problem] = []
        schedule_problems: list[Problem] = []
        sizes: dict[str, Any] = {}
        for key in _SIZES:
            value = values.get(key)
            if type(value) is int and 0 <= value < 1_000_000:
                sizes[key] = value
            elif value is not None:
                problem = Problem(CONFIG, "", f"{key} to be an integer from 0 to 999999", f"{value!r:.80}")
                (schedule_problems if key == "num_nextn_predict_layers" else problems).append(problem)
        schedules = _schedules(values, sizes.get("num_hidden_layers"), schedule_problems)
        return cls(**sizes, schedules=schedules, vetoes=vetoes, problems=problems, schedule_problems=schedule_problems)

    @property
    def schedule(self) -> Sequence[bool]:
        """The first schedule, which counts; empty if there is none."""
        return next(iter(self.schedules.values()), ())


def _vetoes(values: Mapping[str, Any]) -> Iterator[Veto]:
    """Searches all levels of quantization_config, also those of single layers and groups of them."""
    places = {"": values, **{f"{key}.": each for key, each in values.items() if isinstance(each, dict)}}
    entries: list[tuple[str, str, Any, tuple[Scope, ...]]]
    entries = [(key, f"{place}{key}", at.get(key), ()) for place, at in places.items() for key in _QUANTIZATION]
    while entries:
        key, path, value, scopes = entries.pop()
        word = value.lower() if isinstance(value, str) else "none" if value is None else "unknown"
        expected, role, concerned = "", None, [scopes]
        if _ACTIVATIONS.fullmatch(key):
            continue
        if key in _TRANSFORMS:
            expected = "weights that multiply x as it comes, without a rotation or transform"
            concerned = [(*scopes, scope) for scope in _transformed(value)]
        elif key in _SCALE_FORMATS and not re.fullmatch(_SCALE_FORMATS[key], word):
            expected, role = "scales in E8M0, as uint8 scales are read", "scale"
        elif _FOREIGN_CODES.fullmatch(word):
            expected, role = "codes in E2M1", "weight"
        elif isinstance(value, dict):
            scopes = (*scopes, *filter(None, [_scope(value)]))
            for name, each in value.items():
                entries.append((name, f"{path}.{name}", each, (*scopes, Scope([name])) if key in _BY_LAYER else scopes))
        elif isinstance(value, list):
            entries += [("", f"{path}.{number}", each, scopes) for number, each in enumerate(value)]
        if expected:
            shown = "{...}" if isinstance(value, dict | list) else f"{json.dumps(value, default=str):.80}"
            yield from (Veto(expected, f"{path} = {shown} in {CONFIG}", each, role) for each in concerned)


def _transformed(value: Any) -> list[Scope]:
    """What a rotation or transform concerns: nothing if it is off, all modules if its form is unknown."""
    is_off = isinstance(value, dict) and False in (value.get("enable"), value.get("enabled"))
    if is_off or value in (None, False, "", "none", {}, []):
        return []
    parts = [value]
    if isinstance(value, dict) and value.keys() == {"config_groups"}:  # compressed-tensors
        with contextlib.suppress(AttributeError, KeyError, TypeError):
            parts = [part for group in (value["config_groups"] or {}).values() for part in group["apply"]]
    return [_scope(part) or Scope([None]) for part in parts]


def _scope(value: Any) -> Scope | None:
    """The scope that an entry states."""
    if not isinstance(value, dict):
        return None
    targets, ignore = (each if isinstance(each, list) else [each] for each in map(value.get, ("targets", "ignore")))
    layers = value.get("layers")
    if "targets" not in value and isinstance(layers, list) and all(type(each) is int for each in layers):
        return Scope(layers, ignore)
    return Scope(targets, ignore) if "targets" in value else None


def _schedules(values: Mapping[str, Any], layers: int | None, problems: list[Problem]) -> dict[str, list[bool]]:
    """In order of precedence: indexer_types, index_topk_pattern, index_topk_freq, as in transformers and vLLM."""
    if layers is None or ("linear_attn_config" in values and "layer_types" not in values):
        return {}  # without layer_types, the layers that have an indexer are unknown
    schedules: dict[str, list[bool]] = {}
    lists = [key for key in ("indexer_types", "index_topk_pattern") if values.get(key) is not None]
    for key in lists:
        value = values[key]
        if isinstance(value, list | str) and len(value) >= layers and all(str(word) in _RUNS for word in value):
            schedules[key] = [_RUNS[str(word)] for word in value[:layers]]
        else:
            expected = f"{key} to say full or shared (F or S) for each of {layers} layers"
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
