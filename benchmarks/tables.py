"""What compile and tune print as tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:

    from .gates import Row


def compiled_tables(found: Iterable[Row]) -> Iterator[Table]:
    """One for each target, shape, pair and gate, of rows that stand together."""
    for title, group in groupby(found, lambda row: f"{row.target}, {row.shape}: {row.pair}; gate in {row.gate}"):
        yield _compiled_table(title, group)


def _compiled_table(title: str, found: Iterable[Row]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("kernel", no_wrap=True)
    numbers = ("M", "programs", "per SM", "registers", "shared", "MMA", "W", "x", "KB each", "loads", "verdict")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    for row in found:
        cells = (
            row.m,
            row.programs,
            row.per_sm,
            row.registers,
            row.shared_memory,
            row.mma,
            row.weight_reads,
            row.x_reads,
        )
        loads = " ".join(f"{count}x{size}" for size, count in row.loads.items())
        table.add_row(
            row.kernel, *map(str, cells), f"{row.bytes_per_program / 1e3:.1f}", loads, "faulty" if row.faults else "ok"
        )
    return table


def tuned_tables(shape: str, entries: Iterable[Entry]) -> Iterator[Table]:
    """One for each pair of encodings, of entries for one shape that stand together."""
    for kinds, group in groupby(entries, lambda entry: entry.case.kinds):
        table = Table(title=f"{shape}: {', '.join(kind.name for kind in kinds)}; us", title_justify="left")
        for column in ("M", "fastest", "", "runner-up", "", "untuned", "torch, fp32 gate", "torch, bf16 gate", "tried"):
            table.add_column(column, justify="left" if column in ("fastest", "runner-up") else "right", no_wrap=True)
        for entry in group:
            times = (entry.runner_up_us, entry.default_us, entry.torch_us.get("fp32"), entry.torch_us.get("bf16"))
            runner_up, *others = (f"{us:.2f}" if us is not None else "-" for us in times)
            torch_for = f", torch for {' and '.join(entry.torch_for)}" if entry.torch_for else ""
            table.add_row(
                str(entry.case.m),
                f"{entry.pick}{torch_for}",
                f"{entry.us:.2f}",
                str(entry.runner_up or "-"),
                runner_up,
                *others,
                f"{entry.tried} of {entry.candidates}",
            )
        yield table
