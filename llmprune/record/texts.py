"""The section of the report with what the models write, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.pages.document import Markup, Section, abreast, element, escaped, paragraph
from llmprune.record.figures import last_model

Record = Mapping[str, Any]
_WRITERS = ("dense", "start", "pruned")  # in this order


def sections(record: Record) -> list[Section]:
    """The section on texts, where the record of a run has any or says why not."""
    begun = any("start" in text for text in record.get("samples", {}).get("texts", ()))
    names = dict(zip(_WRITERS, ("dense", "start", last_model(record, begun)), strict=True))
    return section(record, names)


def section(record: Record, writers: Mapping[str, str]) -> list[Section]:
    """The section on texts.

    Args:
        record: with `samples`, of which every text is a mapping with `prompt` and what each model wrote.
        writers: the heading of each model by its key in the texts, in their order.
    """
    samples = record.get("samples")
    if samples is None:
        return []
    if "skipped" in samples:
        return [Section("What they write", paragraph(f"No texts: {samples['skipped']}."))]
    shown = [_text(number, entry, writers) for number, entry in enumerate(samples["texts"], 1)]
    told = (
        f"Each model goes on with the same prompt, the likeliest token each time, at most "
        f"{samples['tokens']} tokens. The prompt stands in grey."
    )
    return [Section("What they write", paragraph(told) + Markup("".join(shown)))]


def _text(number: int, entry: Record, writers: Mapping[str, str]) -> Markup:
    """One prompt and how each model goes on."""
    written = []
    for key, name in writers.items():
        if key in entry:
            given = element("span", entry["prompt"], class_="given")
            body = element("pre", given + escaped(entry[key]))
            written.append(element("figure", element("figcaption", name) + body))
    return element("h3", f"Prompt {number}") + abreast(written, "texts")
