"""Says how a recovery is repeated: the commands, and what must be at hand for them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, NamedTuple

from llmprune.recipe import recovery as recipes
from llmprune.record.history import pruned_here, trainings
from llmprune.text.mixture import is_file, plain_sources

Record = dict[str, Any]
RECIPE_FILE, PRUNING_FILE = "recovery.yaml", "pruning.yaml"
_START = "START"


class Repetition(NamedTuple):
    """How to repeat a recovery.

    Attributes:
        commands: to be run in this order; none where that is not possible.
        needed: what must be at hand, in sentences.
    """

    commands: list[str]
    needed: list[str]


def repetition(record: Mapping[str, Any]) -> Repetition:
    """The commands that train the same again."""
    recovery = record["recovery"]
    text = recovery["text"]
    if text["source"].endswith("in memory"):
        return Repetition([], ["The text was given in memory, so no command repeats the training."])
    start, commands = _start(record)
    named = _named(recovery["recipe"])
    arguments = ["llmprune", "recover", start, *named, *_text(recovery), *_aim(record), *_teacher(record)]
    packed = ["--format", "packed"] if record.get("format", {}).get("name") == "packed" else []
    command = [*arguments, *packed, "--dtype", record["environment"]["dtype"], "--output", "again"]
    needed = []
    if start == _START:
        was = recovery["start"]
        needed.append(f"{_START} is the model that was trained, called {was['source']}: {was['digest']}.")
    if any(map(is_file, plain_sources(text["source"]))):
        needed.append(f"The text is a file of that name; its tokens have the digest {text['digest']}.")
    if commands:
        needed.append(f"{PRUNING_FILE} is the recipe of the pruning, which stands on this page.")
    if RECIPE_FILE in named:
        needed.append(f"{RECIPE_FILE} is the recipe of the training, which stands on this page.")
    return Repetition([*commands, shlex.join(command)], needed)


def _start(record: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The model to train, and the commands that make it; `_START` where none can make it."""
    model = record["model"]
    public = model["source"] == "demo" or "/" in model["source"]
    if not public or "masks" in record or len(trainings(record)) > 1:
        return _START, []
    if not pruned_here(record):
        return model["source"], []
    source = record["calibration"]["source"]
    if source.endswith("in memory") or any(map(is_file, plain_sources(source))):
        return _START, []
    revision = ["--revision", model["revision"]] if model["revision"] else []
    command = ["llmprune", "prune", model["source"], *revision, "--recipe", PRUNING_FILE]
    return "pruned", [shlex.join([*command, "--output", "pruned"])]


def _named(recipe: Record) -> list[str]:
    """The options that name a recipe: one that ships with the program, else a file."""
    if recipe["name"] in recipes.names():
        shipped = recipes.load(recipe["name"]).as_dict()
        if _plain(shipped) == _plain(recipe):
            seed = ["--seed", str(recipe["seed"])] if recipe["seed"] != shipped["seed"] else []
            return ["--recipe", recipe["name"], *seed]
    return ["--recipe", RECIPE_FILE]


def _plain(recipe: Record) -> Any:
    """What decides a recipe, but for its seed, with lists for tuples."""
    kept = {key: value for key, value in recipe.items() if key not in ("seed", "chosen", "description")}
    return json.loads(json.dumps(kept))


def _text(recovery: Record) -> list[str]:
    text, asked = recovery["text"], recovery["asked"]
    several = ["--epochs", str(asked["epochs"])] if asked["epochs"] > 1 else []
    length = ["--seqlen", str(text["sequence_length"])]
    return ["--text", text["source"], "--tokens", str(asked["tokens"]), *several, *length]


def _aim(record: Mapping[str, Any]) -> list[str]:
    aim = record["recovery"].get("aim")
    if aim:
        if aim["pattern"] == "unstructured":
            return ["--sparsity", f"{aim['sparsity']:g}"]
        return ["--pattern", aim["pattern"]]
    return [] if record["totals"]["zeros"] else ["--sparsity", "0"]


def _teacher(record: Mapping[str, Any]) -> list[str]:
    teacher = record["recovery"].get("teacher", {}).get("source")
    return ["--teacher", teacher] if teacher and teacher != record["model"]["source"] else []
