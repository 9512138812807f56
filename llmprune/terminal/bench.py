"""Prints what `bench` has measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from llmprune.common.messages import size_text
from llmprune.terminal.console import Screen

_BUSY = 0.2  # a share of the processors that others take, from which it is told
Rows = list[tuple[str, ...]]


def print_bench(console: Screen, found: Mapping[str, Any]) -> None:
    """Print size, memory and speed of both forms, with the perplexity beside."""
    machine, whole = found["machine"], found["whole"]
    rows = [
        ("machine", f"{machine['processor']}, {machine['threads']} threads"),
        ("kernels", machine["kernels"]),
    ]
    if machine["gpu"]:
        rows.append(("GPU", "not measured: this is the CPU's speed"))
    if machine["busy"] > _BUSY:
        share = f"other programs take {machine['busy']:.0%} of the processors"
        rows.append(("busy", f"{share}: figures of a quiet machine are surer"))
    console.verbatim()
    console.table(f"Benchmark of {found['model']}", rows)
    console.verbatim()
    console.table("", [*_sizes(found), *_scores(found)], ("", "dense", "packed", ""))
    console.verbatim()
    if whole:
        console.table("Whole model, tokens per second", _whole(whole), ("tokens", *_HEAD))
        for said in _remarks(whole):
            console.say(said)
        console.verbatim()
    _products(console, found["products"])
    if found["plot"]:
        console.verbatim()
        console.verbatim(f"plot  {shlex.quote(found['plot'])}")


_HEAD = ("dense", "packed", "faster by", "")


def _sizes(found: Mapping[str, Any]) -> Rows:
    sizes, whole = found["bytes"], found["whole"]
    values = "kept values as they are" if found["values"] == "same" else f"kept values as {found['values']}"
    share = f"{sizes['packed'] / sizes['dense']:.0%}, {values}"
    rows: Rows = [("weight files", size_text(sizes["dense"]), size_text(sizes["packed"]), share)]
    if whole:
        both = whole["dense"], whole["packed"]
        empty = max(entry["empty_process_bytes"] for entry in both)
        memory = (size_text(entry["peak_memory_bytes"]) for entry in both)
        rows.append(("memory", *memory, f"peak while decoding, {size_text(empty)} of it Python and torch"))
        seconds = (f"{entry['load_seconds']:.2f} s" for entry in both)
        rows.append(("loading", *seconds, "to the first token"))
    return rows


def _scores(found: Mapping[str, Any]) -> Rows:
    rows: Rows = []
    for name, entry in found["perplexity"].items():
        protocol = entry["protocol"]
        packed = "-" if entry["packed"] is None else f"{entry['packed']:.2f}"
        note = f"{protocol['windows']} windows of {protocol['window']} tokens"
        if entry["packed"] is None:
            note += ", without --products-only also of the rounded weights"
        elif entry["before_pruning"] is not None:
            note += f", {entry['before_pruning']:.2f} before pruning, by the record"
        rows.append((f"perplexity {name}", f"{entry['dense']:.2f}", packed, note))
    return rows


def _whole(whole: Mapping[str, Any]) -> Rows:
    return [
        (
            n,
            *(_figure(entry[f"{who}_tokens_per_second"]) for who in ("dense", "packed")),
            _times(entry["faster_by"]),
            "decoding" if n == "1" else "prompt",
        )
        for n, entry in whole["tokens"].items()
    ]


def _remarks(whole: Mapping[str, Any]) -> list[str]:
    said = []
    if whole["left_out"]:
        numbers = " and ".join(map(str, whole["left_out"]))
        said.append(f"{numbers} tokens are more than the model takes.")
    if not whole["in_turn"]:
        said.append("Memory does not hold both models, so they were measured one after the other.")
    return said


def _products(console: Screen, products: Mapping[str, Any]) -> None:
    """A row per shape with the ratios, then the milliseconds of all matrices once."""
    if not products["shapes"]:
        console.say("Products: none of single matrices, all are experts in stacks.")
        return
    counts = list(products["all"])
    rows = []
    for entry in products["shapes"]:
        ratios = (_times(entry["tokens"][n]["faster_by"]) for n in counts)
        note = f"{entry['measured']} of {entry['count']} measured"
        rows.append((" x ".join(map(str, entry["shape"])), *ratios, note))
    rows.append(("all", *(_times(products["all"][n]["faster_by"]) for n in counts), "each of them once"))
    for who in ("dense", "packed"):
        taken = (_figure(1e3 * products["all"][n][f"{who}_seconds"]) for n in counts)
        rows.append((f"all, {who}", *taken, "milliseconds"))
    console.table("Products, packed faster by", rows, ("tokens", *counts, ""))


def _times(ratio: float) -> str:
    return f"{ratio:.2f} x"


def _figure(value: float) -> str:
    """A number with three digits that count, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
