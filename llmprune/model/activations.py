"""Block inputs: what the real model hands its blocks, captured once and replayed block by block.

N sequences, T tokens, D model width. The arguments beside the hidden states (masks, rotary tables, ...) are never re-created by hand:
the real model runs with its blocks replaced by recorders, so each block's own arguments are known before any block has weights.
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

from llmprune.common.messages import size_text
from llmprune.machine import device as devices
from llmprune.model.skeleton import Skeleton
from llmprune.numerics.counts import all_finite

_Call = tuple[tuple[Any, ...], dict[str, Any]]
Store = Callable[[tuple[int, ...], torch.dtype], Tensor]
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


def in_memory(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Room for the block inputs in RAM."""
    return torch.empty(shape, dtype=dtype)


def on_disk(folder: Path) -> Store:
    """Room for the block inputs in a memory-mapped file of a folder, which disappears with the process."""

    def store(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        handle, name = tempfile.mkstemp(
            prefix="activations-", dir=folder
        )  # its own: several processes share the folder
        path, numbers = Path(name), torch.Size(shape).numel()
        with os.fdopen(handle, "wb") as file:
            try:  # the space is claimed now: a mapping on a full disk would kill the process
                os.posix_fallocate(file.fileno(), 0, max(1, numbers * dtype.itemsize))
            except OSError as error:
                path.unlink()
                size = size_text(numbers * dtype.itemsize)
                raise ValueError(
                    f"the block inputs need {size} on the disk of {folder}: {error.strerror}; make room"
                ) from None
        mapped = torch.from_file(str(path), shared=True, size=numbers, dtype=dtype).view(shape)
        path.unlink()
        return mapped

    return store


class BlockInputs:
    """The inputs of the current block, [N, T, D] in the compute dtype, moved on in place block by block.

    `store` makes room for them; `note` is told when memory runs out and the micro-batch is halved.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tokens: Tensor,
        device: torch.device,
        store: Store = in_memory,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._skeleton, self._tokens, self.device, self._make, self._note = (
            skeleton,
            tokens,
            device,
            store,
            note,
        )
        self._blocks, self.length = list(skeleton.blocks.values()), tokens.shape[1]
        self.batch = min(micro_batch(tokens.shape[1], device), len(tokens))
        self._calls: dict[int, list[_Call]] = {}  # micro-batch size -> arguments per block
        self._hidden: Tensor | None = None
        self._as_tuple = False  # what the model expects its blocks to return
        self._embed()

    def slices(self, start: int = 0) -> Iterator[slice]:
        """The micro-batches, from sequence `start` on."""
        return (
            slice(i, min(i + self.batch, len(self._tokens)))
            for i in range(start, len(self._tokens), self.batch)
        )

    @torch.no_grad()
    def _embed(self) -> None:
        with self._outer():
            for part in self.slices():
                calls = self._record(part, store=True)
                # Arguments depend on the shape of the batch alone, so one record per size serves all.
                known = self._calls.setdefault(part.stop - part.start, calls)
                if not _same(known[0], calls[0]):
                    raise ValueError(
                        "the blocks of this model get arguments that depend on the tokens; this architecture is not supported"
                    )

    @contextmanager
    def _outer(self) -> Iterator[None]:
        """Embeddings and what else the model needs before its blocks, loaded inside the `with`."""
        head = _head_name(self._skeleton)
        names = [n for n in self._skeleton.outside_blocks() if not n.startswith(head)]
        self._skeleton.load(names)
        yield
        self._skeleton.free(names)

    def _record(self, part: slice, store: bool) -> list[_Call]:
        calls = self._recorded(part, store)
        if calls is None:  # the model takes the first item of what a block returns
            self._as_tuple = True
            calls = self._recorded(part, store)
        assert calls is not None
        return calls

    def _recorded(self, part: slice, store: bool) -> list[_Call] | None:
        """The arguments of every block for one micro-batch; None where the recorders' return value was not what the model expects."""
        calls: list[_Call] = []
        shapes = set()

        def record(number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            shapes.add(hidden.shape)
            if number == 0 and store:
                self.put(part, hidden, None)
            calls.append((args, kwargs))
            if number == len(self._blocks) - 1 or len(shapes) > 1:
                raise _Stop
            return (hidden,) if self._as_tuple else hidden

        with _replaced(self._blocks, record):
            try:
                self._skeleton.model(input_ids=self._tokens[part].to(self.device), use_cache=False)
            except _Stop:
                pass
        return calls if len(shapes) == 1 else None

    def put(self, part: slice, hidden: Tensor, block: int | None) -> None:
        """Store hidden states [n, T, D] of some sequences, the outputs of a block (None: of the embeddings).

        Raises:
            ValueError: a number that is not finite, with the block where it appears.
        """
        if self._hidden is None:
            self._hidden = self._make((len(self._tokens), *hidden.shape[1:]), hidden.dtype)
        self._hidden[part] = hidden
        if not all_finite(self._hidden[part]):
            raise ValueError(self._not_finite(block))

    def _not_finite(self, block: int | None) -> str:
        names, dtype = list(self._skeleton.blocks), str(self._skeleton.dtype).removeprefix("torch.")
        where = "the embeddings" if block is None else f"block {block + 1} of {len(names)} ({names[block]})"
        remedy = "try --dtype float32; else" if dtype != "float32" else "most likely"
        return (
            f"{where} put out the first NaN or Inf, in {dtype}; {remedy} the checkpoint is broken there or before "
            "(huge weights, a norm's epsilon in config.json)"
        )

    @torch.no_grad()
    def each(self, work: Callable[[slice], None], again: Callable[[], None]) -> None:
        """Do the work on every micro-batch. `again` is told when memory ran out: it all begins anew, with smaller ones."""
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
        """Run every micro-batch but the `done` first sequences through block `number`; its outputs become the next block's inputs."""
        while done < len(self._tokens):
            try:
                for part in self.slices(done):
                    self.put(part, self.run(number, part, weights or {}), number)
                    done = part.stop
            except (RuntimeError, MemoryError) as error:
                self.halve(error)

    def run(self, number: int, part: slice, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs of block `number` for one micro-batch, [n, T, D]; see `outputs`."""
        return self.outputs(number, self.hidden(part), weights)

    def hidden(self, rows: slice | list[int]) -> Tensor:
        """What is stored of some sequences, [n, T, D], on the device."""
        assert self._hidden is not None
        return self._hidden[rows].to(self.device)

    def outputs(self, number: int, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """What block `number` makes of hidden states [n, T, D], with `weights` (by name in the block) in place of its own."""
        if len(hidden) not in self._calls:
            with self._outer(), torch.no_grad():
                self._calls[len(hidden)] = self._record(slice(0, len(hidden)), store=False)
        args, kwargs = self._calls[len(hidden)][number]
        block = self._blocks[number]
        out: Tensor | tuple[Tensor, ...] = (
            functional_call(block, dict(weights), (hidden, *args), kwargs)
            if weights
            else block(hidden, *args, **kwargs)
        )
        return out[0] if isinstance(out, tuple) else out

    def halve(self, error: BaseException) -> None:
        """Go on with half the micro-batch where memory ran out; any other error is raised again, as is one that no halving helps."""
        if not devices.out_of_memory(error) or self.batch == 1:
            raise error
        self._note(f"out of memory with {self.batch} sequences at once; going on with {self.batch // 2}")
        self.batch //= 2
        devices.free_cached_memory(self.device)

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """After the last block: the model's own last norm and output head, one micro-batch at a time, [n, T, V]."""
        outer = self._skeleton.outside_blocks()
        self._skeleton.load(outer)
        for part in self.slices():

            def finish(number: int, hidden: Tensor, *args: Any, part: slice = part, **kwargs: Any) -> Any:
                assert self._hidden is not None
                hidden = self._hidden[part].to(self.device) if number == len(self._blocks) - 1 else hidden
                return (hidden,) if self._as_tuple else hidden

            with _replaced(self._blocks, finish):
                output = self._skeleton.model(input_ids=self._tokens[part].to(self.device), use_cache=False)
            yield part, output.logits
        self._skeleton.free(outer)


def _same(a: _Call, b: _Call) -> bool:
    """Whether two calls got equal tensors, but for rounding: rotary tables made twice may differ in their last bit."""
    from torch.utils._pytree import tree_leaves

    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(_near(x, y) for x, y in pairs if isinstance(x, Tensor) and isinstance(y, Tensor))


def _near(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype or not x.is_floating_point():
        return torch.equal(x, y)
    return torch.allclose(x.float(), y.float(), rtol=1e-2, atol=1e-2)


def _head_name(skeleton: Skeleton) -> str:
    head = skeleton.model.get_output_embeddings()
    return next((f"{name}." for name, module in skeleton.model.named_modules() if module is head), "\0")
