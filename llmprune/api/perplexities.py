"""The perplexity beside the speeds of `bench`: from the record where it has it, else measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmprune.checkpoint.contents import RECORD
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.reader import read_record
from llmprune.evaluation.scores import EvaluationSpec, evaluation_spec, score
from llmprune.model.opening import Model
from llmprune.text.files import is_file

WINDOWS = 8  # of a text that is measured without a limit
NONE = "none"


@dataclass(frozen=True)
class Perplexities:
    """The perplexities of a model on some texts.

    Attributes:
        known: entries of the record, by text.
        spec: what is to be measured, prepared; None for nothing.
        rounded: whether packing rounds the weights, so that the packed model has perplexities of its own.
    """

    known: Mapping[str, Any]
    spec: EvaluationSpec | None
    rounded: bool

    def of(self, model: Model, packed: Callable[[], Model] | None, reporter: Any) -> dict[str, Any]:
        """By text `dense`, `packed`, `before_pruning`, `protocol`, and `from` (`record` or `measured`).

        Args:
            model: the checkpoint. packed: opens its packed form; None where it is not there.
        """
        found = {
            name: {
                "dense": entry["pruned"],
                "packed": entry["pruned"],
                "before_pruning": entry["dense"],
                "protocol": entry["protocol"],
                "from": "record",
            }
            for name, entry in self.known.items()
        }
        if self.spec is None:
            return found
        dense = score(model, self.spec, "dense", reporter).perplexity
        other = score(packed(), self.spec, "packed", reporter).perplexity if self.rounded and packed else {}
        for name, entry in dense.items():
            own = other.get(name, {}).get("value") if self.rounded else entry["value"]
            found[name] = {
                "dense": entry["value"],
                "packed": own,
                "before_pruning": None,
                "protocol": entry["protocol"],
                "from": "measured",
            }
        return found


def wanted(texts: Sequence[str], window: int | None, limit: int | None) -> EvaluationSpec | None:
    """What was asked for; None for no perplexity.

    Raises:
        ValueError: values out of range, or `none` beside texts.
    """
    if NONE in texts and len(texts) > 1:
        raise ValueError(f"perplexity {NONE} stands alone, got {', '.join(texts)}")
    spec = evaluation_spec([text for text in texts if text != NONE], (), None, window, limit)
    return None if NONE in texts else spec


def prepared(spec: EvaluationSpec | None, model: Model, rounded: bool) -> Perplexities:
    """Which perplexities the record has, and what is to be measured.

    Args:
        spec: as asked for, see `wanted`.
        model: the checkpoint.
        rounded: whether packing rounds the weights.

    Raises:
        ValueError: the model has no tokenizer, or a text cannot be read or is too short.
    """
    if spec is None:
        return Perplexities({}, None, rounded)
    recorded = {} if rounded else _recorded(model)
    texts = spec.perplexity or tuple(recorded) or ("builtin",)
    known = {text: recorded[text] for text in texts if _alike(text, recorded.get(text), spec)}
    left = tuple(text for text in texts if text not in known)
    if not left:
        return Perplexities(known, None, rounded)
    if model.tokenizer is None:
        raise ValueError(
            f"{model.label} has no tokenizer, which perplexity needs; put its files into the folder, or "
            f"leave perplexity out with --perplexity {NONE}"
        )
    measured = dataclasses.replace(spec, perplexity=left, limit=spec.limit or WINDOWS)
    return Perplexities(known, measured.prepare(model), rounded)


def _recorded(model: Model) -> Mapping[str, Any]:
    """The perplexities that the record beside the weights has of these very weights."""
    assert model.folder is not None
    if not (model.folder / RECORD).is_file():
        return {}
    record = read_record(model.folder)
    kept = isinstance(model.source, Packed) and model.source.values != "same"
    found = {} if kept else record.get("evaluation", {}).get("perplexity", {})
    return found if isinstance(found, dict) else {}


def _alike(text: str, entry: Any, spec: EvaluationSpec) -> bool:
    """Whether an entry of the record is what was asked for. What a file holds may have changed since."""
    if is_file(text) or not isinstance(entry, dict) or not {"dense", "pruned", "protocol"} <= set(entry):
        return False
    protocol = entry["protocol"]
    return spec.window in (None, protocol["window"]) and spec.limit in (None, protocol["windows"])
