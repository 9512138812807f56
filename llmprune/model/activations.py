"""Block inputs: what the real model hands its blocks, captured once and replayed block by block.

N sequences, T tokens, D model width. The arguments beside the hidden states (masks, rotary tables, ...) are never re-created by hand:
the real model runs with its blocks replaced by recorders, so each block's own arguments are known before any block has weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmprune.model.skeleton import Skeleton

_Call = tuple[tuple[Any, ...], dict[str, Any]]
# A micro-batch holds about this many tokens: enough to fill the processor, little enough to stay in its cache.
_TOKENS = {"cpu": 2048, "cuda": 16384}


class _Stop(Exception):
    """Ends a forward pass once the last block was reached."""


@contextmanager
def _replaced(blocks: list[nn.Module], forward: Callable[..., Any]) -> Iterator[None]:
    """Each block's forward replaced by `forward(number, hidden, *args, **kwargs)` inside the `with`."""
    try:
        for number, block in enumerate(blocks):
            block.forward = _bound(forward, number)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _bound(forward: Callable[..., Any], number: int) -> Callable[..., Any]:
    # A name for the first parameter: some models pass the hidden states by keyword.
    def call(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(number, hidden_states, *args, **kwargs)

    return call


def micro_batch(tokens: int, device: torch.device) -> int:
    """Sequences of `tokens` tokens that go through a block together."""
    return max(1, _TOKENS[device.type] // tokens)


class BlockInputs:
    """The inputs of the current block, [N, T, D] in the compute dtype in RAM, moved on in place block by block."""

    def __init__(self, skeleton: Skeleton, tokens: Tensor, device: torch.device) -> None:
        self._skeleton, self._tokens, self._device = skeleton, tokens, device
        self._blocks = list(skeleton.blocks.values())
        self._batch = micro_batch(tokens.shape[1], device)
        self._calls: dict[int, list[_Call]] = {}  # micro-batch size -> arguments per block
        self._hidden: Tensor | None = None
        self._as_tuple = False  # what the model expects its blocks to return
        outer = [n for n in skeleton.outside_blocks() if not n.startswith(_head_name(skeleton))]
        skeleton.load(outer)
        self._embed()
        skeleton.free(outer)

    def slices(self) -> list[slice]:
        """The micro-batches."""
        return [slice(i, min(i + self._batch, len(self._tokens))) for i in range(0, len(self._tokens), self._batch)]

    @torch.no_grad()
    def _embed(self) -> None:
        for part in self.slices():
            calls = self._record(part)
            if calls is None:  # the model takes the first item of what a block returns
                self._as_tuple = True
                calls = self._record(part)
            assert calls is not None
            # Arguments depend on the shape of the batch alone, so one record per size serves all.
            known = self._calls.setdefault(part.stop - part.start, calls)
            if not _same(known[0], calls[0]):
                raise ValueError("the blocks of this model get arguments that depend on the tokens; this architecture is not supported")

    def _record(self, part: slice) -> list[_Call] | None:
        """The arguments of every block for one micro-batch; None where the recorders' return value was not what the model expects."""
        calls: list[_Call] = []
        shapes = set()

        def record(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            shapes.add(hidden.shape)
            if number == 0:
                self._store(part, hidden)
            calls.append((args, kwargs))
            if number == len(self._blocks) - 1 or len(shapes) > 1:
                raise _Stop
            return (hidden,) if self._as_tuple else hidden

        with _replaced(self._blocks, record):
            try:
                self._skeleton.model(input_ids=self._tokens[part].to(self._device), use_cache=False)
            except _Stop:
                pass
        return calls if len(shapes) == 1 else None

    def _store(self, part: slice, hidden: Tensor) -> None:
        if self._hidden is None:
            self._hidden = torch.empty(len(self._tokens), *hidden.shape[1:], dtype=hidden.dtype)
        self._hidden[part] = hidden

    @torch.no_grad()
    def forward(self, number: int, before: Callable[[slice], None] | None = None, store: bool = True) -> None:
        """Run every micro-batch through block `number`; with `store` its outputs become the next block's inputs.

        `before` is told each micro-batch before it runs.
        """
        assert self._hidden is not None
        block = self._blocks[number]
        for part in self.slices():
            if before is not None:
                before(part)
            args, kwargs = self._calls[part.stop - part.start][number]
            out = block(self._hidden[part].to(self._device), *args, **kwargs)
            if store:
                self._hidden[part] = out[0] if isinstance(out, tuple) else out

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """After the last block: the model's own last norm and output head, one micro-batch at a time, [n, T, V]."""
        outer = self._skeleton.outside_blocks()
        self._skeleton.load(outer)
        for part in self.slices():

            def finish(number: int, hidden: Tensor, *args: Any, part: slice = part, **kwargs: Any) -> Any:
                assert self._hidden is not None
                hidden = self._hidden[part].to(self._device) if number == len(self._blocks) - 1 else hidden
                return (hidden,) if self._as_tuple else hidden

            with _replaced(self._blocks, finish):
                output = self._skeleton.model(input_ids=self._tokens[part].to(self._device), use_cache=False)
            yield part, output.logits
        self._skeleton.free(outer)


def _same(a: _Call, b: _Call) -> bool:
    """Whether two calls got equal tensors."""
    from torch.utils._pytree import tree_leaves

    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor))


def _head_name(skeleton: Skeleton) -> str:
    head = skeleton.model.get_output_embeddings()
    return next((f"{name}." for name, module in skeleton.model.named_modules() if module is head), "\0")
