"""Tables of what was fastest on a GPU: where there is one, it decides instead of `choose`."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from .dispatch import KernelConfig, candidates, next_power_of_2
from .matrix import Kind
from .target import INTERPRETED, Target, target_of

LOGGER = logging.getLogger("indexproj")
# File that is read instead of the one in the user's config folder; empty to read none.
VARIABLE = "INDEXPROJ_TUNED"
# Torch's GEMM rounds otherwise than the kernels: not for less than two percent.
TORCH_MARGIN = 0.98

Pick = KernelConfig | Literal["torch"]

# dtypes of k and gate, by that of gate: those of `project`, and one tensor for both, as vLLM's forward slices it.
OUTS = {"fp32": (torch.bfloat16, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16)}


@dataclass(frozen=True)
class Case:
    """What an entry is for.

    Attributes:
        m: rows of x, which is bf16: a power of two that stands for all that round up to it.
        shape: rows of each matrix, and K.
        kinds: of each matrix.
    """

    m: int
    shape: tuple[int, ...]
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """Median microseconds of one case.

    Attributes:
        pick: the fastest kernel.
        runner_up: the second fastest, None if only one was measured.
        default_us: of the config that `choose` reckons.
        torch_us: of torch's GEMM with bf16 weights, by the keys of OUTS, as far as torch could be measured.
        tried: how many of the kernels in question were launched before time ran out.
        candidates: how many were in question.
    """

    case: Case
    pick: KernelConfig
    us: float
    runner_up: KernelConfig | None
    runner_up_us: float | None
    default_us: float
    torch_us: dict[str, float]
    tried: int
    candidates: int

    @property
    def torch_for(self) -> list[str]:
        """The keys of OUTS for which torch's GEMM is faster, and computes the same: it needs bf16 weights."""
        if set(self.case.kinds) != {Kind.BF16}:
            return []
        return [outs for outs, us in self.torch_us.items() if us < TORCH_MARGIN * self.us]


@dataclass(frozen=True)
class Table:
    """Measurements on one GPU.

    Attributes:
        gpu: name, as torch has it.
        date: of the measurement, YYYY-MM-DD.
        versions: of indexproj, torch and triton.
    """

    gpu: str
    date: str
    versions: dict[str, str]
    entries: tuple[Entry, ...]

    @functools.cached_property
    def by_case(self) -> dict[Case, Entry]:
        return {entry.case: entry for entry in self.entries}

    def find(
        self,
        m: int,
        shape: tuple[int, ...],
        kinds: tuple[int, ...],
        for_torch: tuple[torch.dtype, ...] | None,
    ) -> Pick | None:
        """The fastest for m >= 1 rows of bf16 x; None if that was not measured.

        Args:
            for_torch: dtypes of the outputs; None where torch must not compute them.
        """
        entry = self.by_case.get(Case(next_power_of_2(m), shape, kinds))
        if entry is None:
            return None
        return "torch" if for_torch in [OUTS[name] for name in entry.torch_for] else entry.pick

    @classmethod
    def read(cls, path: Path, gpu: str, target: Target) -> Table:
        """The table of a file, for use on the GPU of that name.

        Raises:
            ValueError: it is no table, was measured on another GPU or with other kernels or versions, or has an entry
                that `indexproj tune` does not write.
            OSError: it cannot be read.
        """
        advice = "run `indexproj tune` again"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for what, expected, had in (
                ("GPU", gpu, found["gpu"]),
                ("kernels or versions", versions(), found["versions"]),
            ):
                if had != expected:
                    raise ValueError(f"it was measured with other {what}: expected {expected}, got {had}")
            entries = tuple(_entry(number, fields, target) for number, fields in enumerate(found.pop("entries"), 1))
            table = cls(**found, entries=entries)
            if len(table.by_case) < len(entries):
                raise ValueError("it has two entries for one case")
        except KeyError as error:
            raise ValueError(f"{path} is no table of `indexproj tune`: {error} is missing; {advice}") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} cannot be used: {error}; {advice}") from error
        return table

    def write(self, path: Path) -> None:
        """One entry a line."""
        head = {"gpu": self.gpu, "date": self.date, "versions": self.versions}
        lines = ",\n".join(f"    {json.dumps(_fields(entry))}" for entry in self.entries)
        text = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.{os.getpid()}")  # so that a disk that is full leaves the old one
        whole.write_text(f'{{\n{text}  "entries": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
        whole.replace(path)


def versions() -> dict[str, str]:
    """What measurements depend on, besides the GPU; kernels and compiler options are known by their text."""
    names = "tile", "gemv", "split_k", "prefill", "launch"
    texts = (Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)
    return {
        "indexproj": version("indexproj"),
        "kernels": hashlib.sha256(b"".join(texts)).hexdigest()[:12],
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def default_path(gpu: str) -> Path:
    """Where the table of a GPU is read from, and written to unless a path is given."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return folder / "indexproj" / f"{'-'.join(gpu.lower().split())}.json"


@functools.cache
def table_of(device: torch.device) -> Table | None:
    """The table for a device, read once; None, with a WARNING that says why, where it is refused."""
    if device.type != "cuda" or INTERPRETED:
        return None
    gpu = torch.cuda.get_device_name(device)
    chosen = os.environ.get(VARIABLE)
    if chosen == "":
        return None
    try:
        path = default_path(gpu) if chosen is None else Path(chosen)
        if chosen is None and not path.exists():
            return None
        table = Table.read(path, gpu, target_of(device))
    except (OSError, ValueError, RuntimeError) as error:  # the last one: there is no home
        LOGGER.warning("indexproj chooses kernels without measurements: %s", error)
        return None
    LOGGER.info("indexproj chooses kernels as measured on %s, by %s", table.date, path)
    return table


def _fields(entry: Entry) -> dict[str, Any]:
    """An entry as it is written, with what follows from it for the reader; `_entry` is the inverse."""
    fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    case = fields.pop("case")
    for name in ("pick", "runner_up"):
        fields[name] = fields[name] and _config_fields(fields[name])
    kinds = [Kind(kind).name for kind in case.kinds]
    return {"m": case.m, "shape": case.shape, "kinds": kinds, **fields, "torch_for": entry.torch_for}


def _config_fields(config: KernelConfig) -> dict[str, Any]:
    fields = {field.name: (getattr(config, field.name), field.default) for field in dataclasses.fields(config)}
    return {name: value for name, (value, default) in fields.items() if value != default}


def _entry(number: int, fields: dict[str, Any], target: Target) -> Entry:
    try:
        m, shape, names, torch_for = (fields.pop(name) for name in ("m", "shape", "kinds", "torch_for"))
        if not isinstance(m, int) or m < 1 or next_power_of_2(m) != m:
            raise ValueError(f"expected a power of two as m, got {m!r}")
        case = Case(m, tuple(shape), tuple(int(Kind[name]) for name in names))
        if not all(type(size) is int and size > 0 for size in shape):
            raise ValueError(f"expected a shape of positive numbers, got {shape}")
        if max(case.kinds, default=Kind.W8A8) >= Kind.W8A8:
            raise ValueError(f"expected kinds that `indexproj tune` measures, got {names}")
        if len(shape) != len(names) + 1:
            raise ValueError(f"expected as many kinds as matrices, got {names} for {shape}")
        pick, runner_up = (fields.pop(name) for name in ("pick", "runner_up"))
        entry = Entry(case, KernelConfig(**pick), runner_up=runner_up and KernelConfig(**runner_up), **fields)
        others = [entry.runner_up_us] if runner_up else []
        times = entry.us, entry.default_us, *entry.torch_us.values(), *others
        are_times = all(isinstance(us, int | float) and 0 < us < 1e9 for us in times)
        if not are_times or not entry.torch_us.keys() <= OUTS.keys():
            raise ValueError(f"expected microseconds, and those of torch by {' and '.join(OUTS)}, got {fields}")
        counts = entry.tried, entry.candidates
        if not (all(type(count) is int for count in counts) and 1 <= entry.tried <= entry.candidates):
            raise ValueError(f"expected how many kernels were tried, of how many candidates, got {counts}")
        if torch_for != entry.torch_for:
            raise ValueError(f"expected torch_for to be {entry.torch_for} by what was measured, got {torch_for}")
        if entry.pick not in candidates(m, case.shape, case.kinds, target):
            raise ValueError(f"expected a kernel that `indexproj tune` tries, got {entry.pick}")
        return entry
    except KeyError as error:
        raise ValueError(f"entry {number}: {error} is missing or unknown") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"entry {number}: {error}") from error
