"""Tables of a page: with a caption, sortable, and heat maps; tiles and bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from llmprune.pages.document import Markup, element, escaped, joined

STEPS = 8  # of the colour scale; style.css has a colour and a text colour for each


class Cell(NamedTuple):
    """A cell whose text is not what it is sorted by.

    Attributes:
        text: what is shown.
        key: what it is sorted by; None goes last.
    """

    text: object
    key: float | str | None


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], caption: str, sortable: bool = False
) -> Markup:
    """A table. Cells are text, numbers, `Markup`, or `Cell`s; the first of a row is its heading.

    Numbers, and every `Cell` of a column sorted by numbers, stand right. With `sortable`, a
    click or Enter on the head of a column sorts by it.
    """
    listed = list(rows)
    numeric = [any(map(_is_number, column)) for column in zip(*listed, strict=True)] or [False] * len(head)
    titles = map(_title, head, numeric)
    top = element("thead", element("tr", Markup("".join(titles)))) if any(map(str, head)) else Markup("")
    body = element("tbody", joined(element("tr", _row(row, numeric)) for row in listed))
    inner = element("caption", caption) + top + body
    kind = "sortable" if sortable else None
    # A table wider than the screen scrolls by itself, also by keyboard.
    return element(
        "div",
        element("table", inner, class_=kind),
        class_="wide",
        tabindex=0,
        role="region",
        aria_label=caption,
    )


def _title(name: object, numeric: bool) -> Markup:
    """The head of a column: over numbers it stands right, as they do."""
    if not str(name):
        return element("td")  # nobody reads out a heading without words
    return element("th", name, scope="col", class_="n" if numeric else None)


def _is_number(value: object) -> bool:
    return isinstance(value.key if isinstance(value, Cell) else value, (int, float))


def _row(row: Sequence[object], numeric: Sequence[bool]) -> Markup:
    return Markup(
        "".join(_cell(value, "td" if place else "th", numeric[place]) for place, value in enumerate(row))
    )


def _cell(value: object, name: str, right: bool) -> Markup:
    scope = "row" if name == "th" else None
    if isinstance(value, Cell):
        key, kind = "" if value.key is None else value.key, "n" if right else None
        return element(name, value.text, class_=kind, data_sort=key, scope=scope)
    if isinstance(value, (int, float)):
        text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        return element(name, text, class_="n", data_sort=value, scope=scope)
    return element(name, value, scope=scope)


def facts(rows: Iterable[tuple[object, object]], caption: str) -> Markup:
    """A table of names and what they are."""
    return element("div", table((), list(rows), caption), class_="facts")


class Tile(NamedTuple):
    """A figure in large type: its name, the figure, and a line on it."""

    name: str
    figure: str
    remark: str = ""


def tiles(shown: Iterable[Tile]) -> Markup:
    """Figures side by side, as many as fit."""
    made = (
        element(
            "div", element("dt", t.name) + element("dd", t.figure) + element("dd", t.remark, class_="soft")
        )
        for t in shown
    )
    return element("dl", joined(made), class_="tiles")


class Bar(NamedTuple):
    """A bar: its name, its length and what is said of it."""

    name: str
    value: float
    text: str


def bars(shown: Sequence[Bar], caption: str, head: tuple[str, str]) -> Markup:
    """Horizontal bars in a table. `head`: what the names are and what the values are."""
    most = max((bar.value for bar in shown), default=0) or 1
    rows = []
    for bar in shown:
        length = Markup(f'<span class="bar" style="width:{100 * bar.value / most:.1f}%"></span>')
        rows.append((bar.name, Cell(bar.text, bar.value), length))
    return element("div", table((*head, ""), rows, caption), class_="bars")


def heat(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    caption: str,
    *,
    form: str = ".3f",
    notes: Sequence[Sequence[str]] | None = None,
) -> Markup:
    """A heat map: a table whose cells have colours by their values, and a legend of the scale.

    Each cell shows its value. Its note is shown on hover, and by the arrow keys once the map has the focus.

    Args:
        rows: their names.
        columns: their names; one more than a row has values begins with what the rows are, such as `block`.
        values: by row and column; None where there is nothing.
        form: how a value is written, as for `format`.
        notes: what is said of each cell beside row, column and value.
    """
    width = max(map(len, values), default=0)
    corner, names = (columns[0], columns[1:]) if len(columns) > width else ("", columns)
    scale = Scale.of([value for row in values for value in row if value is not None])
    head = (element("th", corner, scope="col") if corner else element("td")) + Markup(
        "".join(element("th", breakable(name), scope="col") for name in names)
    )
    body = []
    for y, (row, found) in enumerate(zip(rows, values, strict=True)):
        cells = "".join(
            _heat_cell(value, scale, form, _said((corner, row, names[x]), notes[y][x] if notes else None))
            for x, value in enumerate(found)
        )
        body.append(element("tr", element("th", row, scope="row") + Markup(cells)))
    inner = (
        element("caption", caption) + element("thead", element("tr", head)) + element("tbody", joined(body))
    )
    return element("div", element("table", inner, class_="heat") + scale.legend(form), class_="map")


def breakable(name: str) -> Markup:
    """A name that may go on in the next line after its dots and underscores."""
    return Markup(escaped(name).replace("_", "_<wbr>").replace(".", ".<wbr>"))


def _said(place: tuple[str, str, str], note: str | None) -> str:
    corner, row, column = place
    return f"{corner} {row}, {column}".strip() + (f": {note}" if note else "")


def _written(value: float, form: str) -> str:
    return format(value, form).rstrip(".")  # `#` in a form keeps zeros at the end, and a bare point


def _heat_cell(value: float | None, scale: Scale, form: str, said: str) -> Markup:
    if value is None:
        return element("td", "-", class_="none", title=f"{said}: none")
    return element("td", _written(value, form), class_=f"h{scale.step(value)}", title=said)


class Scale(NamedTuple):
    """A scale of colours from the least to the greatest value.

    Attributes:
        low: the least.
        high: the greatest.
        log: whether steps are ratios; so where half the values lie in the lowest tenth.
    """

    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> Scale:
        """The scale of some values."""
        finite = sorted(value for value in values if math.isfinite(value)) or [0.0]
        low, middle, high = finite[0], finite[len(finite) // 2], finite[-1]
        return cls(low, high, low > 0 and middle - low < (high - low) / 10)

    def step(self, value: float) -> int:
        """The step of a value, from 0 to `STEPS` - 1."""
        if not math.isfinite(value):
            return STEPS - 1
        low, high, at = map(self._place, (self.low, self.high, min(max(value, self.low), self.high)))
        if high - low <= 1e-9 * max(abs(high), 1e-300):  # all the same, up to rounding
            return STEPS // 3
        return min(int(STEPS * (at - low) / (high - low)), STEPS - 1)

    def _place(self, value: float) -> float:
        return math.log(value) if self.log else value

    def legend(self, form: str) -> Markup:
        """Every colour with the least value that has it."""
        low, high = _written(self.low, form), _written(self.high, form)
        if low == high:
            return element("p", f"every value is {low}", class_="scale")
        a, b = self._place(self.low), self._place(self.high)
        bounds = [a + (b - a) * n / STEPS for n in range(STEPS)]
        texts = [_written(math.exp(at) if self.log else at, form) for at in bounds]
        swatches = Markup("".join(element("span", text, class_=f"h{n}") for n, text in enumerate(texts)))
        steps = " (steps are ratios)" if self.log else ""
        return element("p", escaped("from") + swatches + f"to {high}{steps}", class_="scale")
