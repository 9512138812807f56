"""The section of the report with what the models write, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmprune.pages.document import Markup, Section, abreast, element, escaped, paragraph

Record = Mapping[str, Any]
_WRITERS = {"dense": "dense", "start": "start", "pruned": "pruned"}  # in this order


def sections(record: Record) -> list[Section]:
    """The section on texts, where the record has any or says why not."""
    samples = record.get("samples")
    if samples is None:
        return []
    if "skipped" in samples:
        return [Section("What they write", paragraph(f"No texts: {samples['skipped']}."))]
    trained = "recovery" in record
    shown = [_text(number, entry, trained) for number, entry in enumerate(samples["texts"], 1)]
    told = (
        f"Each model goes on with the same prompt, the likeliest token each time, at most "
        f"{samples['tokens']} tokens. The prompt stands in grey."
    )
    return [Section("What they write", paragraph(told) + Markup("".join(shown)))]


def _text(number: int, entry: Record, trained: bool) -> Markup:
    """One prompt and how each model goes on."""
    written = []
    for key, name in _WRITERS.items():
        if key in entry:
            given = element("span", entry["prompt"], class_="given")
            label = "trained" if trained and key == "pruned" else name
            body = element("pre", given + escaped(entry[key]))
            written.append(element("figure", element("figcaption", label) + body))
    return element("h3", f"Prompt {number}") + abreast(written, "texts")
