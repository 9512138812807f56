"""Draws what `bench` has measured: one PNG, with the speed of both forms, and their size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune.checkpoint.files import write_durably
from llmprune.common.messages import shown
from llmprune.record.canvas import canvas, png

_MADE_BY = b"llmprune bench"  # in the metadata of its pictures
_COLOURS = {"dense": "#8c8c8c", "packed": "#1f77b4"}


def check_picture(path: Path) -> None:
    """Raise `ValueError` where a picture cannot be written: only one of `bench` is replaced."""
    if path.suffix.lower() != ".png":
        raise ValueError(f"the plot is a PNG file, got {shown(str(path))}; name it .png")
    if not path.parent.is_dir():
        raise ValueError(f"no such folder for the plot: {shown(str(path.parent))}; make it, or name another")
    if path.is_dir() or (path.exists() and not _own(path)):
        raise ValueError(f"{shown(str(path))} is there and no plot of bench; name another with --plot FILE")


def _own(path: Path) -> bool:
    with path.open("rb") as file:
        return _MADE_BY in file.read(4096)


def draw_bench(found: Mapping[str, Any], path: Path) -> None:
    """Draw what `bench` returns into a PNG file, which is written completely or not at all."""
    whole = found["whole"]
    figure, (speeds, ratios, sizes) = canvas((11, 4.4), 1, 3, {"width_ratios": (3, 3, 2)})
    if whole:
        rates = {
            who: {n: entry[f"{who}_tokens_per_second"] for n, entry in whole["tokens"].items()}
            for who in _COLOURS
        }
        _bars(speeds, rates, "{:,.4g}")
        speeds.set(title="whole model, tokens per second", xlabel=_TOKENS, yscale="log")
    else:
        taken = {
            who: {n: 1e3 * entry[f"{who}_seconds"] for n, entry in found["products"]["all"].items()}
            for who in _COLOURS
        }
        _bars(speeds, taken, "{:,.3g}")
        speeds.set(title="all products once, milliseconds", xlabel="tokens", yscale="log")
    _ratios(ratios, found)
    megabytes = {who: {"weight files": found["bytes"][who] / 1e6} for who in _COLOURS}
    if whole:
        for who in _COLOURS:
            megabytes[who]["memory at work"] = whole[who]["peak_memory_bytes"] / 1e6
    _bars(sizes, megabytes, "{:,.4g}")
    sizes.set(title="megabytes", ylim=(0, 1.15 * max(max(by.values()) for by in megabytes.values())))
    figure.suptitle("\n".join(_heading(found)), fontsize=10)
    write_durably(path, [png(figure, 130, _MADE_BY.decode())])


_TOKENS = "tokens (1: decoding, more: a prompt)"


def _bars(axes: Any, values: Mapping[str, Mapping[str, float]], form: str) -> None:
    """Bars of both contestants side by side, each with its number."""
    for side, (who, by) in zip((-0.2, 0.2), values.items(), strict=True):
        places = [place + side for place in range(len(by))]
        bars = axes.bar(places, list(by.values()), 0.38, color=_COLOURS[who], label=who)
        axes.bar_label(bars, [form.format(value) for value in by.values()], fontsize=7, padding=1)
    axes.set_xticks(range(len(by)), list(by))
    axes.margins(y=0.12)
    axes.legend(fontsize=8)


def _ratios(axes: Any, found: Mapping[str, Any]) -> None:
    """How many times as fast packed is, by tokens: the products, and the whole model."""
    lines = {"products of all matrices": found["products"]["all"]}
    if found["whole"]:
        lines["whole model"] = found["whole"]["tokens"]
    ticks = list(dict.fromkeys(n for entries in lines.values() for n in entries))
    for label, entries in lines.items():
        ratios = [entries[n]["faster_by"] for n in entries]
        axes.plot([ticks.index(n) for n in entries], ratios, marker="o", label=label)
    axes.axhline(1, color="#8c8c8c", linewidth=1, linestyle="--")
    axes.annotate("dense", (0, 1), fontsize=8, color="#606060", xytext=(2, 3), textcoords="offset points")
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set(title="packed, times as fast as dense", xlabel="tokens", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _heading(found: Mapping[str, Any]) -> list[str]:
    machine = found["machine"]
    scores = [
        f"perplexity {name} {entry['dense']:.2f}"
        + (f" ({entry['packed']:.2f} packed)" if entry["packed"] not in (None, entry["dense"]) else "")
        for name, entry in found["perplexity"].items()
    ]
    values = "" if found["values"] == "same" else f", {found['values']} values"
    return [
        f"{found['model']}{values}" + (f": {', '.join(scores)}" if scores else ""),
        f"{machine['processor']}, {machine['kernels']}",
    ]
