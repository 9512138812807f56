"""The pages say what the code says: parts that are written from it, options, defaults, signatures, keys."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import typer

import llmprune
from llmprune import registry
from llmprune.cli import commands

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {page.name: page.read_text() for page in sorted(DOCS.glob("*.md"))}
FLAG = re.compile(r"`(--[\w-]+)")
# The page of each command. A command whose page it shares has no more options than that.
PAGE_OF = {"recipes": "recipes-command.md", "prune": "run.md"}


@pytest.fixture(scope="module")
def tables():
    """The script that writes parts of the pages."""
    spec = importlib.util.spec_from_file_location("tables", DOCS / "making" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(text, head):
    """The cells of the tables below a line of heads that begins so."""
    for part in re.findall(rf"^\| {re.escape(head)} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.M):
        for line in part.splitlines():
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


# Parts that are written


def test_the_parts_of_pages_are_as_the_code_gives_them(tables):
    assert {name: text for name, text in PAGES.items() if tables.renewed(text) != text} == {}, (
        "run: python docs/making/tables.py"
    )


def test_every_part_stands_on_one_page(tables):
    found = [name for text in PAGES.values() for _, name, _ in tables.PART.findall(text)]
    assert sorted(found) == sorted(tables.PARTS)
    assert sum(text.count("<!-- from the code") for text in PAGES.values()) == len(found)


# Options of the commands


def options():
    """By the words of each command its options: name -> parameter."""
    for name, command in typer.main.get_command(commands.app).commands.items():
        for sub, part in getattr(command, "commands", {"": command}).items():
            given = [p for p in part.params if p.param_type_name == "option"]
            yield f"{name} {sub}".strip(), {flag: p for p in given for flag in (*p.opts, *p.secondary_opts)}


OPTIONS = dict(options())


def page_of(command):
    return PAGES[PAGE_OF.get(command, f"{command.split()[0]}.md")]


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_is_on_the_page_of_its_command(command):
    assert set(OPTIONS[command]) - set(re.findall(r"(?<=[ `])--[\w-]+", page_of(command))) == set()


@pytest.mark.parametrize("command", [name for name in OPTIONS if name != "prune"])
def test_the_table_of_options_names_only_what_there_is(command):
    told = {flag for cells in rows(page_of(command), "option") for flag in FLAG.findall(cells[0])}
    assert told <= set(OPTIONS[command])


@pytest.mark.parametrize("command", [name for name in OPTIONS if name != "prune"])
def test_the_table_of_options_has_the_defaults(command):
    for flags, *_, default in (cells for cells in rows(page_of(command), "option") if len(cells) == 3):
        for flag in FLAG.findall(flags):
            real = OPTIONS[command][flag].default
            if real is not None and not isinstance(real, bool) and len(FLAG.findall(flags)) == 1:
                said = f"{real:g}" if isinstance(real, float) else str(real)
                assert re.match(rf"`?{re.escape(said)}\b", default), flag


# Options of algorithms


def told_options():
    """(room, name, option, default) of every table of options on the page of algorithms."""
    for part in re.split(r"^### ", PAGES["algorithms.md"], flags=re.M)[1:]:
        name = part.partition("\n")[0]
        room = next((room for room in registry.ROOMS if name in registry.names(room)), None)
        if room:
            for option, _, default, *_ in rows(part, "option"):
                yield room, name, option.strip("`"), default.strip("`")


def test_tables_of_algorithms_have_every_option_and_its_default():
    told = {}
    for room, name, option, default in told_options():
        told.setdefault((room, name), {})[option] = default
    assert len(told) >= 6
    for (room, name), given in told.items():
        real = registry.describe(room, name)["options"]
        assert set(given) == set(real), name
        assert {option: value(text, real[option]) for option, text in given.items()} == real, name


def value(text, real):
    """A default as the page writes it, as the kind of value that it is."""
    if isinstance(real, bool):
        return text == "true"
    if isinstance(real, (tuple, list)):
        return tuple(float(number) for number in text.split(","))
    if isinstance(real, str):
        return "" if text == "empty" else text
    top, _, below = text.partition("/")
    return type(real)(float(top) / float(below or 1))


def test_every_algorithm_has_a_section():
    heads = set(re.findall(r"^### (\S+)$", PAGES["algorithms.md"], re.M))
    assert {name for room in registry.ROOMS for name in registry.names(room)} - heads == set()


# Python


def signatures():
    """(name, what is in its brackets) of every function that the page on Python shows."""
    text = PAGES["python.md"].partition("## Functions")[2].partition("\n## ")[0]
    return [(name, told) for name, told in re.findall(r"`(\w+)\(([^`]*)\)`", text) if hasattr(llmprune, name)]


def test_every_public_function_is_on_the_page_on_python():
    public = {name for name in llmprune.__all__ if inspect.isroutine(getattr(llmprune, name))}
    assert public - {name for name, _ in signatures()} == set()


@pytest.mark.parametrize(("name", "told"), signatures())
def test_the_page_on_python_has_the_signature(name, told):
    real = inspect.signature(getattr(llmprune, name)).parameters
    parts = [part for part in re.split(r", (?![^(]*\))", told) if part != "*"]
    assert [part.split("=")[0].lstrip("*") for part in parts if part != "**options"] == [
        key for key, parameter in real.items() if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    for key, _, default in (part.partition("=") for part in parts):
        if default:
            assert real[key].default == (print if default == "print" else ast.literal_eval(default)), key


# Recipes


def test_the_reference_has_the_keys_of_a_recipe_and_no_others():
    from llmprune.recipe.types import Recipe

    text = PAGES["recipe.md"].partition("## Recipes of recover")[0]
    told = {cells[0].strip("`") for cells in rows(text.partition("\n## Cases")[0], "key")}
    assert told - {"cases", "values"} == {field.name for field in fields(Recipe)} - {"name", "chosen"}
