"""Says how a pruning is repeated: the command, and what must be at hand for it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from llmprune.common.shipped import shipped_names
from llmprune.recipe import loading as recipes
from llmprune.recipe.types import ROUNDING
from llmprune.record.repeating import Repetition
from llmprune.text.mixture import is_file, plain_sources

Record = Mapping[str, Any]
RECIPE_FILE = "recipe.yaml"
_MODEL, _MASKS = "MODEL", "masks.safetensors"
_LOCAL_TASKS = ("rte_local", "blimp_local")


def rerun(record: Record) -> Repetition:
    """The commands that prune, and score where it was scored, the same again."""
    calibration = record["calibration"]
    if calibration["source"].endswith("in memory"):
        return Repetition([], ["The calibration text was given in memory, so no command repeats the run."])
    named, model = _recipe(record), _model(record["model"])
    scoring, written = _scoring(record["evaluation"]), _format(record)
    applied = not calibration["samples"] and "masks" in record
    if applied:
        arguments = ["mask", "apply", model[0], "--masks", _MASKS]
    else:
        masks = ["--masks", _MASKS] if "masks" in record else []
        arguments = ["run" if scoring else "prune", *model, *named, *masks, *scoring, *written]
        arguments += ["--dtype", record["environment"]["dtype"]]
    command = shlex.join(["llmprune", *arguments, "--output", "again"])
    return Repetition([command, *_converted(record)], _needed(record, model[0], RECIPE_FILE in named))


def _model(model: Record) -> list[str]:
    """The model's name, and how it was opened."""
    public = model["source"] == "demo" or "/" in model["source"]
    return [
        model["source"] if public else _MODEL,
        *(["--revision", model["revision"]] if model["revision"] else []),
        *(["--blocks", model["blocks"]] if model.get("blocks") else []),
        *(["--dequantize"] if model.get("dequantized") else []),
    ]


def _recipe(record: Record) -> list[str]:
    """The options that lead to this very recipe, else its file."""
    recipe, spec = record["recipe"], record["recipe"]["calibration"]
    wanted = {
        "sparsity": recipe["sparsity"] if recipe["pattern"] == "unstructured" else None,
        "pattern": recipe["pattern"],
        "seed": recipe["seed"],
        "calibration.source": spec["source"],
        "calibration.samples": spec["samples"],
        "calibration.sequence_length": spec["sequence_length"],
    }
    overrides = {key: value for key, value in wanted.items() if value is not None}
    if recipe["name"] not in shipped_names("recipes") or not _same(recipe, overrides):
        return ["--recipe", RECIPE_FILE]
    amount = ["--pattern", recipe["pattern"]]
    if recipe["pattern"] == "unstructured":
        amount = ["--sparsity", f"{recipe['sparsity']:.12g}"]
    rows = ["--samples", str(spec["samples"]), "--seqlen", str(spec["sequence_length"])]
    seed = ["--seed", str(recipe["seed"])]
    return ["--recipe", recipe["name"], *amount, "--calibration", spec["source"], *rows, *seed]


def _same(recipe: Record, overrides: Mapping[str, Any]) -> bool:
    """Whether the shipped recipe with a few fields changed is this one."""
    try:
        shipped = recipes.load(recipe["name"], overrides).as_dict()
    except ValueError:  # the recipe of that name is another one today
        return False
    return bool(_plain(shipped) == _plain(recipe))


def _plain(recipe: Record) -> Any:
    """What decides a recipe, with lists for tuples."""
    kept = {key: value for key, value in recipe.items() if key not in ("chosen", "description")}
    return json.loads(json.dumps(kept))


def _scoring(evaluation: Record) -> list[str]:
    """The texts and tasks of the scores, and how much of them was read; empty where nothing was scored."""
    texts, tasks = evaluation["perplexity"], evaluation["tasks"]
    options = [part for name in texts for part in ("--perplexity", name)]
    if tasks:
        options += ["--tasks", ",".join(tasks)]
    windows = {entry["protocol"]["window"] for entry in texts.values()}
    if len(windows) == 1:
        options += ["--eval-seqlen", str(windows.pop())]
    counts = [entry["protocol"]["windows"] for entry in texts.values()]
    counts += [n for metrics in tasks.values() if (n := metrics["protocol"]["documents"])]
    # Whatever the limit was, if there was one: with the largest count as the limit, the counts are these.
    return [*options, "--limit", str(max(counts))] if counts else options


def _format(record: Record) -> list[str]:
    """How the weights were saved, where the run itself did that."""
    form = record.get("format", {})
    if form.get("name") != "packed" or _rounded_later(record):
        return []
    values = str(form.get("values", "same"))
    return ["--format", "packed", *(["--values", values] if values != "same" else [])]


def _rounded_later(record: Record) -> bool:
    """Whether values were rounded when the folder was converted, not by the run."""
    by_run = any(update["name"] == ROUNDING for update in record["recipe"].get("update", []))
    return str(record.get("format", {}).get("values", "same")) != "same" and not by_run


def _converted(record: Record) -> list[str]:
    """The command that makes this format of the result; none where the run made it itself."""
    form = record.get("format", {})
    later = form.get("name") not in (None, "packed") or _rounded_later(record)
    if not later:
        return []
    values = str(form.get("values", "same"))
    rounding = ["--values", values] if values != "same" else []
    to = ["llmprune", "convert", "again", "--to", form["name"], *rounding, "--output", "again-converted"]
    return [shlex.join(to)]


def _needed(record: Record, model: str, own_recipe: bool) -> list[str]:
    """What the commands need beside llmprune, in sentences."""
    found, source = [], record["calibration"]["source"]
    if model == _MODEL:
        digest = record["model"].get("digest")
        found.append(
            f"{_MODEL} is the folder of {record['model']['source']}" + (f": {digest}." if digest else ".")
        )
    if "masks" in record:
        found.append(f"{_MASKS} are the masks that were given: {record['masks']['digest']}.")
    if own_recipe:
        found.append(f"{RECIPE_FILE} is the recipe on this page, saved under that name.")
    if any(map(is_file, plain_sources(source))):
        digest = record["calibration"]["digest"]
        found.append(f"The calibration text is a file of that name; its tokens have the digest {digest}.")
    files = [name for name in record["evaluation"]["perplexity"] if is_file(name)]
    found += [f"{name} is a text file that was scored." for name in files]
    local = [task for task in record["evaluation"]["tasks"] if task in _LOCAL_TASKS]
    if local:
        found.append(f"{', '.join(local)}: their data lies in a folder, --task-data DIR.")
    return found
