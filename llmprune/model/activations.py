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

import torch
from torch import Tensor
from torch.func import functional_call

from llmprune.common.messages import first_line, size_text
from llmprune.machine import device as devices
from llmprune.model.arguments import Arguments, Rows, Store, dicts_in
from llmprune.model.recorder import Recorder
from llmprune.model.skeleton import Skeleton
from llmprune.numerics.counts import all_finite

# Tokens of a micro-batch: enough to keep the processor busy, few enough to stay in its cache.
_TOKENS = {"cpu": 2048, "cuda": 16384}


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
        self._recorder = Recorder(skeleton, tokens)
        with self._recorder.loaded():
            self._axis = self._find_axis()  # of the sequences in the hidden states
            self._arguments = Arguments(self._recorder.calls, len(tokens), store, device)
            self._recorder.check_chain(self._arguments.note_carried)
            self._embed()

    def slices(self, start: int = 0) -> Iterator[slice]:
        """The micro-batches, from sequence `start` on."""
        count = len(self._tokens)
        return (slice(i, min(i + self.batch, count)) for i in range(start, count, self.batch))

    def _find_axis(self) -> int:
        """The axis of the sequences: some models pass several streams of hidden states stacked."""
        shapes: list[torch.Size] = []
        for rows in ([0], [0, 0]):
            self._recorder.calls(rows, lambda hidden: shapes.append(hidden.shape))
        axes = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if sizes == (1, 2)]
        if len(axes) != 1 or len(shapes[1]) < 3:
            raise ValueError(
                f"the blocks of {type(self._skeleton.model).__name__} get hidden states of shape "
                f"{list(shapes[1])}, not one row per token; this architecture is not supported"
            )
        return axes[0]

    def _embed(self) -> None:
        """Compute and store the inputs of the first block, and what else the blocks get."""

        def news(part: slice) -> bool:
            calls = self._recorder.calls(part, lambda hidden: self.put(part, hidden, None))
            return self._arguments.notice(part, calls)

        while any(news(part) for part in self.slices()):
            pass  # what turned out to depend on the tokens is kept of the sequences before, too

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

    def hidden(self, rows: Rows) -> Tensor:
        """The stored hidden states of some sequences, [n, T, D], on the device."""
        assert self._hidden is not None
        return self._hidden[rows].to(self.device).movedim(0, self._axis)

    def run(
        self, number: int, rows: Rows, weights: Mapping[str, Tensor], hidden: Tensor | None = None
    ) -> Tensor:
        """The outputs of block `number` for some sequences, [n, T, D]; its inputs if it does not run on text.

        `weights`, by name in the block, are used in place of its own, and `hidden` in place of the inputs
        that are stored.
        """
        call = self._arguments.of(number, rows)
        block, hidden = self._blocks[number], self.hidden(rows) if hidden is None else hidden
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

    @property
    def everything(self) -> Tensor:
        """The stored hidden states of all sequences, [N, T, D] with the sequences first; not a copy."""
        assert self._hidden is not None
        return self._hidden

    @property
    def stateless(self) -> bool:
        """Whether blocks have handed on nothing but the hidden states so far."""
        return self._arguments.stateless

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """The model's logits [n, T, V] from the outputs of the last block, one micro-batch at a time."""
        with self._whole_head():
            for part in self.slices():
                yield part, self._recorder.logits(part, self.hidden(part))

    def pull(self, loss: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """The gradient of each sequence's loss by the outputs of the last block, laid out as those.

        `loss` gets the number of a sequence and its logits [1, T, V].
        """
        found: list[Tensor] = []
        with self._whole_head():
            for row in range(len(self._tokens)):
                last = self.hidden([row]).requires_grad_()
                with torch.enable_grad():
                    value = loss(row, self._recorder.logits([row], last))
                found += torch.autograd.grad(value, last)
        return found

    @contextmanager
    def _whole_head(self) -> Iterator[None]:
        """Load all weights outside of the blocks inside the `with`, after they have been checked to fit."""
        outer = self._skeleton.outside_blocks()
        self._skeleton.load(outer)
        self._recorder.check_head(self.hidden([0]))
        yield
        self._skeleton.free(outer)
