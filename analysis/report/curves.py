"""Small curves over loops as inline SVG: lines told apart by dash and colour, whiskers, a name for readers.

No script, no font of its own; numbers that are missing leave a gap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite, log10

from markupsafe import Markup

WIDTH, HEIGHT = 290, 150
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 30
DASHES = {"-": "", "--": "6 3", "-.": "6 2 1.5 2", ":": "1.5 2.5"}
"""Matplotlib's line styles as SVG's."""


@dataclass(frozen=True)
class Line:
    """One line, a value a loop, with `low` and `high` where there are whiskers; `style` is matplotlib's."""

    name: str
    values: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    color: str = "#08306b"
    style: str = "-"

    @property
    def dash(self) -> str:
        """SVG's dash array."""
        return DASHES.get(self.style, "")


@dataclass(frozen=True)
class Curves:
    """Lines over `loops` (0 = first); `says` is what the picture says to who cannot see it."""

    says: str
    loops: Sequence[int]
    lines: Sequence[Line]
    bottom: float | None = None
    top: float | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest value of the axis, 0 inside."""
        every = [value for line in self.lines for part in (line.values, line.low, line.high) for value in part]
        known = [value for value in every if isfinite(value)] or [0.0]
        low = min(0.0, *known) if self.bottom is None else self.bottom
        high = max(0.0, *known) if self.top is None else self.top
        return (low, high) if high > low else (low, low + 1.0)

    def svg(self) -> Markup:
        """The picture."""
        low, high = self.bounds
        parts = [Markup('<svg class="curves" viewBox="0 0 {0} {1}" width="{0}" height="{1}" role="img" '
                        'aria-label="{2}">').format(WIDTH, HEIGHT, self.says)]  # fmt: skip
        for value in _ticks(low, high):
            y = self._y(value)
            kind = "zero" if value == 0 else "grid"
            parts.append(Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
                         .format(kind, LEFT, WIDTH - RIGHT, y, y))  # fmt: skip
            parts.append(
                Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(LEFT - 5, y + 3.5, _told(value))
            )
        for number, loop in enumerate(self.loops):
            parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>')
                         .format(self._x(number), HEIGHT - BOTTOM + 14, loop))  # fmt: skip
        parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">loop (0 = first)</text>')
                     .format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3))  # fmt: skip
        parts += [self._line(line) for line in self.lines]
        return Markup("").join([*parts, Markup("</svg>")])

    def _line(self, line: Line) -> Markup:
        places = [(self._x(number), self._y(value)) if isfinite(value) else None
                  for number, value in enumerate(line.values)]  # fmt: skip
        found = [Markup('<polyline points="{}" stroke="{}" stroke-dasharray="{}"/>')
                 .format(" ".join(f"{x},{y}" for x, y in run), line.color, line.dash or "none")
                 for run in _runs(places) if len(run) > 1]  # fmt: skip
        for number, place in enumerate(places):
            if place is None:
                continue
            found.append(Markup('<circle cx="{}" cy="{}" r="2.2" fill="{}"/>').format(*place, line.color))
            if len(line.low) and isfinite(line.low[number]) and isfinite(line.high[number]):
                ends = [self._y(bound) for bound in (line.low[number], line.high[number])]
                found.append(Markup('<line class="bar" x1="{0}" x2="{0}" y1="{1}" y2="{2}" stroke="{3}"/>')
                             .format(place[0], *ends, line.color))  # fmt: skip
        return Markup("").join(found)

    def _x(self, number: int) -> float:
        span = WIDTH - LEFT - RIGHT
        return round(LEFT + span * (number + 0.5) / len(self.loops), 1)

    def _y(self, value: float) -> float:
        low, high = self.bounds
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP), 1)


def _runs(places: Sequence[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """Neighbouring places without a gap."""
    found: list[list[tuple[float, float]]] = [[]]
    for place in places:
        if place is None:
            found.append([])
        else:
            found[-1].append(place)
    return found


def _ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers in low..high, 0 among them if it is inside."""
    rough = (high - low) / 4
    size = 10 ** floor(log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    first = -floor(-low / step)
    return [round(number * step, 10) for number in range(first, floor(high / step + 1e-9) + 1)]


def _told(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def swatch(line: Line) -> Markup:
    """A piece of a line, for the legend."""
    return Markup('<svg class="swatch-line" viewBox="0 0 26 8" width="26" height="8" aria-hidden="true">'
                  '<line x1="0" x2="26" y1="4" y2="4" stroke="{}" stroke-dasharray="{}"/></svg>'
                  ).format(line.color, line.dash or "none")  # fmt: skip


def signed(value: float) -> str:
    """A change, with its sign."""
    return f"{value:+.2f}".replace("-", "−")
