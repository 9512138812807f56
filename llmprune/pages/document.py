"""The HTML page: one file that needs no network, light and dark, for any width, keyboard and paper.

Another page is made of the same parts:

    from llmprune.pages.charts import Point, lines
    from llmprune.pages.document import Section, page, paragraph
    from llmprune.pages.tables import table

    curves = {"wanda": [Point(0.5, 21.8), Point(0.6, 60.1)], "sparsegpt": [Point(0.5, 19.9)]}
    body = lines(curves, ("sparsity", "perplexity"), "Perplexity by sparsity", log=True)
    body += table(("recipe", "perplexity"), [("wanda", 21.83)], "All runs", sortable=True)
    html = page("A comparison", [Section("Curves", body)], lead=paragraph("Three runs."))

Every function takes plain values, which it escapes, and returns `Markup`, which is HTML already. Parts are
put together with `+`. `style.css` and `script.js` beside this file go into each page; the page reads without
the script, which sorts tables, shows values and copies text.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")  # HTML has no place for them


class Markup(str):
    """HTML that is ready: nothing in it is escaped any more."""

    def __add__(self, other: str) -> Markup:
        """Both after each other; plain text is escaped."""
        return Markup(str.__add__(self, escaped(other)))


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading of its own.

    Attributes:
        title: the heading.
        body: what stands under it.
    """

    title: str
    body: Markup


def escaped(value: object) -> Markup:
    """A value as HTML; `Markup` as it is."""
    return value if isinstance(value, Markup) else Markup(html.escape(_CONTROLS.sub("\ufffd", str(value))))


def joined(parts: Iterable[object]) -> Markup:
    """Parts after each other, each on a line of its own."""
    return Markup("\n".join(escaped(part) for part in parts))


def element(name: str, content: object = "", **attributes: object) -> Markup:
    """An element with its attributes, but those of value None; `class_` is `class`, `data_x` `data-x`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>{escaped(content)}</{name}>")


def paragraph(content: object, kind: str | None = None) -> Markup:
    """A paragraph. `kind`: `soft` for a remark."""
    return element("p", content, class_=kind)


def abreast(parts: Iterable[Markup], kind: str = "charts") -> Markup:
    """Charts, `maps` or `texts` side by side, where there is room; below each other on a phone."""
    return element("div", joined(parts), class_=kind)


def folded(title: str, body: Markup) -> Markup:
    """A part that opens when its title is clicked, and on paper is open."""
    return element("details", element("summary", title) + body)


def commands(lines: Iterable[str]) -> Markup:
    """Command lines, which break between their options only."""

    def shown(line: str) -> Markup:
        first, *options = line.split(" --")
        return Markup(" ".join([escaped(first), *(element("span", f"--{one}") for one in options)]))

    return joined(map(shown, lines))


def code(text: str, name: str | None = None) -> Markup:
    """Text to be copied, such as a recipe. `name`: what it is, for the button; None for no button."""
    button = element("button", f"Copy {name}", type="button", class_="copy", hidden="") if name else ""
    return element("div", element("pre", element("code", text)) + button, class_="code")


def listed(items: Iterable[object]) -> Markup:
    """A list; empty without items."""
    made = joined(element("li", item) for item in items)
    return element("ul", made) if made else made


def page(title: str, sections: Sequence[Section], lead: str = "", about: str = "") -> str:
    """A whole page.

    Args:
        title: its heading and name.
        sections: what follows the lead, each with its heading; a line of links leads to them.
        lead: what stands on the first screen, under the heading.
        about: a line on the page for the foot, such as what made it.
    """
    top = escaped(lead)
    names = {section.title: _anchor(section.title) for section in sections}
    links = joined(element("a", title, href=f"#{name}") for title, name in names.items())
    nav = element("nav", links, aria_label="Parts of this page") if sections else Markup("")
    style, script = _asset("style.css"), _asset("script.js")
    body = joined(
        element("section", element("h2", section.title) + section.body, id=names[section.title])
        for section in sections
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escaped(title)}</title>
<style>
{style}</style></head><body>
<main>
<header>
<h1>{escaped(title)}</h1>
{top}
</header>
{nav}
{body}
</main>
<footer>{escaped(about)}</footer>
<script>{script}</script>
</body></html>
"""


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _policy(script: str) -> str:
    """What a browser lets the page do: show itself and run its own script; nothing comes from the network."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"


@functools.cache
def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")
