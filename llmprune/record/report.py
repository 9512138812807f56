"""Writes the record (`llmprune.json`) of an output folder, and from it its model card and HTML report."""

from __future__ import annotations

import json
from pathlib import Path

from llmprune.checkpoint.contents import CARD, RECORD, REPORT
from llmprune.checkpoint.files import write_durably
from llmprune.common.messages import size_text
from llmprune.pages.document import (
    Markup,
    Section,
    code,
    commands,
    escaped,
    folded,
    joined,
    listed,
    page,
    paragraph,
)
from llmprune.pages.tables import Bar, bars, facts
from llmprune.record import courses, maps, texts
from llmprune.record.card import as_yaml, load_snippet, model_card, protocol_lines
from llmprune.record.figures import (
    Record,
    masks_given,
    method_of,
    size_remark,
    sizes_on_disk,
    sparsity_reached,
    speed_measured,
)
from llmprune.record.history import pruned_here
from llmprune.record.outcome import outcome
from llmprune.record.plots import draw
from llmprune.record.record import calibrated_on
from llmprune.record.rerunning import rerun


def write(folder: Path, record: Record, name: str, before: Record | None = None) -> bool:
    """Write record, card, report and plots into a folder, each file completely or not at all.

    Args:
        name: what the folder will be called.
        before: the record from which the card in the folder was made; if the card was edited since, it is
            kept.

    Returns:
        Whether the card was written.
    """
    texts = {
        CARD: model_card(record, name),
        REPORT: html_report(record, name),
        RECORD: json.dumps(record, indent=1) + "\n",
    }
    card = folder / CARD
    made = model_card(before, name).encode() if before is not None and card.is_file() else None
    edited = made is not None and card.read_bytes() != made
    draw(folder, record)
    for file, text in texts.items():
        if not (edited and file == CARD):
            write_durably(folder / file, [text.encode()])
    return not edited


def write_record(folder: Path, record: Record) -> None:
    """Write the record alone, where there is no run to report on."""
    write_durably(folder / RECORD, [(json.dumps(record, indent=1) + "\n").encode()])


def html_report(record: Record, name: str) -> str:
    """The report, one page: what came of the run, texts, matrices, training, time, and how to repeat it.

    `name` is the folder's, without its path.
    """
    version = record["environment"]["versions"].get("llmprune", "")
    parts = [
        *texts.sections(record),
        *courses.sections(record),
        *maps.sections(record),
        Section("Where the time went", _time(record)),
        Section("Protocol and size", _protocol(record)),
        Section("Load it, repeat it", _again(record, name)),
    ]
    title = f"{record['model']['source']}, {record['totals']['sparsity']:.1%} sparse"
    about = f"Made by llmprune {version}. The record beside this page, {RECORD}, has every figure in full."
    return page(title, parts, outcome(record), about)


def _time(record: Record) -> Markup:
    """The seconds of every phase that took long enough to see."""
    seconds = record["totals"]["seconds"]
    phases = {name: value for name, value in seconds.items() if name != "total" and value >= 0.05}
    shown = [Bar(name, value, f"{value:,.1f}") for name, value in phases.items()]
    return bars(shown, f"{seconds['total']:,.1f} seconds in all, by phase", ("phase", "seconds"))


def _protocol(record: Record) -> Markup:
    """How the scores were measured, and what a user must know of size and speed."""
    measured = listed(protocol_lines(record))
    return measured + joined(map(paragraph, [size_remark(record), *_speed(record)]))


def _speed(record: Record) -> list[str]:
    """What was measured of the speed, and on which processor."""
    said, processor = speed_measured(record), record.get("speed", {}).get("processor")
    return [f"Speed: {said}" + (f", on {processor}" if processor else "") + "."] if said else []


def _again(record: Record, name: str) -> Markup:
    """How to load the folder, and all that is needed to make it again."""
    parts: list[Markup] = [code(load_snippet(name, record), "code")]
    if "recovery" not in record:
        again = rerun(record)
        parts += [paragraph("To make it again:")] if again.commands else []
        parts += [code(commands(again.commands), "command")] if again.commands else []
        parts.append(listed(again.needed))
    if "recovery" not in record or pruned_here(record):
        title = "The recipe of the pruning" if "recovery" in record else "The recipe"
        parts.append(folded(f"{title} with every default", code(as_yaml(record["recipe"]), "recipe")))
    parts.append(facts(_circumstances(record), "How it was made"))
    return joined(parts)


def _circumstances(record: Record) -> list[tuple[object, object]]:
    """What a repetition should have the same."""
    model, totals, environment = record["model"], record["totals"], record["environment"]
    at = f", commit {model['revision']}" if model["revision"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    rows = [
        ("model", f"{model['source']}{at} ({model['parameters']:,} parameters)"),
        ("weights", model.get("digest")),
        ("method", method_of(record)),
        ("chosen", record["recipe"].get("chosen")),
        ("masks", masks_given(record) if "masks" in record else None),
        ("sparsity reached", sparsity_reached(record)),
        ("calibration", _calibration(record)),
        ("weights on disk", sizes_on_disk(record)),
        ("peak memory", size_text(totals["peak_memory_bytes"])),
        ("device", f"{environment['device']}, {environment['dtype']}"),
        ("versions", versions),
    ]
    return [(name, escaped(said)) for name, said in rows if said]


def _calibration(record: Record) -> str:
    calibration = record["calibration"]
    if not calibration["samples"]:
        return "none"
    rows = f"{calibration['samples']} x {calibration['sequence_length']} tokens"
    return f"{rows} of {calibrated_on(calibration)}, seed {calibration['seed']}, {calibration['digest']}"
