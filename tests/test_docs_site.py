"""The documentation as a site: it builds, nothing is lost on the way, links hold, and it needs no network."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import opened
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {page.stem: page for page in (ROOT / "docs").glob("*.md")} | {
    name.lower(): ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")
}
COUNTED = {
    "li",
    "ul",
    "ol",
    "table",
    "tr",
    "td",
    "pre",
    "h1",
    "h2",
    "h3",
    "strong",
    "em",
    "p",
    "img",
    "a",
    "code",
}


def built(source, to):
    """Build the site of a copy of the repository, or of the repository; what was said where that fails."""
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'llmprune[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "-f", source / "mkdocs.yml", "-d", to]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr if done.returncode else ""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    to = tmp_path_factory.mktemp("site")
    assert built(ROOT, to) == ""
    return to


@pytest.fixture
def small(tmp_path):
    """A copy with one page of its own, that a test may damage: `small(text, more)` builds it."""
    (tmp_path / "eval").mkdir()
    shutil.copytree(ROOT / "docs" / "making", tmp_path / "docs" / "making")
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        (tmp_path / name).write_text(f"# {name}\n\nSee [all](docs/index.md).\n")
    (tmp_path / "eval" / "plot.png").write_bytes(b"a picture")

    def build(text, more=""):
        settings = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
        order = "\nnav: [index.md, readme.md, contributing.md, changelog.md]\n"
        (tmp_path / "mkdocs.yml").write_text(settings + order + more)
        (tmp_path / "docs" / "index.md").write_text(text)
        said = built(tmp_path, tmp_path / "out")
        return said or article(tmp_path / "out" / "index.html")

    return build


def article(page):
    """What a page of the site holds, without what surrounds every page and the marks of headings."""
    text = re.search(r"<article.*?</article>", page.read_text(), re.S)[0]
    return re.sub(r'<a class="headerlink".*?</a>', "", text)


class Counts(HTMLParser):
    """How often each element occurs; links by whether they lead out."""

    def __init__(self, text):
        super().__init__()
        self.found = Counter()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in COUNTED and (tag != "a" or attributes.get("href", "").startswith("http")):
            self.found[tag] += 1


@pytest.mark.parametrize("name", SOURCES)
def test_a_page_has_what_its_text_has(site, name):
    """Code hosts read these pages by CommonMark, the site by another parser: both see the same."""
    wanted = Counts(MarkdownIt("commonmark").enable("table").render(SOURCES[name].read_text())).found
    found = Counts(article(site / f"{name}.html")).found
    wanted, found = ({tag: count for tag, count in one.items() if tag != "code"} for one in (wanted, found))
    assert found == wanted


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.glob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"?([^\"\s>]+)", page.read_text())
        fetched += re.findall(r"<link[^>]+href=\"?([^\"\s>]+)", page.read_text())
        assert fetched and not [address for address in fetched if re.match(r"(\w+:)?//", address)], page.name
    assert not list(site.rglob("*.py")), "what makes the site is no part of it"


def test_the_search_works_in_a_page_opened_as_a_file(site):
    shown = opened(site / "index.html", query="?q=sparsegpt-saliency")
    assert re.search(r"[1-9]\d* matching document", shown)
    assert "algorithms.html" in "".join(
        re.findall(r'<a href="([^"]*)" class="md-search-result__link"', shown)
    )


def test_broken_links_and_forgotten_pages_end_the_build(small, tmp_path):
    (tmp_path / "docs" / "forgotten.md").write_text("# Forgotten\n")
    said = small("# Start\n\n[x](gone.md) [x](index.md#gone) [x](../eval/gone.py) ![x](gone.png)\n")
    assert "Aborted with 5 warnings" in said and "forgotten.md" in said
    for place in ("'gone.md'", "'index.md#gone'", "'../eval/gone.py'", "'gone.png'"):
        assert place in said


def test_links_that_leave_the_folder(small):
    text = "# Start\n\n[one](../README.md) ![two](../eval/plot.png) [`thr` ee](../eval/plot.png)"
    text += " `[four](../eval/plot.png)`"
    page = html.unescape(small(text))
    assert '<a href="readme.html">one</a>' in page and 'src="copied/eval/plot.png"' in page
    assert "<code>thr</code> ee <code>[four](../eval/plot.png)</code>" in page
    page = small(text, "repo_url: https://example.org/us/llmprune\n")
    assert '<a href="https://example.org/us/llmprune/blob/main/eval/plot.png"><code>thr</code> ee</a>' in page
