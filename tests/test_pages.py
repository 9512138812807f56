"""The parts of HTML pages: what they say, that nothing in them is trusted, that their colours can be read."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmprune.pages import charts, document, tables
from llmprune.pages.charts import Point, lines, scatter
from llmprune.pages.document import Markup, Section, code, commands, element, escaped, page
from llmprune.pages.tables import Bar, Cell, Scale, Tile, bars, heat, table, tiles

STYLE = (Path(document.__file__).parent / "style.css").read_text()
EVIL = '<script>alert("x")</script>&\x00'
VOID = {"meta", "wbr", "path", "br"}


class Checked(HTMLParser):
    """Reads a page and fails where an element is not closed; keeps elements by name and the headings."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.headings = [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.setdefault(tag, []).append(dict(attributes))
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_startendtag(self, tag, attributes):
        self.found.setdefault(tag, []).append(dict(attributes))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def example():
    curves = {EVIL: [Point(0.5, 13.0, 0.2, EVIL), Point(0.7, 40.0)], "b": [Point(0.6, 20.0)]}
    body = lines(curves, ("sparsity", EVIL), EVIL, log=True) + scatter(curves, ("x", "y"), "points")
    body += heat(["0", "1"], ["block", "q_proj", EVIL], [[0.1, None], [0.3, 0.2]], EVIL)
    body += table(("name", "value", ""), [(EVIL, 3, "x"), ("b", Cell("-", None), "y")], EVIL, True)
    body += tiles([Tile(EVIL, EVIL, EVIL)]) + bars([Bar(EVIL, 1.0, EVIL)], EVIL, ("phase", "s"))
    body += code(EVIL, "text") + code(commands([f"llmprune run x --set {EVIL}", "b"]))
    return page(EVIL, [Section("One", body), Section("Two", escaped(EVIL))], EVIL, EVIL)


def test_a_page_is_whole_and_nothing_in_it_is_trusted():
    text = example()
    found = Checked(text).found
    assert "\x00" not in text and "<script>alert" not in text
    assert len(found["script"]) == 1 and found["html"] == [{"lang": "en"}]
    assert re.search(r"(src|href)=\"(?!#)", text) is None and "url(" not in text and "@import" not in text
    assert [a["href"] for a in found["a"]] == ["#one", "#two"]
    assert {"one", "two"} <= {section["id"] for section in found["section"]}
    assert all(caption == {} for caption in found["caption"]) and len(found["caption"]) == len(found["table"])
    assert all("scope" in cell for cell in found["th"])
    policy = next(m["content"] for m in found["meta"] if "Content" in m.get("http-equiv", ""))
    assert policy.startswith("default-src 'none'") and "sha256-" in policy


def test_headings_go_down_step_by_step():
    levels = Checked(example()).headings
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_markup_stays_and_text_is_escaped():
    assert escaped(Markup("<b>")) == "<b>" and escaped("<b>") == "&lt;b&gt;"
    assert Markup("<b>") + "<" == "<b>&lt;" and isinstance(Markup("") + "x", Markup)
    assert element("p", "x", class_="a", data_sort=1, title=None) == '<p class="a" data-sort="1">x</p>'
    assert escaped("a\x07b\ud800c\n") == "a\ufffdb\ufffdc\n"


def test_a_command_is_copied_as_it_is():
    command = "llmprune run demo --sparsity 0.5 --set a=b"
    shown = code(commands([command, "llmprune convert a"]), "command")
    assert re.sub("<[^>]+>", "", shown).startswith(f"{command}\nllmprune convert a")


# Values


def test_numbers_are_sorted_by_their_values():
    made = table(
        ("name", "n"), [("a", 1234567), ("b", 0.25), ("c", Cell("many", 9.0)), ("d", Cell("-", None))], "t"
    )
    assert '<td class="n" data-sort="1234567">1,234,567</td>' in made
    assert '<td class="n" data-sort="9.0">many</td>' in made and '<td class="n" data-sort="">-</td>' in made
    assert '<th scope="col" class="n">n</th>' in made and '<th scope="row">a</th>' in made


def test_a_map_shows_every_value_and_says_more_of_it():
    made = heat(["0", "1"], ["block", "q", "k"], [[0.0, 0.5], [None, 1.0]], "m", notes=[["", "x"], ["", ""]])
    cells = re.findall(r'<td class="(\w+)" title="([^"]*)">([^<]*)</td>', made)
    assert cells == [
        ("h0", "block 0, q", "0.000"),
        ("h4", "block 0, k: x", "0.500"),
        ("none", "block 1, q: none", "-"),
        ("h7", "block 1, k", "1.000"),
    ]
    legend = re.findall(r'<span class="h(\d)">([\d.]+)</span>', made)
    assert [int(step) for step, _ in legend] == list(range(tables.STEPS)) and legend[4][1] == "0.500"


def test_a_scale_of_one_value_says_so_and_a_skewed_one_has_ratios_for_steps():
    assert "every value is 0.500" in Scale.of([0.5, 0.5]).legend(".3f")
    assert Scale.of([0.5]).step(0.5) == tables.STEPS // 3
    skewed = Scale.of([0.001, 0.002, 0.003, 0.004, 1.0])
    assert skewed.log and skewed.step(0.001) == 0 and skewed.step(1.0) == 7 and skewed.step(0.032) == 4
    assert "steps are ratios" in skewed.legend(".3f")
    assert not Scale.of([0.0, 0.0001, 1.0]).log, "zero has no ratio to anything"
    assert Scale.of([1.0, math.inf, math.nan]).step(math.inf) == tables.STEPS - 1
    assert Scale.of([]).step(3.0) >= 0


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [
        (0, 1, False),
        (-3.2, 7, False),
        (13.2, 1e5, True),
        (20, 21, True),
        (1e-9, 2e-9, False),
        (5, 5e6, False),
    ],
)
def test_ticks_are_round_few_and_inside(low, high, log):
    axis = charts.Axis(low, high, 0, 100, log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 9 and all(low <= tick <= high * (1 + 1e-12) for tick in ticks)
    assert ticks == sorted(set(ticks)) and all(-1e-6 <= axis.at(tick) <= 100 + 1e-6 for tick in ticks)
    texts = charts.numbers(ticks)
    assert len(set(texts)) == len(texts) and all(len(text) <= 9 for text in texts)


def test_a_chart_leaves_out_what_cannot_be_drawn_and_says_each_value():
    points = [Point(1, 2.5, 0.5, "best"), Point(2, math.nan), Point(3, None), Point(0, 4)]
    made = lines({"a": points, "b": [Point(1, 3)]}, ("step", "loss"), "Loss")
    assert made.count("<title>") == 3 and "a: step 1, loss 2.5 ± 0.5; best" in made
    path = re.search(r'class="line s0" d="M([\d.]+) [\d.]+L([\d.]+)', made)
    assert float(path[1]) < float(path[2]), "by x"
    assert made.count('class="error') == 1 and "ring" in made
    assert lines({"a": [Point(1, -2)]}, ("x", "y"), "t", log=True) == ""
    assert lines({}, ("x", "y"), "t") == ""
    assert '<path class="line' not in scatter({"a": points}, ("x", "y"), "t")


def test_a_chart_stays_inside_its_frame():
    made = lines({"a": [Point(0, 1), Point(1, 1e6), Point(2, 1, 1e6)]}, ("x", "y"), "t", log=True)
    numbers = [float(n) for n in re.findall(r'd="M([\d.-]+) ([\d.-]+)', made) for n in n]
    assert all(-1 <= n <= 461 for n in numbers)


# Colours


def themes():
    """The variables of each theme, by name."""
    light, dark, paper = re.findall(r":root \{([^}]*)\}", STYLE)
    plain = dict(re.findall(r"--(\w+): (#\w{6})", light))
    return {
        "light": plain,
        "dark": plain | dict(re.findall(r"--(\w+): (#\w{6})", dark)),
        "paper": plain | dict(re.findall(r"--(\w+): (#\w{6})", paper)),
    }


def contrast(one, other):
    """The contrast of two colours, by the Web Content Accessibility Guidelines."""

    def luminance(colour):
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_computed_as_the_guidelines_say():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark", "paper"])
def test_text_can_be_read_and_marks_can_be_told_from_the_page(theme):
    colours = themes()[theme]
    for behind in ("page", "panel"):
        for text in ("ink", "soft", "link"):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    for step in range(tables.STEPS):
        assert contrast(colours[f"t{step}"], colours[f"h{step}"]) >= 4.5, step
    for mark in ("focus", "bar", *(f"s{n}" for n in range(charts.COLOURS))):
        assert contrast(colours[mark], colours["page"]) >= 3, mark


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_steps_of_the_scale_go_one_way_in_brightness(theme):
    """So they are told apart without colour vision, and in print."""
    colours = themes()[theme]
    from_page = [contrast(colours[f"h{n}"], colours["page"]) for n in range(tables.STEPS)]
    assert all(after / before > 1.1 for before, after in itertools.pairwise(from_page)), from_page
