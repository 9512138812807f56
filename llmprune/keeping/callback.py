"""A mask keeper as a callback of the `Trainer` of transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from llmprune.keeping.owned import base_of

if TYPE_CHECKING:
    from llmprune.keeping.keeper import MaskKeeper


class KeeperCallback(TrainerCallback):  # type: ignore[misc]
    """Attaches a keeper to the optimizer that a `Trainer` makes; checks the zeros where that saves and ends.

    Args:
        keeper: of the model that the trainer gets.
    """

    def __init__(self, keeper: MaskKeeper) -> None:
        self._keeper = keeper

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Attach.

        Raises:
            ValueError: the trainer has another model than the keeper, or no optimizer of torch.
        """
        if base_of(given["model"]) is not self._keeper.model:
            raise ValueError(
                "the Trainer trains another model than the MaskKeeper's; make both from the same object, and "
                "give the Trainer no model_init"
            )
        self._keeper.attach(given["optimizer"])

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check what was just saved."""
        self._keeper.check()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Check and detach."""
        self._keeper.detach()
        self._keeper.check()
