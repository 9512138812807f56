"""The Python function for figures of papers: `published`."""

from __future__ import annotations

from typing import Any

from llmprune.api.arguments import CHECKS, checked
from llmprune.literature import published as shelf


@checked(model=CHECKS["metric"])
def published(model: str | None = None, *, metric: str | None = None) -> list[dict[str, Any]]:
    """The figures that papers published of a model, each with its protocol and its source.

    Args:
        model: an alias or a hub id; None for the figures of all models.
        metric: only those of `perplexity` or `accuracy`, of a text (`wikitext2`) or of a task (`piqa`).

    Returns:
        A dict per figure: `model` (hub id), `method` and `about` (the same in words), `pattern`, `sparsity`,
        `metric`, `on` (the text, or the tasks of which it is the mean), `value`, `dense` (None where it was
        not seen), `protocol` (`window`, `windows`, `shots`, `calibration`, `samples`, `length`, `trained`,
        `note`; None where the source does not say) and `source` (`paper`, `title`, `where`, `url`, `via`,
        `seen`). Accuracies are in percent.

    Raises:
        ValueError: no figures of that model or of that metric; the message names those there are.
    """
    figures = shelf.all_figures() if model is None else shelf.published_for(model)
    if not figures:
        raise shelf.no_figures(str(model))
    return [figure.as_dict() for figure in shelf.chosen(figures, metric)]
