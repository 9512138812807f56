"""Warnings about text: a run that was given none uses Python source, which does not suit every model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmprune.checkpoint.reader import read_json
from llmprune.demo.text import calibration_documents

if TYPE_CHECKING:
    from llmprune.evaluation.scores import EvaluationSpec
    from llmprune.model.opening import Model

_FAR_MORE = 1.4  # times as many tokens for a byte of source text: the tokenizer was not made for it
_SOURCE_BYTES = 40_000
ENGLISH = """\
A neural network is a long chain of simple steps. Each step multiplies what it is given by a table of \
numbers, and the numbers
of all these tables together are what the network has learned. Many of them turn out to matter little. \
One can set a good half of
them to zero and find that the answers hardly change, provided that the right half was chosen.

How is the right half found? Small numbers are a first guess, but a small number on a busy line may carry \
more than a large one on a
line that is nearly always silent. So we let the network read a few pages of text, of the kind it will \
meet later, and watch how
busy each line is. The better the pages resemble the later work, the better the choice will be. A model \
that was raised on letters and
newspapers should not be judged by a page of bookkeeping, and a program is no novel.

When the choice is made, the network is asked to read other pages, which it has not seen, once as it was \
and once as it is now. If
it was surprised by one word in forty before and by one in forty-two after, most readers would call that \
a fair price.
"""


def on_texts(model: Model, calibrated: bool, evaluation: EvaluationSpec | None) -> tuple[str, ...]:
    """Warnings where the built-in text is used because none was named.

    Args:
        model: the model. calibrated: whether it is calibrated on the built-in text.
        evaluation: what is scored, as it was asked for; None: nothing.
    """
    named = evaluation is not None and (evaluation.perplexity or evaluation.tasks)
    scored = evaluation is not None and not model.remote and not named
    if not (calibrated or scored) or _is_demo(model):
        return ()
    verbs = " and ".join(verb for verb, on in (("calibrated", calibrated), ("scored", scored)) if on)
    options = [
        *(["--calibration FILE_OR_SOURCE"] if calibrated else []),
        *(["--perplexity FILE"] if scored else []),
    ]
    network = " (the source c4 is such text for most models, but needs network)" if calibrated else ""
    told = (
        f"WARNING: this model is {verbs} on program source, the library of your Python, since no text was "
        "named; for a model of English that is the wrong text: "
        f"give text of your own with {' and '.join(options)}{network}"
    )
    return (told, *_on_tokenizer(model.tokenizer))


def _on_tokenizer(tokenizer: Any) -> tuple[str, ...]:
    if tokenizer is None:
        return ()
    source = tokens_per_byte(tokenizer, calibration_documents())
    english = tokens_per_byte(tokenizer, [ENGLISH])
    if source < _FAR_MORE * english:
        return ()
    rates = f"{source:.2f} tokens per byte of that text and {english:.2f} of plain English"
    return (f"WARNING: its tokenizer makes {rates}: it was not made for program source",)


def tokens_per_byte(tokenizer: Any, documents: Sequence[str]) -> float:
    """Tokens a tokenizer makes of the beginning of some documents, per byte."""
    text = "\n\n".join(documents)[:_SOURCE_BYTES]
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) / len(text.encode())


def _is_demo(model: Model) -> bool:
    """Whether it is the embedded model, or was made of it."""
    if model.located is None or model.label == "demo":
        return model.label == "demo"
    record = model.located.folder / "llmprune.json"
    try:
        return bool(read_json(record)["model"]["source"] == "demo") if record.is_file() else False
    except (ValueError, LookupError, TypeError):
        return False
