"""Records, printed: TSV with six digits into a pipe, three digits and no wider than the screen on a terminal."""

import csv
import io
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

UNITS = {
    "in nats": ("nll", "nelbo", "test_nelbo", "kl", "kl_reverse", "excess_kl", "judge_nll", "log_odds", "null"),
    "in shares of 1": ("mass", "mass_with_self", "chance", "accuracy", "solve_rate", "mask_ratio", "flops_share"),
    "in FLOPs": ("flops", "training_flops", "flops_per_token"),
    "as multiples of chance": ("lift", "lift_with_self"),
}
"""What columns count in that mean one thing wherever they stand."""
GAP = 2
NARROW = 20
"""Characters below which no text is broken into lines."""
AT_MOST = 60
"""Rows of a measure that a terminal shows, as pandas does."""


def show_frame(frame: "pd.DataFrame") -> None:
    """Print what a measure gave; on a terminal the loops come first, and rows beyond `AT_MOST` are counted."""
    if sys.stdout.isatty() and len(frame) > AT_MOST:
        if "loop" in frame:
            frame = frame.sort_values("loop", key=lambda loop: loop.isna(), kind="stable")
        shown = frame.head(AT_MOST)
        show(list(frame.columns), shown.itertuples(index=False))
        print(f"... {len(frame) - AT_MOST} more of {len(frame)} rows (a pipe takes all of them)")
        return
    show(list(frame.columns), frame.itertuples(index=False))


def show(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print records."""
    rows = [tuple(row) for row in rows]
    if not sys.stdout.isatty():
        print(tsv([columns, *rows]), end="")
        return
    from rich.console import Console

    console = Console()
    for line in Folded.of(columns, rows, console.width).lines():
        console.out(line, highlight=False)


def tsv(rows: Iterable[Sequence[Any]]) -> str:
    """Records as TSV, one a line; a field that holds quotes is quoted, as pandas and spreadsheets read it."""
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows(map(cell, row) for row in rows)
    return text.getvalue()


def cell(value: Any) -> str:
    """A value as one field of a line."""
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.6g}"
    return CONTROL.sub(" ", str(value))


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""What breaks lines and fields, or a terminal."""


def read(value: Any) -> str:
    """A value as people read it: three digits, a dash for what there is none of."""
    if isinstance(value, float):
        if math.isnan(value):
            return "-"
        plain = abs(value) < 1e6 and (value.is_integer() or abs(value) >= 1e3)
        return f"{value:.0f}" if plain else f"{value:#.3g}".rstrip(".")
    return "-" if str(value) == "<NA>" else cell(value)


@dataclass(frozen=True)
class Folded:
    """A table that fits a screen: what is the same in all rows is said once, and columns go before words break."""

    columns: list[str]
    cells: list[list[str]]
    """By column."""
    numeric: list[bool]
    widths: list[int]
    said: dict[str, str]
    left_out: list[str]
    width: int

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[Sequence[Any]], width: int) -> "Folded":
        """Fold records to `width` characters; one record that is too wide becomes a list of its fields."""
        cells = [[read(row[i]) for row in rows] for i in range(len(columns))]
        numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
        names, least = list(columns), [_least(c, v) for c, v in zip(columns, cells, strict=True)]
        if len(rows) == 1 and _wide(least) > width:
            fields = [read(value) for value in rows[0]]
            return cls.of(["field", "value"], list(zip(names, fields, strict=True)), width)
        keep, said = list(range(len(names))), {}
        if _wide(least) > width:
            same = [i for i in keep if len(rows) > 1 and len(set(cells[i])) == 1]
            said = {names[i]: cells[i][0] for i in same}
            keep = [i for i in keep if i not in same] or keep[:1]
        while len(keep) > 1 and _wide([least[i] for i in keep]) > width:
            errors = [i for i in keep if names[i].endswith(("_se", "standard_error"))]
            keep.remove((errors or keep)[-1])
        widths = [max(map(len, [names[i], *cells[i]])) for i in keep]
        while _wide(widths) > width:
            spare = [w - least[i] for i, w in zip(keep, widths, strict=True)]
            if max(spare) <= 0:
                break  # one column, of words longer than the screen
            widest = max(range(len(keep)), key=lambda j: (spare[j] > 0) * widths[j])
            widths[widest] -= 1
        left_out = [name for i, name in enumerate(names) if i not in keep and name not in said]
        shown = [cells[i] for i in keep], [numeric[i] for i in keep]
        return cls([names[i] for i in keep], *shown, widths, said, left_out, width)

    def lines(self) -> list[str]:
        """What is printed."""
        lines = _filled([f"{name} {value}" for name, value in self.said.items()], "in all rows: ", self.width)
        for fields in [self.columns, *map(list, zip(*self.cells, strict=True))]:
            broken = [_broken(field, width) for field, width in zip(fields, self.widths, strict=True)]
            for i in range(max(map(len, broken))):
                parts = [part[i] if i < len(part) else "" for part in broken]
                lines.append(self._line(parts))
        lines += _filled(self._units(), "units: ", self.width)
        return lines + _filled(self.left_out, "no room for (all of it goes into a pipe): ", self.width)

    def _line(self, parts: list[str]) -> str:
        aligned = zip(parts, self.widths, self.numeric, strict=True)
        return (" " * GAP).join(p.rjust(w) if n else p.ljust(w) for p, w, n in aligned).rstrip()

    def _units(self) -> list[str]:
        found = []
        for unit, of in UNITS.items():
            names = [name for name in self.columns if name in of]
            found += [f"{', '.join(names)} {unit}"] if names else []
        return found


def _least(name: str, cells: list[str]) -> int:
    """Characters that a column needs: its longest word, and enough for a line of text."""
    whole = max(map(len, [name, *cells]))
    return max(min(whole, NARROW), *(len(word) for text in [name, *cells] for word in text.split(" ")))


def _wide(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _broken(text: str, width: int) -> list[str]:
    """Text in lines of at most `width` characters; a longer word stays whole."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}" if lines[-1] else word
    return lines


def _filled(items: list[str], head: str, width: int) -> list[str]:
    return _broken(f"{head}{'; '.join(items)}", width) if items else []
