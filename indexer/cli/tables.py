"""What audit and verify print as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from .verify import Measurement


def layer_table(*columns: str) -> Table:
    table = Table()
    for column in ("layer", "wk", "weights_proj"):
        table.add_column(column, no_wrap=True)
    for column in ("MB kept", "MB upcast", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def layer_cells(layer: dict[str, Any]) -> tuple[str, ...]:
    name = f"{layer['layer']} (MTP)" if layer["is_mtp"] else f"{layer['layer']}"
    matrices = layer["wk"], layer["weights_proj"]
    encodings = (f"{m['encoding'] or '?'}{' to BF16' if m['in_memory'] == 'bf16' else ''}" for m in matrices)
    sizes = (sum(m[key] for m in matrices) for key in ("kept_bytes", "upcast_bytes"))
    return (name, *encodings, *(f"{size / 1e6:.2f}" if layer["loads"] else "-" for size in sizes))


def shape_cell(layer: dict[str, Any]) -> str:
    if not layer["loads"]:
        return "-"
    (d, k), (h, _) = layer["wk"]["shape"], layer["weights_proj"]["shape"]
    return f"{d}, {h}, {k}"


def measurement_cells(measurement: Measurement) -> tuple[str, ...]:
    ours, upcast = measurement.error, measurement.upcast_error
    closer = f"{upcast / ours:,.0f} times" if upcast > ours > 0 else "-"
    return (
        f"{measurement.m}",
        measurement.regime,
        f"{ours:.1e}",
        f"{upcast:.1e}" if upcast else "none",
        closer,
        "ok" if measurement.passed else "WRONG",
    )
