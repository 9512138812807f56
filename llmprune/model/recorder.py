"""Runs a model with functions in place of its blocks, to see what it hands to them and expects from them.

N sequences of T tokens, n of a micro-batch, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.common.messages import first_line
from llmprune.machine import device as devices
from llmprune.model.arguments import Call, Rows, same_arguments
from llmprune.model.skeleton import Skeleton

_MOST_ITEMS = 4  # of what a block returns
# What a model raises that cannot be run without its blocks.
_UNFIT = (TypeError, ValueError, LookupError, AttributeError, NotImplementedError, RuntimeError)
_NoteItem = Callable[[int, Call, Tensor, tuple[int, int]], None]


class _Stop(Exception):
    """Ends a forward pass when the last block is reached."""


class _Broken(Exception):
    """A block does not get what the block before it put out."""


class Recorder:
    """Records what the blocks of a model get for some of N sequences.

    Args:
        skeleton: the model.
        tokens: int64 [N, T].
    """

    def __init__(self, skeleton: Skeleton, tokens: Tensor) -> None:
        self._skeleton, self._tokens = skeleton, tokens
        self._blocks = list(skeleton.blocks.values())
        self._items = 0  # of the tuple that the model expects its blocks to return; 0 for the tensor alone
        self._loaded = False  # whether the weights outside of the blocks are loaded

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Load the weights that the model uses before its blocks, such as embeddings, inside the `with`."""
        if self._loaded:
            yield
            return
        head = _head_name(self._skeleton)
        names = [n for n in self._skeleton.outside_blocks() if not n.startswith(head)]
        self._skeleton.load(names)
        self._loaded = True
        try:
            yield
        finally:
            self._loaded = False
            self._skeleton.free(names)

    @torch.no_grad()
    def calls(self, rows: Rows, first: Callable[[Tensor], None] = lambda hidden: None) -> list[Call | None]:
        """The arguments of every block for some sequences; None for blocks that do not run on text.

        `first` gets the hidden states that the first block gets.

        Raises:
            ValueError: the model cannot be run with functions in place of its blocks.
        """
        failed: Exception | None = None
        with self.loaded():
            # Which form its blocks return is found out by trying; it stays the same from then on.
            for items in range(self._items, _MOST_ITEMS + 1):
                self._items = items
                try:
                    calls = self._tried(rows, first)
                except _UNFIT as error:
                    if devices.out_of_memory(error):
                        raise
                    failed = failed or error
                    continue
                if calls is not None:
                    return calls
        self._items = 0
        why = f" ({type(failed).__name__}: {first_line(failed)})" if failed else ""
        raise ValueError(
            f"the blocks of {type(self._skeleton.model).__name__} cannot be run one after the other{why}; "
            f"{self._remedy()}"
        ) from failed

    def _tried(self, rows: Rows, first: Callable[[Tensor], None]) -> list[Call | None] | None:
        """As `calls`, or None if the model expects its blocks to return something else (`_items`)."""
        calls: dict[int, Call] = {}
        inputs: Tensor | None = None
        fits = True

        def record(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            nonlocal inputs, fits
            inputs = hidden if inputs is None else inputs
            fits = hidden.shape == inputs.shape
            calls[number] = args, kwargs
            if number == len(self._blocks) - 1 or not fits:
                raise _Stop
            return self._returned(hidden)

        with _replaced(self._blocks, record):
            try:
                self._run(rows)
            except _Stop:
                pass
        if not fits:
            return None
        if inputs is None or len(self._blocks) - 1 not in calls:
            raise ValueError(
                f"{type(self._skeleton.model).__name__} runs {len(calls)} of its {len(self._blocks)} blocks, "
                f"and not the last one; {self._remedy()}"
            )
        first(inputs)
        # Blocks of cross-attention to images do not run on text.
        return [calls.get(number) for number in range(len(self._blocks))]

    @torch.no_grad()
    def check_chain(self, note_item: _NoteItem) -> None:
        """Raise `ValueError` unless every block runs once, on what the block before it put out.

        What it gets beside that may depend on the tokens, and on further items that earlier blocks return,
        but not on their hidden states.

        Args:
            note_item: called with a block, its arguments, an item that an earlier block returned beside the
                hidden states, that block and the place of the item in what it returned.
        """
        with self.loaded():
            one, other = self._chained(0.5, note_item), self._chained(1.0, note_item)
        for number, (a, b) in enumerate(zip(one, other, strict=False)):
            if not same_arguments(a, b):
                raise self._unchained(number)

    def _chained(self, added: float, note_item: _NoteItem) -> list[Call]:
        """The arguments of all blocks where each adds a number to the hidden states of the first sequence."""
        given: list[Tensor] = []
        more: list[tuple[Tensor, tuple[int, int]]] = []  # further items that blocks return: block and place
        calls: list[Call] = []
        order: list[int] = []

        def record(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            broken = bool(order) and number <= order[-1]
            order.append(number)
            if broken or (given and not torch.equal(hidden, given[-1])):
                raise _Broken(number)
            for item, source in more:
                note_item(number, (args, kwargs), item, source)
            calls.append((args, kwargs))
            given.append(hidden + added)
            items = [torch.zeros(1, dtype=torch.float32) for _ in range(1, self._items)]
            more.extend((item, (number, place)) for place, item in enumerate(items, start=1))
            return (given[-1], *items) if self._items else given[-1]

        with _replaced(self._blocks, record):
            try:
                self._run([0])
            except _Broken as error:
                raise self._unchained(error.args[0]) from None
            except _UNFIT:
                if order[-1:] != [len(self._blocks) - 1]:  # after the last block: the head is not loaded
                    raise
        return calls

    def _unchained(self, number: int) -> ValueError:
        return ValueError(
            f"{type(self._skeleton.model).__name__} does more between its blocks than hand on what they put "
            f"out (at block {number + 1}); {self._remedy()}"
        )

    def _remedy(self) -> str:
        return self._skeleton.other_lists(self._skeleton.list_name)

    def logits(self, rows: Rows, last: Tensor, added: float = 0) -> Tensor:
        """The model's logits [n, T, V] for some sequences, all weights outside of its blocks being loaded.

        Args:
            rows: the sequences.
            last: the outputs of the last block for them; gradients flow back to them where they require them.
            added: what every other block adds to its inputs.
        """

        def outputs(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self._returned(last if number == len(self._blocks) - 1 else hidden + added)

        try:
            with _replaced(self._blocks, outputs), torch.set_grad_enabled(last.requires_grad):
                logits: Tensor = self._run(rows).logits
        except (TypeError, LookupError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"{type(self._skeleton.model).__name__} cannot be run without its blocks "
                f"({type(error).__name__}: {first_line(error)}); this architecture is not supported"
            ) from error
        return logits

    def check_head(self, last: Tensor) -> None:
        """Raise `ValueError` where the logits depend on other outputs of blocks than those of the last.

        `last`: those of the last block for the first sequence.
        """
        one, other = (self.logits([0], last, added) for added in (0, 1))
        if not torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2):
            raise self._unchained(len(self._blocks))

    def _run(self, rows: Rows) -> Any:
        tokens = self._tokens[rows].to(self._skeleton.device)
        return self._skeleton.model(input_ids=tokens, use_cache=False)

    def _returned(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """Hidden states in the form in which the model expects them from a block."""
        return (hidden, *[None] * (self._items - 1)) if self._items else hidden


@contextmanager
def _replaced(blocks: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Replace each block's forward by `forward(number, hidden, *args, **kwargs)` inside the `with`."""
    try:
        for number, block in enumerate(blocks):
            block.forward = _bound(forward, number)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _bound(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    # The first parameter must have this name: some models pass the hidden states by keyword.
    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(number, hidden_states, *args, **kwargs)

    return call


def _head_name(skeleton: Skeleton) -> str:
    """The prefix of the output head's parameter names; one that no name has if there is no head."""
    head = skeleton.model.get_output_embeddings()
    return next((f"{name}." for name, module in skeleton.model.named_modules() if module is head), "\0")
