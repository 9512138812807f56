"""What differs between runs, in recipe, training, calibration, model and machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmprune.comparison.entries import Entry

_LEFT_OUT = ("chosen", "description", "name")  # of a recipe: what decides nothing
_ABSENT = "-"
_DIGEST = re.compile("[0-9a-f]{32,}")


def differences(entries: Sequence[Entry]) -> list[tuple[str, list[str]]]:
    """Every field in which runs differ, with its value in each of them."""
    fields = [dict(_fields(entry)) for entry in entries]
    keys = dict.fromkeys(key for own in fields for key in own)
    found = [(key, [own.get(key, _ABSENT) for own in fields]) for key in keys]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def shortened(value: str) -> str:
    """A value for a line: of a fingerprint the first digits, which tell it apart."""
    kind, colon, digits = value.partition(":")
    return f"{kind}:{digits[:8]}…" if colon and _DIGEST.fullmatch(digits) else value


def _fields(entry: Entry) -> Iterator[tuple[str, str]]:
    record = entry.record
    model, environment = record["model"], record["environment"]
    yield "model", str(model["source"])
    yield "model weights", str(model.get("digest", _ABSENT))
    yield from _flat("recipe", _without(record["recipe"], (*_LEFT_OUT, "calibration")))
    yield from _flat("calibration", record["calibration"])
    if "masks" in record:
        yield "masks given", str(record["masks"]["digest"])
    if "recovery" in record:
        recovery = record["recovery"]
        yield from _flat("training", _without(recovery["recipe"], _LEFT_OUT))
        yield from _flat("training text", recovery["text"])
        yield "training tokens", str(recovery["tokens"])
    yield "format", entry.stored
    for key in ("device", "dtype"):
        yield key, str(environment[key])
    for name in ("llmprune", "torch", "transformers"):
        yield f"{name} version", str(environment["versions"].get(name, _ABSENT))


def _without(recipe: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in keys}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Fields by dotted keys; lists as they are written in JSON."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key != "targets" or inner != ["*"]:
                yield from _flat(f"{prefix}.{key}", inner)
    elif not isinstance(value, (str, int, float, bool, type(None))):
        yield prefix, json.dumps(value)
    else:
        yield prefix, _ABSENT if value is None else str(value)
