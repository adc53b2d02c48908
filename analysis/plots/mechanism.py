"""Plots of what loops do: shares of a logit difference and effects of patched activations, by loop."""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from loopmdm.analysis.plots.style import of_rows, root_norm

MANY = 16
"""Columns beyond which numbers do not fit into cells."""
SMALL = 0.02
"""Share of the largest number below which no sign is written."""
PARTS = ("attention", "attention bias", "attn_out", "mlp", "mlp_out", "embed", "bias", "rest", "interaction")
SHOWN = {"attention bias": "attention's bias", "mlp": "MLP", "mlp_out": "MLP", "attn_out": "attention"}
ENDS = {"embed": -1, "bias": 1, "rest": 2, "interaction": 2}
"""Which side of the layers a part of no layer stands on."""


@of_rows
def plot_attribution(df: pd.DataFrame, *, most: float | None = None, ax: Axes | None = None, **kws: Any) -> Axes:
    """What heads and MLPs of each loop add to the logit difference: components x applications, nats in the cells.

    `df`: rows of one model, mask ratio and read: part segment loop layer head value. Signs are written, so that
    the map is read without colours, too. `kws` go to `imshow`.
    """
    label = "share of the logit difference\n(nats, square-root scale)"
    return _map(ax or plt.gca(), df, "part", label, most, **kws)


@of_rows
def plot_patching(
    df: pd.DataFrame, *, value: str = "value", most: float | None = None, ax: Axes | None = None, **kws: Any
) -> Axes:
    """What patched heads, attention and MLP outputs change: components x applications, nats in the cells.

    `df`: rows of one model, mask ratio and place: component segment loop layer head, and the column `value`.
    `kws` go to `imshow`.
    """
    label = "effect on the logit difference\n(nats, square-root scale)"
    return _map(ax or plt.gca(), df.assign(value=df[value]), "component", label, most, **kws)


def _map(ax: Axes, df: pd.DataFrame, kind: str, label: str, most: float | None, **kws: Any) -> Axes:
    """Signed numbers on a scale whose middle is 0 and whose ends are -`most` and `most`."""
    table = _table(df, kind)
    values = table.to_numpy(dtype=float)
    most = most or max(float(np.nanmax(np.abs(values))), 1e-12)
    look = {"cmap": "PuOr_r", "norm": root_norm(most, signed=True), "aspect": "auto"}
    image = ax.imshow(values, **look | kws)
    for (row, column), number in np.ndenumerate(values):
        if np.isfinite(number) and (told := _written(number, most, few=table.shape[1] <= MANY)):
            ax.text(column, row, told, ha="center", va="center", fontsize=5.2,
                    color="white" if abs(number) > 0.36 * most else "black")  # fmt: skip
    ax.set_xticks(range(table.shape[1]), list(table.columns), rotation=90 if table.shape[1] > MANY else 0)
    ax.set_yticks(range(table.shape[0]), list(table.index))
    ax.set(
        ylabel="component",
        xlabel="where it is written (L: layer before or after the loops; numbers: loops, 0 = first)",
    )
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, label=label)
    steps = [float(f"{share * most:.1g}") for share in (0.05, 0.3, 0.7)]
    bar.set_ticks([-step for step in reversed(steps)] + [0.0, *steps])
    bar.ax.yaxis.set_major_formatter("{x:g}")
    bar.ax.minorticks_off()
    return ax


def _table(df: pd.DataFrame, kind: str) -> pd.DataFrame:
    """Components as rows, applications as columns, both in running order."""
    rows, columns = _row_order(df, kind), _column_order(df, kind)
    found = pd.DataFrame(np.nan, index=list(rows.values()), columns=list(columns.values()))
    for item in df.to_dict("records"):
        found.loc[rows[_row(item, kind)], columns[_column(item, kind)]] = item["value"]
    return found


def _row(item: dict, kind: str) -> tuple[int, int]:
    if not pd.isna(item["head"]):
        return 0, int(item["head"])
    return (2, 0) if pd.isna(item["layer"]) else (1, PARTS.index(item[kind]))


def _row_order(df: pd.DataFrame, kind: str) -> dict[tuple[int, int], str]:
    found = {}
    for item in df.to_dict("records"):
        part = item[kind]
        name = "others" if pd.isna(item["layer"]) else SHOWN.get(part, part)
        found[_row(item, kind)] = name if pd.isna(item["head"]) else f"head {int(item['head'])}"
    return dict(sorted(found.items()))


def _column(item: dict, kind: str) -> tuple[int, int, int]:
    if pd.isna(item["layer"]):
        return 3 * ENDS[item[kind]], 0, 0
    segment = {"prelude": -1, "loop": 0, "coda": 1}[item["segment"]]
    return segment, 0 if pd.isna(item["loop"]) else int(item["loop"]), int(item["layer"])


def _column_order(df: pd.DataFrame, kind: str) -> dict[tuple[int, int, int], str]:
    several, found = df.loc[df["segment"] == "loop", "layer"].nunique() > 1, {}
    for item in df.to_dict("records"):
        if pd.isna(item["layer"]):
            name = item[kind] if item[kind] != "interaction" else "inter-\naction"
        elif pd.isna(item["loop"]):
            name = f"L{int(item['layer'])}"
        else:
            name = str(int(item["loop"])) + (f"·L{int(item['layer'])}" if several else "")
        found[_column(item, kind)] = name
    return dict(sorted(found.items()))


def _written(number: float, most: float, few: bool) -> str:
    """The number where there is room, else the sign of what is not small: in grey both ends are dark."""
    if not few:
        return "" if abs(number) < SMALL * most else "+" if number > 0 else "-"
    digits = 0 if most >= 100 else 1 if most >= 10 else 2
    return f"{number:+.{digits}f}" if abs(number) >= 0.5 * 10.0**-digits else "0"
