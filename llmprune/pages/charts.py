"""Charts of a page: lines and points, as SVG of our own, with values on hover and by keyboard."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llmprune.pages.document import Markup, element, escaped, joined

COLOURS = 6  # of series; style.css has as many
_WIDTH, _HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 42
_TICKS = 6
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "12 4", "1 4")  # so that lines differ without colour, too


class Point(NamedTuple):
    """A point of a chart.

    Attributes:
        x: its place.
        y: its value.
        error: the length of its error bar to each side; 0 for none.
        note: what is said of it beside its values.
    """

    x: float
    y: float
    error: float = 0.0
    note: str = ""


Series = Mapping[str, Sequence[Point]]


def lines(
    series: Series, names: tuple[str, str], caption: str, *, log: bool = False, zero: bool = False
) -> Markup:
    """A line for each series through its points, by x.

    Args:
        series: the points by the name of the series; values that are not finite are left out.
        names: of the axes, x and y.
        caption: what the chart shows.
        log: whether the y axis is logarithmic; values must be above 0 then, others are left out.
        zero: whether the y axis begins at 0.
    """
    return _chart(series, names, caption, Style(log=log, zero=zero, joined=True))


def scatter(
    series: Series, names: tuple[str, str], caption: str, *, log: bool = False, zero: bool = False
) -> Markup:
    """Points alone; otherwise as `lines`."""
    return _chart(series, names, caption, Style(log=log, zero=zero, joined=False))


class Style(NamedTuple):
    """How a chart is drawn: a logarithmic y axis, from 0, with lines."""

    log: bool
    zero: bool
    joined: bool


class Axis(NamedTuple):
    """An axis: its range of values and the pixels of its ends."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, here = map(self._place, (self.low, self.high, value))
        return self.start + (self.end - self.start) * (here - low) / (high - low)

    def _place(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def ticks(self) -> list[float]:
        """Round values along the axis."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def _chart(series: Series, names: tuple[str, str], caption: str, style: Style) -> Markup:
    known = {name: _drawable(points, style) for name, points in series.items()}
    found = [point for points in known.values() for point in points]
    if not found:
        return Markup("")
    x, y = _axes(found, style)
    numbered = list(enumerate(known.items()))
    drawn = [_grid(x, y, names)]
    if style.joined:
        drawn += [_line(number, points, x, y) for number, (_, points) in numbered]
    drawn += [_marks(number, name, points, (x, y), names) for number, (name, points) in numbered]
    picture = element(
        "svg", joined(drawn), viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="group", aria_label=caption
    )
    legend = [_key(n, name, len(points), style) for n, (name, points) in numbered] if len(known) > 1 else []
    key = element("ul", joined(legend), class_="key") if legend else Markup("")
    return element("figure", element("figcaption", caption) + picture + key, class_="chart")


def _drawable(points: Sequence[Point], style: Style) -> list[Point]:
    return sorted(
        (Point(*point) for point in points if _finite(point) and (not style.log or point[1] > 0)),
        key=lambda point: point.x,
    )


def _finite(point: Point) -> bool:
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in point[:2])


def _axes(points: Sequence[Point], style: Style) -> tuple[Axis, Axis]:
    low, high = min(p.y - p.error for p in points), max(p.y + p.error for p in points)
    if style.log:
        low = low if low > 0 else min(p.y for p in points)
        low, high = low / 1.08, high * 1.08
    else:
        room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (0.0 if style.zero else low - room), high + room
    left, right = min(p.x for p in points), max(p.x for p in points)
    margin = (right - left) * 0.03 or abs(right) * 0.1 or 1.0
    across = Axis(left - margin, right + margin, _LEFT, _WIDTH - _RIGHT)
    return across, Axis(low, high, _HEIGHT - _BOTTOM, _TOP, style.log)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about `_TICKS` of them."""
    raw = (high - low) / _TICKS
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) + 0.0 for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        ticks = [f * 10.0**d for d in decades for f in factors if low <= f * 10.0**d <= high]
        if len(ticks) >= 3:
            return ticks[:: max(1, math.ceil(len(ticks) / (_TICKS + 2)))]
    return _ticks(low, high)


def numbers(values: Sequence[float]) -> list[str]:
    """Numbers along an axis: short, with as many decimals each where that is short."""
    texts = [_short(value) for value in values]
    if any(letter in text for text in texts for letter in "ekM"):
        return texts
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    if len({len(text.lstrip("-").partition(".")[0]) for text in texts}) > 2:  # over decades each its own
        return [f"{float(text):,}".removesuffix(".0") for text in texts]
    return [f"{value:,.{decimals}f}" for value in values]


def _short(value: float) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    return f"{value / 1e3:.4g}k" if abs(value) >= 1e4 else f"{value:.6g}"


def _grid(x: Axis, y: Axis, names: tuple[str, str]) -> Markup:
    bottom, parts = _HEIGHT - _BOTTOM, []
    for tick, text in zip(y.ticks(), numbers(y.ticks()), strict=True):
        at = f"{y.at(tick):.1f}"
        parts.append(f'<path class="grid" d="M{_LEFT} {at}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at}" dy=".35em" text-anchor="end">{text}</text>')
    for tick, text in zip(x.ticks(), numbers(x.ticks()), strict=True):
        at = f"{x.at(tick):.1f}"
        parts.append(f'<path class="grid" d="M{at} {bottom}v4"/>')
        parts.append(f'<text x="{at}" y="{bottom + 16}" text-anchor="middle">{text}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{_WIDTH - _RIGHT}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    across, up = (escaped(name) for name in names)
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{across}</text>')
    turned = f"translate(13 {(_TOP + bottom) / 2:.0f}) rotate(-90)"
    parts.append(f'<text transform="{turned}" text-anchor="middle">{up}</text>')
    # What the axes say stands in the caption and in every point, too.
    return element("g", Markup("".join(parts)), aria_hidden="true")


def _line(number: int, points: Sequence[Point], x: Axis, y: Axis) -> Markup:
    path = "L".join(f"{x.at(p.x):.1f} {y.at(p.y):.1f}" for p in points)
    if len(points) < 2:
        return Markup("")
    dash = _DASHES[number % len(_DASHES)]
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return Markup(f'<path class="line s{number % COLOURS}" d="M{path}"{dashed}/>')


def _marks(
    order: int, name: str, points: Sequence[Point], axes: tuple[Axis, Axis], names: tuple[str, str]
) -> Markup:
    """The points of a series, each with its error bar and, for hover and keyboard, its values in words."""
    (x, y), colour, single = axes, f"s{order % COLOURS}", len(points) == 1
    made = []
    for p in points:
        across, up = x.at(p.x), y.at(p.y)
        if p.error:
            ends = f"{y.at(max(p.y - p.error, y.low)):.1f}V{y.at(p.y + p.error):.1f}"
            made.append(f'<path class="error {colour}" d="M{across:.1f} {ends}"/>')
        values = f"{names[0]} {p.x:,.6g}, {names[1]} {p.y:,.6g}" + (f" ± {p.error:.3g}" if p.error else "")
        said = escaped(f"{name}: {values}" + (f"; {p.note}" if p.note else ""))
        mark = f"{_ring(across, up) if single else _shape(order, across, up)}<title>{said}</title>"
        kind = f"point ring {colour}" if single else f"point {colour}"
        made.append(f'<g class="{kind}" role="img" aria-label="{said}">{mark}</g>')
    return Markup("".join(made))


def _ring(x: float, y: float) -> str:
    """The mark of a series with one point, which may lie on a point of another."""
    return f'<path d="M{x - 6:.1f} {y:.1f}a6 6 0 1 0 12 0a6 6 0 1 0 -12 0z"/>'


def _shape(order: int, x: float, y: float) -> str:
    """A mark of its own for each series: circle, square, triangle, diamond, cross, bar."""
    paths = (
        f"M{x - 3.5:.1f} {y:.1f}a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
        f"M{x - 3:.1f} {y - 3:.1f}h6v6h-6z",
        f"M{x:.1f} {y - 4:.1f}l4 7h-8z",
        f"M{x:.1f} {y - 4.5:.1f}l4.5 4.5l-4.5 4.5l-4.5 -4.5z",
        f"M{x - 1:.1f} {y - 4:.1f}h2v3h3v2h-3v3h-2v-3h-3v-2h3z",
        f"M{x - 4:.1f} {y - 1.5:.1f}h8v3h-8z",
    )
    return f'<path d="{paths[order % len(paths)]}"/>'


def _key(order: int, name: str, points: int, style: Style) -> Markup:
    """The entry of a series in the legend."""
    colour, dash = f"s{order % COLOURS}", _DASHES[order % len(_DASHES)]
    line = f'<path class="line {colour}" d="M0 8H30" stroke-dasharray="{dash}"/>'
    kind, mark = ("point ring", _ring(15, 8)) if points == 1 else ("point", _shape(order, 15, 8))
    drawn = f'{line if style.joined and points > 1 else ""}<g class="{kind} {colour}">{mark}</g>'
    return element("li", Markup(f'<svg viewBox="0 0 30 16" aria-hidden="true">{drawn}</svg>') + name)
