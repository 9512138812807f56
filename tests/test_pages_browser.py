"""The pages in a browser: phone and desktop, light and dark, keyboard, sorting, no network, no error."""

from __future__ import annotations

import copy

import page_records
import pytest
from browser import asked, opened

from llmprune.comparison.comparing import compared
from llmprune.comparison.entries import Entry
from llmprune.comparison.page import comparison_page
from llmprune.record import report, sweep_page

PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}


@pytest.fixture(scope="module")
def record():
    return page_records.record(page_records.dense_matrices())


@pytest.fixture(scope="module")
def pages(record):
    """Reports of a run, of a recovery, without scores, of a mixture of experts; of a sweep, a comparison."""
    bare = copy.deepcopy(page_records.record(page_records.dense_matrices(2), scored=False))
    del bare["samples"]
    return {
        "run": report.html_report(record, "out"),
        "recovery": report.html_report(page_records.moved(record), "out"),
        "unscored": report.html_report(bare, "out"),
        "experts": report.html_report(page_records.record(page_records.expert_matrices(8, 16)), "out"),
        "sweep": sweep_page.html_page(page_records.swept("huggyllama/llama-7b", "wikitext2")),
        "comparison": comparison_page(compared(list(five_runs(record)), False), "0"),
    }


def five_runs(record):
    """Runs with long names at five sparsities, of a model with published figures."""
    for place in range(5):
        own = copy.deepcopy(record)
        own["model"]["source"], own["recipe"]["seed"] = "huggyllama/llama-7b", place
        own["totals"]["sparsity"] = 0.4 + place / 10
        own["evaluation"]["perplexity"]["wikitext2"]["pruned"] = 7.0 + place
        yield Entry(f"a-run-with-a-long-name-{place}", own)


# What is measured of a page: its width, what a reader sees first, and the least contrast of any text in it.
MEASURE = """
const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = (colour) => {
  const [r, g, b] = parts(colour).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const colour = getComputedStyle(at).backgroundColor;
    if (parts(colour)[3] !== 0) return colour;
  }
  return "rgb(255, 255, 255)";
};
const worst = { contrast: 99, of: "" };
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, style = getComputedStyle(element);
  if (!walker.currentNode.data.trim() || !element.getClientRects().length) continue;
  if (element.closest("script, #tip")) continue;
  const front = element.closest("svg") ? style.fill : style.color;
  const [high, low] = [light(front), light(behind(element))].sort((a, b) => b - a);
  const contrast = (high + 0.05) / (low + 0.05);
  if (contrast < worst.contrast) Object.assign(worst, { contrast, of: element.outerHTML.slice(0, 200) });
}
const bottom = (what) => Math.max(0, ...[...document.querySelectorAll(what)]
  .map((element) => element.getBoundingClientRect().bottom));
return {
  width: document.documentElement.scrollWidth,
  inner: innerWidth,
  wider: [...document.querySelectorAll("main *")]
    .filter((e) => !e.closest(".wide, .map") && e.getBoundingClientRect().right > innerWidth + 0.5)
    .map((e) => e.outerHTML.slice(0, 99)),
  first: Math.max(bottom(".scores tbody tr"), bottom(".tiles div"), bottom("header .wide tbody tr")),
  page: getComputedStyle(document.body).backgroundColor,
  worst,
};
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, DESKTOP], ids=["390", "1280"])
@pytest.mark.parametrize("kind", ["run", "recovery", "unscored", "experts", "sweep", "comparison"])
def test_it_fits_the_screen_and_can_be_read(kind, size, dark, pages, tmp_path):
    found = asked(pages[kind], MEASURE, tmp_path, **size, dark=dark)
    assert found["inner"] == size["width"] and found["width"] == size["width"], "no scrolling sideways"
    assert found["wider"] == []
    assert 0 < found["first"] <= size["height"], "the first screen holds what came of the run"
    assert found["worst"]["contrast"] >= 4.5, found["worst"]
    assert (sum(map(int, found["page"][4:-1].split(", "))) < 128) == dark


def test_its_own_script_runs_under_its_policy(pages, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(pages["run"], encoding="utf-8")
    shown = opened(path)
    assert 'aria-sort="none"><button type="button">matrix</button>' in shown
    assert "data-said=" in shown and 'id="tip"' in shown


SORT = """
const table = document.querySelector("table.sortable");
const heads = [...table.querySelectorAll("thead th")];
const place = heads.findIndex((head) => head.textContent.trim().startsWith("relative error"));
const column = () => [...table.tBodies[0].rows].map((row) => row.cells[place].textContent);
const state = () => heads.map((head) => head.getAttribute("aria-sort"));
const button = heads[place].querySelector("button");
const before = column();
button.focus();
button.click();
const up = [column(), state()];
button.click();
const down = [column(), state()];
heads[0].querySelector("button").click();
return { before, up, down, names: [...table.tBodies[0].rows].map((row) => row.cells[0].textContent) };
"""


def test_a_table_is_sorted_by_a_column_and_back(record, tmp_path):
    known = copy.deepcopy(record)
    known["matrices"][5]["relative_error"] = None
    found = asked(report.html_report(known, "out"), SORT, tmp_path)
    figures = sorted(float(text) for text in found["before"] if text != "-")
    assert found["before"].count("-") == 1 and found["up"][0] == [*(f"{n:.4f}" for n in figures), "-"]
    assert found["down"][0] == [*(f"{n:.4f}" for n in reversed(figures)), "-"], "what has none stays last"
    assert found["up"][1].count("ascending") == 1 and found["down"][1].count("descending") == 1
    layers = [int(name.split(".")[2]) for name in found["names"]]
    assert layers == sorted(layers), "layer 10 comes after layer 9"


WALK = """
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const tip = document.getElementById("tip");
const said = () => [document.activeElement.textContent, tip.hidden ? null : tip.textContent];
const map = [...document.querySelectorAll("table.heat")].at(-1);
map.querySelector("td").focus();
const steps = [said()];
for (const key of ["ArrowRight", "ArrowDown", "End", "Home"]) { press(key); steps.push(said()); }
document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
const closed = tip.hidden;
const stops = map.querySelectorAll('td[tabindex="0"]').length;
const point = document.querySelector(".chart .point");
point.focus();
const chart = tip.textContent;
const inside = tip.getBoundingClientRect();
return { steps, closed, stops, chart, inside: [inside.left >= 0, inside.right <= innerWidth] };
"""


def test_every_value_is_said_to_the_keyboard(record, pages, tmp_path):
    found = asked(pages["run"], WALK, tmp_path, **PHONE)
    rows = record["matrices"]
    wanted = [rows[0], rows[1], rows[8], rows[-1], rows[0]]
    for (_, tip), row in zip(found["steps"], wanted, strict=True):
        assert f"relative error {row['relative_error']:.4g}" in tip and tip.startswith("block ")
    assert found["closed"] and found["stops"] == 1, "one stop of the Tab key for a map"
    assert found["chart"].startswith("sparsity: block 0") and found["inside"] == [True, True]


COPY = """
const button = document.querySelector("button.copy"), before = button.textContent;
Object.defineProperty(navigator, "clipboard", { configurable: true, value: {
  writeText: async (text) => { window.copied = text; } } });
button.click();
await new Promise((done) => setTimeout(done, 50));
const first = [button.textContent, window.copied];
Object.defineProperty(navigator, "clipboard", { configurable: true, value: {
  writeText: async () => { throw new Error("not allowed"); } } });
button.click();
await new Promise((done) => setTimeout(done, 50));
return { before, first, second: [button.textContent, String(getSelection())], hidden: button.hidden };
"""


def test_a_button_copies_and_where_it_may_not_marks(pages, tmp_path):
    found = asked(pages["recovery"], COPY, tmp_path)
    assert found["before"] == "Copy recipe" and found["hidden"] is False
    assert found["first"][0] == "Copied" and "AC/DC" in found["first"][1]
    assert found["second"][0] == "Marked: press Ctrl+C"


FOCUS = """
const lost = [];
for (const element of document.querySelectorAll("a, button, summary, [tabindex='0']")) {
  element.focus({ focusVisible: true });
  if (document.activeElement !== element) continue;
  const style = getComputedStyle(element), inner = element.querySelector("path");
  const drawn = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  if (!drawn && !(inner && parseFloat(getComputedStyle(inner).strokeWidth) >= 2))
    lost.push(element.outerHTML.slice(0, 99));
}
return lost;
"""


def test_the_focus_can_be_seen_everywhere(pages, tmp_path):
    assert asked(pages["recovery"], FOCUS, tmp_path) == []


def test_paper_shows_everything(pages, tmp_path):
    script = """dispatchEvent(new Event("beforeprint"));
    return [...document.querySelectorAll("details")].map((part) => part.open);"""
    found = asked(pages["recovery"], script, tmp_path)
    assert found and all(found)


def test_without_a_script_it_reads_as_well(pages):
    page = pages["run"].partition("<script>")[0]
    assert "hidden" in page.partition('class="copy"')[2][:12], "a button that would do nothing"
    assert "<button" not in page.partition("<thead>")[2].partition("</table>")[0]
    assert page.count('title="block 0') == 14, "values in the titles of their cells"
