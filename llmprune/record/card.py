"""Writes the model card of a pruned checkpoint (README.md) from its record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llmprune.checkpoint.contents import CARD, RECORD
from llmprune.checkpoint.reader import read_record
from llmprune.model.classes import CAUSAL
from llmprune.record.figures import (
    Record,
    masks_given,
    method_of,
    score_table,
    share_of_all,
    size_remark,
)
from llmprune.record.history import pruned_here
from llmprune.record.record import calibrated_on
from llmprune.record.recovered import training_rows
from llmprune.record.repeating import repetition
from llmprune.record.rerunning import rerun


def protocol_lines(record: Record) -> list[str]:
    """How the scores were measured, one line for each distinct protocol."""
    versions, lines = record["environment"]["versions"], []
    for entry in record["evaluation"]["perplexity"].values():
        mean, dtype = entry["protocol"]["mean"], entry["protocol"]["dtype"]
        lines.append(f"perplexity: {mean}; documents joined, no overlap; forward passes in {dtype}")
    if record["evaluation"]["tasks"]:
        lines.append("± is a standard error; a change of at most two of them is called within its error")
    for task, metrics in record["evaluation"]["tasks"].items():
        protocol = metrics["protocol"]
        version = f"lm-eval {versions['lm_eval']}, task version {protocol['version']}"
        lines.append(f"{task}: {version}, {protocol['shots']} shots")
    return list(dict.fromkeys(lines))


def model_card(record: Record, name: str) -> str:
    """The model card: what the model is, its scores, how it was made, how to load it, and its licence.

    `name` is the folder's, without its path, or the repository's; it stands where the card says how to load
    it.
    """
    model, totals = record["model"], record["totals"]
    source = " ".join(model["source"].split())
    at = f" (commit `{model['revision']}`)" if model["revision"] else ""
    holder = "The weight files hold" if "format" in record else "`masks.safetensors` holds"
    masks = f"{holder} the keep masks"
    return f"""---
{_front_matter(record)}---

# {source.rpartition("/")[2]}, {totals["sparsity"]:.1%} sparse

{_made(record, source, at)}
{_masks_line(record)}\
{totals["zeros"]:,} of {totals["weights"]:,} weights in the pruned matrices are zero, \
{share_of_all(record)}; \
embeddings, norms and the output head are not pruned.

{size_remark(record)}

## Scores

{_scores_section(record)}
{_training_section(record)}{_recipe_section(record)}
## Load

```python
{load_snippet(name, record)}
```

{masks}, `llmprune.json` the full record (recipe, calibration fingerprint, \
every matrix, versions).
`llmprune inspect` recounts the zeros.

## Licence

{_licence_section(model)}
"""


def _made(record: Record, source: str, at: str) -> str:
    """How it was made, in a sentence or two."""
    if "recovery" not in record:
        return f"{source}{at} pruned after training, without retraining, by llmprune: {method_of(record)}."
    recovery = record["recovery"]
    pruned = "pruned and " if pruned_here(record) or "aim" in recovery else ""
    text = f"{recovery['tokens']:,} tokens of {calibrated_on(recovery['text'])}"
    how = f"It was trained on {text}{_sparsity_meanwhile(record)}."
    return f"{source}{at} {pruned}trained by llmprune: {method_of(record)}.\n{how}"


def _sparsity_meanwhile(record: Record) -> str:
    """What became of the sparsity in the training."""
    recovery = record["recovery"]
    if "aim" in recovery:
        return ", pruned meanwhile"
    if not record["totals"]["zeros"]:
        return ""
    return ", its sparsity kept while the masks moved" if recovery["recipe"]["rule"] else ", its masks kept"


def _training_section(record: Record) -> str:
    """On what it was trained, what came of it, the recipe, and how to repeat it; empty without training."""
    if "recovery" not in record:
        return ""
    recovery = record["recovery"]
    rows = "\n".join(map(_line, training_rows(record)))
    again = repetition(record)
    commands = "\n".join(again.commands)
    block = f"\n```\n{commands}\n```\n" if commands else ""
    needed = "".join(f"\n- {line}" for line in again.needed)
    return f"""## Training

| | |
|---|---|
{rows}

Digest of the tokens: `{recovery["text"]["digest"]}`, of the start: `{recovery["start"]["digest"]}`.

{folded("The recipe of the training with every default", recovery["recipe"])}
To train it again:
{block}{needed}

"""


def _recipe_section(record: Record) -> str:
    """The recipe it was pruned by; empty where it was pruned while it was trained, or nobody knows how."""
    if "recovery" in record and not pruned_here(record):
        return ""
    again = "" if "recovery" in record else _again(record)
    return f"""## Recipe

{_calibration_line(record["calibration"])}

{folded("The recipe with every default", record["recipe"])}{again}"""


def folded(title: str, recipe: Record) -> str:
    """A recipe as YAML, which opens where its title is clicked."""
    return f"""<details><summary>{title}</summary>

```yaml
{as_yaml(recipe)}```

</details>
"""


def _calibration_line(calibration: dict[str, Any]) -> str:
    """On which tokens it was calibrated."""
    if not calibration["samples"]:
        return "Not calibrated: nothing was computed, the masks were applied as they are."
    rows = f"{calibration['samples']} x {calibration['sequence_length']} tokens"
    seed, digest = calibration["seed"], calibration["digest"]
    return f"Calibrated on {rows} of {calibrated_on(calibration)}, seed {seed}, tokens `{digest}`."


def _masks_line(record: Record) -> str:
    """Where the masks came from, where they were given."""
    return f"The masks were given: {masks_given(record)}.\n" if "masks" in record else ""


def load_snippet(name: str, record: Record) -> str:
    """Python code that loads a folder or repository with a class of transformers."""
    quoted, auto_class = json.dumps(name, ensure_ascii=False), record["model"].get("auto_class", CAUSAL)
    if record.get("format", {}).get("name") == "sparse-bitmask":
        return f"""import llmprune
llmprune.convert({quoted}, to="dense", output="dense")  # once
model = llmprune.load("dense")"""
    first = "import llmprune  # which knows packed weights\n" if "format" in record else ""
    return f"""{first}from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained({quoted}, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained({quoted})"""


def published(card: str, repository: str, revision: str | None) -> str:
    """A card, perhaps edited by hand, whose section Load loads the repository instead of the local folder."""
    at = f', revision="{revision}"' if revision else ""
    before, heading, after = card.partition("\n## Load\n")
    section, fence, rest = after.partition("\n```\n")
    section = re.sub(r'(?<=\.from_pretrained\()"(?:[^"\\\n]|\\.)*"', lambda _: f'"{repository}"{at}', section)
    return (before + heading + section + fence + rest).replace('"PATH_OR_ID"', f'"{repository}"{at}')


def _again(record: Record) -> str:
    """How the run is repeated: the commands, and what they need."""
    again = rerun(record)
    commands = "\n".join(again.commands)
    block = f"\nTo make it again:\n\n```\n{commands}\n```\n" if commands else ""
    return block + "".join(f"\n- {line}" for line in again.needed) + ("\n" if again.needed else "")


def as_yaml(value: Any) -> str:
    """A value as YAML, in the order of its keys."""
    return yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True, width=1000)


def _front_matter(record: Record) -> str:
    """The YAML at the top of the card, for the hub. It names a licence only if the source's card does."""
    model = record["model"]
    licence = {key: model.get(key) for key in ("license", "license_name", "license_link")}
    fields = {
        "base_model": model["source"] if "/" in model["source"] else None,
        **licence,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llmprune", "pruned", "sparse"],
    }
    return as_yaml({key: value for key, value in fields.items() if value is not None})


def _scores_section(record: Record) -> str:
    head, rows = score_table(record)
    if not rows:
        return "Not scored: made without evaluation.\n"
    table = "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, rows)])
    protocols = "\n".join(f"- {line}" for line in protocol_lines(record))
    return f"""{table}

{_measured(record)} were measured alike:

{protocols}
"""


def _line(cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return "".join(f"| {cell.replace('|', '/')} " if cell else "| " for cell in cells) + "|"


def _measured(record: Record) -> str:
    """The models whose scores stand side by side."""
    return "All" if "recovery" in record else "Dense and pruned"


def _licence_section(model: dict[str, Any]) -> str:
    if model.get("license") is None:
        return (
            "The licence is the base model's. Its card names none or was not at hand: look it up before you "
            "share this model."
        )
    more = ", ".join(model[key] for key in ("license_name", "license_link") if model.get(key))
    licence = f"`{model['license']}`" + (f" ({more})" if more else "")
    return f"The licence is the base model's: {licence}, as the base model's own card says."


def card_text(folder: Path, repository: str, revision: str | None) -> str:
    """The card to upload: the folder's own, perhaps edited by hand, that loads from the repository.

    Raises:
        ValueError: the card cannot be read; or there is none and the record is not of this program.
    """
    path = folder / CARD
    record = {} if path.is_file() else read_record(folder)
    if record and "recipe" not in record:
        raise ValueError(
            f"{folder} was converted from a checkpoint that llmprune did not prune, so there is nothing to "
            f"make a model card of; write {CARD} in it yourself, then push again"
        )
    try:
        text = model_card(record, repository) if record else path.read_text(encoding="utf-8")
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / RECORD} is not a record of this program; restore the original") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}; remove it, and push writes it anew") from None
    return published(text, repository, revision)
