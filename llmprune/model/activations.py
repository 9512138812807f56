"""The inputs of the blocks (hidden states), computed block by block, with the weights of one block in memory.

N sequences, n sequences of a micro-batch, T tokens, D model width, V vocabulary. What blocks get beside the
hidden states is recorded and replayed (`model.arguments`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmprune.common.messages import first_line, size_text
from llmprune.machine import device as devices
from llmprune.model.arguments import Arguments, Call, Rows, Store, dicts_in, same_arguments
from llmprune.model.skeleton import Skeleton
from llmprune.numerics.counts import all_finite

# Tokens of a micro-batch: enough to keep the processor busy, few enough to stay in its cache.
_TOKENS = {"cpu": 2048, "cuda": 16384}


_MOST_ITEMS = 4  # of what a block returns
# What a model raises that cannot be run block by block.
_UNFIT = (TypeError, ValueError, LookupError, AttributeError, NotImplementedError, RuntimeError)


class _Stop(Exception):
    """Ends a forward pass when the last block is reached."""


class _Broken(Exception):
    """A block does not get what the block before it put out."""


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


def micro_batch(tokens: int, device: torch.device) -> int:
    """How many sequences of `tokens` tokens go through a block together."""
    return max(1, _TOKENS[device.type] // tokens)


def in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate the block inputs in memory."""
    return torch.empty(shape, dtype=dtype)


def on_disk(folder: Path) -> Store:
    """A function that allocates the block inputs in a temporary file of a folder, mapped into memory.

    Raises:
        ValueError: (by the function) the disk is too small.
    """

    def store(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # A unique name: several processes use the same folder.
        handle, name = tempfile.mkstemp(prefix="activations-", dir=folder)
        path, elements = Path(name), torch.Size(shape).numel()
        with os.fdopen(handle, "wb") as file:
            try:
                # Claim the disk space now: writing to a mapped file on a full disk would kill the process.
                os.posix_fallocate(file.fileno(), 0, max(1, elements * dtype.itemsize))
            except OSError as error:
                path.unlink()
                size = size_text(elements * dtype.itemsize)
                raise ValueError(
                    f"the block inputs need {size} on the disk of {folder}: {error.strerror}; make room"
                ) from None
        mapped = torch.from_file(str(path), shared=True, size=elements, dtype=dtype).view(shape)
        path.unlink()  # the mapping keeps the file's content until the process ends
        return mapped

    return store


class BlockInputs:
    """The inputs of the current block, [N, T, D] in the compute dtype; `forward` moves on to the next block.

    Args:
        skeleton: the model.
        tokens: int64 [N, T].
        device: to compute on.
        store: allocates the block inputs.
        note: called with a message when memory runs out and the micro-batch is halved.

    Raises:
        ValueError: an architecture whose blocks cannot be run by themselves, or embeddings that are not
            finite.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        device: torch.device,
        store: Store = in_memory,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._skeleton, self._tokens, self.device = skeleton, tokens, device
        self._store, self._note = store, note
        self._blocks, self.length = list(skeleton.blocks.values()), tokens.shape[1]
        self.batch = min(micro_batch(tokens.shape[1], device), len(tokens))
        self._hidden: Tensor | None = None
        self._items = 0  # of the tuple that the model expects its blocks to return; 0 for the tensor alone
        self._axis = 0  # of the sequences in the hidden states
        self._loaded = False  # whether the weights outside of the blocks are loaded
        self._shape = torch.Size()  # of the hidden states last recorded
        with self._outer():
            self._arguments = Arguments(self._record, tokens, store, device)
            self._embed()

    def slices(self, start: int = 0) -> Iterator[slice]:
        """The micro-batches, from sequence `start` on."""
        count = len(self._tokens)
        return (slice(i, min(i + self.batch, count)) for i in range(start, count, self.batch))

    @torch.no_grad()
    def _embed(self) -> None:
        """Compute and store the inputs of the first block, and what else the blocks get."""
        self._find_axis()
        for part in self.slices():
            # Without arguments that depend on the tokens only the first block is needed.
            calls = self._recorded(part, store=True)
            if self._arguments.varies and calls is not None:
                self._arguments.keep(part, calls)

    def _find_axis(self) -> None:
        """Find the axis of the sequences: some models pass several streams of hidden states stacked."""
        shapes = []
        for rows in ([0], [0, 0]):
            self._record(rows)
            shapes.append(self._shape)
        self._check_chain()
        shape = shapes[1]
        axes = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if sizes == (1, 2)]
        if len(axes) != 1 or len(shape) < 3:
            raise ValueError(
                f"the blocks of {type(self._skeleton.model).__name__} get hidden states of shape "
                f"{list(shape)}, not one row per token; this architecture is not supported"
            )
        self._axis = axes[0]

    def _check_chain(self) -> None:
        """Raise `ValueError` unless every block runs once, on what the block before it put out.

        What it gets beside that may depend on the tokens, and on further items that earlier blocks return,
        but not on their hidden states.
        """
        one, other = self._chained(0.5), self._chained(1.0)
        for number, (a, b) in enumerate(zip(one, other, strict=False)):
            if not same_arguments(a, b):
                raise self._unchained(number)

    def _chained(self, added: float) -> list[Call]:
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
                self._arguments.note_carried(number, (args, kwargs), item, source)
            calls.append((args, kwargs))
            given.append(hidden + added)
            items = [torch.zeros(1, dtype=torch.float32) for _ in range(1, self._items)]
            more.extend((item, (number, place)) for place, item in enumerate(items, start=1))
            return (given[-1], *items) if self._items else given[-1]

        with _replaced(self._blocks, record):
            try:
                self._skeleton.model(input_ids=self._tokens[[0]].to(self.device), use_cache=False)
            except _Broken as error:
                raise self._unchained(error.args[0]) from None
            except Exception:  # after the last block: the head is not loaded
                pass
        return calls

    def _unchained(self, number: int) -> ValueError:
        return ValueError(
            f"{type(self._skeleton.model).__name__} does more between its blocks than hand on what they put "
            f"out (at block {number + 1}); this architecture is not supported"
        )

    @contextmanager
    def _outer(self) -> Iterator[None]:
        """Load the weights that the model uses before its blocks, such as embeddings, inside the `with`."""
        if self._loaded:
            yield
            return
        head = _head_name(self._skeleton)
        names = [n for n in self._skeleton.outside_blocks() if not n.startswith(head)]
        self._skeleton.load(names)
        self._loaded = True
        yield
        self._loaded = False
        self._skeleton.free(names)

    @torch.no_grad()
    def _record(self, part: Rows) -> list[Call | None]:
        """The arguments of every block for one micro-batch.

        Finds out what the model expects its blocks to return.
        """
        failed: Exception | None = None
        with self._outer():
            for items in range(self._items, _MOST_ITEMS + 1):
                self._items = items
                try:
                    calls = self._recorded(part, store=False)
                except _UNFIT as error:
                    failed = failed or error
                    continue
                if calls is not None:
                    return calls
        self._items = 0
        why = f" ({type(failed).__name__}: {first_line(failed)})" if failed else ""
        raise ValueError(
            f"the blocks of {type(self._skeleton.model).__name__} cannot be run one after the other{why}; "
            "this architecture is not supported"
        ) from failed

    def _recorded(self, part: Rows, store: bool) -> list[Call | None] | None:
        """As `_record`, or None if the model expects its blocks to return something else (`_items`).

        With `store` the first block's inputs are stored.
        """
        calls: dict[int, Call] = {}
        shapes = set()

        def record(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            shapes.add(hidden.shape)
            if not calls:
                self._shape = hidden.shape
                if store and isinstance(part, slice):
                    self.put(part, hidden, None)
            calls[number] = args, kwargs
            if number == len(self._blocks) - 1 or len(shapes) > 1:
                raise _Stop
            return self._returned(hidden)

        with _replaced(self._blocks, record):
            try:
                self._skeleton.model(input_ids=self._tokens[part].to(self.device), use_cache=False)
            except _Stop:
                pass
        if len(shapes) > 1:
            return None
        if len(self._blocks) - 1 not in calls:
            raise ValueError(
                f"{type(self._skeleton.model).__name__} runs {len(calls)} of its {len(self._blocks)} blocks, "
                "and not the last one"
            )
        # Blocks of cross-attention to images do not run on text.
        return [calls.get(number) for number in range(len(self._blocks))]

    def _returned(self, hidden: Tensor) -> Tensor | tuple[Tensor | None, ...]:
        """Hidden states in the form in which the model expects them from a block."""
        return (hidden, *[None] * (self._items - 1)) if self._items else hidden

    def put(self, part: slice, hidden: Tensor, block: int | None) -> None:
        """Store hidden states [n, T, D] of some sequences: outputs of a block, or of the embeddings (None).

        Raises:
            ValueError: NaN or Inf; the message names the block.
        """
        hidden = hidden.movedim(self._axis, 0)
        if self._hidden is None:
            self._hidden = self._store((len(self._tokens), *hidden.shape[1:]), hidden.dtype)
        self._hidden[part] = hidden
        if not all_finite(self._hidden[part]):
            raise ValueError(self._not_finite(block))

    def _not_finite(self, block: int | None) -> str:
        """The message for outputs of a block that are not finite."""
        names, dtype = list(self._skeleton.blocks), str(self._skeleton.dtype).removeprefix("torch.")
        where = "the embeddings" if block is None else f"block {block + 1} of {len(names)} ({names[block]})"
        remedy = "try --dtype float32; else" if dtype != "float32" else "most likely"
        return (
            f"{where} put out the first NaN or Inf, in {dtype}; {remedy} the checkpoint is broken there "
            "or before (huge weights, a norm's epsilon in config.json)"
        )

    @torch.no_grad()
    def each(self, work: Callable[[slice], None], again: Callable[[], None]) -> None:
        """Do the work on every micro-batch.

        If memory runs out, `again` is called, and all the work is done anew with smaller micro-batches.
        """
        try:
            for part in self.slices():
                work(part)
        except (RuntimeError, MemoryError) as error:
            self.halve(error)
            again()
        else:
            return
        self.each(work, again)

    @torch.no_grad()
    def forward(self, number: int, weights: Mapping[str, Tensor] | None = None, done: int = 0) -> None:
        """Replace the stored inputs of block `number` by its outputs, which are the next block's inputs.

        Args:
            number: of the block, from 0.
            weights: used in place of the block's own, by name in the block.
            done: how many sequences, from the first on, have been replaced already.
        """
        while done < len(self._tokens):
            try:
                for part in self.slices(done):
                    self.put(part, self.run(number, part, weights or {}), number)
                    done = part.stop
            except (RuntimeError, MemoryError) as error:
                self.halve(error)

    def run(self, number: int, part: slice, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs of block `number` for one micro-batch, [n, T, D]; see `outputs`."""
        return self.outputs(number, part, weights)

    def hidden(self, rows: Rows) -> Tensor:
        """The stored hidden states of some sequences, [n, T, D], on the device."""
        assert self._hidden is not None
        return self._hidden[rows].to(self.device).movedim(0, self._axis)

    def outputs(self, number: int, rows: Rows, weights: Mapping[str, Tensor]) -> Tensor:
        """The outputs of block `number` for some sequences, [n, T, D]; its inputs if it does not run on text.

        `weights`, by name in the block, are used in place of its own.
        """
        call = self._arguments.of(number, rows)
        block, hidden = self._blocks[number], self.hidden(rows)
        if call is None:
            return hidden
        args, kwargs = call
        before = dicts_in(kwargs)
        result: Tensor | tuple[Tensor, ...] | list[Tensor]
        try:
            if weights:
                result = functional_call(block, dict(weights), (hidden, *args), kwargs)
            else:
                result = block(hidden, *args, **kwargs)
        except (TypeError, LookupError, AttributeError, NotImplementedError) as error:
            name = list(self._skeleton.blocks)[number]
            raise ValueError(
                f"{name} of {type(self._skeleton.model).__name__} cannot be run by itself "
                f"({type(error).__name__}: {first_line(error)}); this architecture is not supported"
            ) from error
        self._arguments.keep_states(number, before, kwargs, rows)
        if isinstance(result, (tuple, list)):
            self._arguments.keep_carried(number, result, rows)
            return result[0]
        return result

    def halve(self, error: BaseException) -> None:
        """Halve the micro-batch after memory ran out.

        Any other error, or a micro-batch of one sequence, is raised again.
        """
        if not devices.out_of_memory(error) or self.batch == 1:
            raise error
        self._note(f"out of memory with {self.batch} sequences at once; going on with {self.batch // 2}")
        self.batch //= 2
        devices.free_cached_memory(self.device)

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """The model's logits [n, T, V] from the outputs of the last block, one micro-batch at a time."""
        outer = self._skeleton.outside_blocks()
        self._skeleton.load(outer)
        for part in self.slices():

            def finish(number: int, hidden: Tensor, *args: Any, part: slice = part, **kwargs: Any) -> Any:
                hidden = self.hidden(part) if number == len(self._blocks) - 1 else hidden
                return self._returned(hidden)

            with _replaced(self._blocks, finish):
                logits = self._whole(part)
            if part.start == 0:
                self._check_head(logits[:1])
            yield part, logits
        self._skeleton.free(outer)

    def _whole(self, part: slice) -> Tensor:
        """The model's logits with the functions that stand for its blocks at the moment."""
        tokens = self._tokens[part].to(self.device)
        try:
            logits: Tensor = self._skeleton.model(input_ids=tokens, use_cache=False).logits
        except (TypeError, LookupError, AttributeError, NotImplementedError) as error:
            raise ValueError(
                f"{type(self._skeleton.model).__name__} cannot be run without its blocks "
                f"({type(error).__name__}: {first_line(error)}); this architecture is not supported"
            ) from error
        return logits

    def _check_head(self, logits: Tensor) -> None:
        """Raise `ValueError` where the logits depend on other outputs of blocks than those of the last."""

        def changed(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            first, last = slice(0, 1), number == len(self._blocks) - 1
            return self._returned(self.hidden(first) if last else hidden + 1)

        with _replaced(self._blocks, changed):
            again = self._whole(slice(0, 1))
        if not torch.allclose(again.float(), logits.float(), rtol=1e-2, atol=1e-2):
            raise self._unchained(len(self._blocks))


def _head_name(skeleton: Skeleton) -> str:
    """The prefix of the output head's parameter names; one that no name has if there is no head."""
    head = skeleton.model.get_output_embeddings()
    return next((f"{name}." for name, module in skeleton.model.named_modules() if module is head), "\0")
