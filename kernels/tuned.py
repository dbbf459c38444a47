"""Tables of what was fastest on a GPU: where there is one, it decides instead of `choose`."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from .dispatch import KernelConfig, next_power_of_2
from .matrix import Kind

LOGGER = logging.getLogger("indexproj")
# File that is read instead of the one in the user's config folder; empty to read none.
VARIABLE = "INDEXPROJ_TUNED"
LARGEST_GRID = 65535  # programs in a grid's second and third direction

Pick = KernelConfig | Literal["torch"]


@dataclass(frozen=True)
class Case:
    """What an entry is for.

    Attributes:
        m: rows of x, a power of two; it stands for all that round up to it.
        shape: rows of each matrix, and K.
        kinds: of each matrix.
        outs: dtype of each output. x is bf16.
    """

    m: int
    shape: tuple[int, ...]
    kinds: tuple[int, ...]
    outs: tuple[torch.dtype, ...]

    @property
    def is_for_torch(self) -> bool:
        """Whether torch's GEMM computes the same, without a second copy of the weights."""
        return set(self.kinds) == {Kind.BF16}


@dataclass(frozen=True)
class Entry:
    """Median microseconds of one case; None where there was nothing to measure.

    Attributes:
        pick: the fastest, "torch" for torch's GEMM.
        runner_up: the second fastest.
        default_us: of the config that `choose` reckons.
        torch_us: of torch's GEMM, of bf16 weights even where pick cannot be it.
    """

    case: Case
    pick: Pick
    us: float
    runner_up: Pick | None
    runner_up_us: float | None
    default_us: float | None
    torch_us: float | None


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
    def picks(self) -> dict[Case, Pick]:
        return {entry.case: entry.pick for entry in self.entries}

    def find(
        self, m: int, shape: tuple[int, ...], kinds: tuple[int, ...], outs: tuple[torch.dtype, ...]
    ) -> Pick | None:
        """The fastest for m >= 1 rows of bf16 x; None if that was not measured."""
        return self.picks.get(Case(next_power_of_2(m), shape, kinds, outs))

    @classmethod
    def read(cls, path: Path, gpu: str) -> Table:
        """The table of a file, for use on that GPU.

        Raises:
            ValueError: it is no table, was measured on another GPU or with other versions, or has an impossible entry.
            OSError: it cannot be read.
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            entries = tuple(_entry(number, fields) for number, fields in enumerate(found.pop("entries"), 1))
            table = cls(**found, entries=entries)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is no table of `indexproj tune`: {error}") from error
        for what, expected, had in (("GPU", gpu, table.gpu), ("versions", versions(), table.versions)):
            if had != expected:
                raise ValueError(
                    f"{path} was measured with another {what}: expected {expected}, got {had}; run `indexproj tune`"
                )
        if len(table.picks) < len(entries):
            raise ValueError(f"{path} has two entries for one case")
        return table

    def write(self, path: Path) -> None:
        """One entry a line."""
        head = {"gpu": self.gpu, "date": self.date, "versions": self.versions}
        lines = ",\n".join(f"    {json.dumps(_fields(entry))}" for entry in self.entries)
        text = "".join(f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{\n{text}  "entries": [\n{lines}\n  ]\n}}\n', encoding="utf-8")


def versions() -> dict[str, str]:
    """What measurements depend on, besides the GPU."""
    return {"indexproj": version("indexproj"), "torch": torch.__version__, "triton": triton.__version__}


def default_path(gpu: str) -> Path:
    """Where the table of a GPU is read from, and written to unless a path is given."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return folder / "indexproj" / f"{'-'.join(gpu.lower().split())}.json"


@functools.cache
def table_of(device: torch.device) -> Table | None:
    """The table for a device, read once; None, with a WARNING that says why, where it is refused."""
    if device.type != "cuda":
        return None
    gpu = torch.cuda.get_device_name(device)
    chosen = os.environ.get(VARIABLE)
    path = default_path(gpu) if chosen is None else Path(chosen)
    if chosen == "" or (chosen is None and not path.exists()):
        return None
    try:
        table = Table.read(path, gpu)
    except (OSError, ValueError) as error:
        LOGGER.warning("indexproj chooses kernels without measurements: %s", error)
        return None
    LOGGER.info("indexproj chooses kernels as measured on %s, by %s", table.date, path)
    return table


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _fields(entry: Entry) -> dict[str, Any]:
    """An entry as it is written; `_entry` is the inverse."""
    case, names = entry.case, {dtype: name for name, dtype in _DTYPES.items()}
    return {
        "m": case.m,
        "shape": case.shape,
        "kinds": [Kind(kind).name for kind in case.kinds],
        "outs": [names[dtype] for dtype in case.outs],
        "pick": _pick_fields(entry.pick),
        "us": entry.us,
        "runner_up": entry.runner_up and _pick_fields(entry.runner_up),
        "runner_up_us": entry.runner_up_us,
        "default_us": entry.default_us,
        "torch_us": entry.torch_us,
    }


def _pick_fields(pick: Pick) -> dict[str, Any] | str:
    if isinstance(pick, str):
        return pick
    fields = {field.name: (getattr(pick, field.name), field.default) for field in dataclasses.fields(pick)}
    return {name: value for name, (value, default) in fields.items() if value != default}


def _entry(number: int, fields: dict[str, Any]) -> Entry:
    try:
        kinds, outs = (tuple(fields.pop(name)) for name in ("kinds", "outs"))
        case = Case(
            fields.pop("m"),
            tuple(fields.pop("shape")),
            tuple(int(Kind[kind]) for kind in kinds),
            tuple(_DTYPES[dtype] for dtype in outs),
        )
        pick, runner_up = (_pick(fields.pop(name)) for name in ("pick", "runner_up"))
        if pick is None or (isinstance(pick, str) and not (pick == "torch" and case.is_for_torch)):
            raise ValueError(f"expected a config as its pick, or torch where all weights are BF16, got {pick}")
        if not isinstance(case.m, int) or case.m < 1 or next_power_of_2(case.m) != case.m:
            raise ValueError(f"expected a power of two as m, got {case.m}")
        *ns, _ = case.shape
        if not len(ns) == len(kinds) == len(outs):
            raise ValueError(f"expected one kind and dtype for each of {len(ns)} matrices")
        if isinstance(pick, KernelConfig) and max(pick.grid(case.m, *ns)[1:]) > LARGEST_GRID:
            raise ValueError(f"{pick} needs a larger grid than GPUs have")
        return Entry(case, pick, runner_up=runner_up, **fields)
    except KeyError as error:
        raise ValueError(f"entry {number}: {error} is missing or unknown") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"entry {number}: {error}") from error


def _pick(fields: dict[str, Any] | str | None) -> Any:
    return KernelConfig(**fields) if isinstance(fields, dict) else fields
