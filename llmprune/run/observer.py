"""What the matrices of a block see: micro-batches run through it, the pruned model's and where needed the dense model's beside them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from llmprune.contracts import InputStats, Need
from llmprune.machine.device import Stopwatch, exact_matmul, free_cached_memory, out_of_memory
from llmprune.machine.processes import Team
from llmprune.model.activations import BlockInputs
from llmprune.model.targets import Target
from llmprune.statistics.collecting import Collector, Enough, Halted


class Observer:
    """Collects input statistics, `needs` of them, from this process's `share` of the sequences.

    Args:
        inputs: the pruned model's stream of block inputs. dense: the dense model's, None where nothing needs it.
        positions: the sampled tokens of `stats.sample_positions`.
    """

    def __init__(
        self,
        needs: Need,
        inputs: BlockInputs,
        dense: BlockInputs | None,
        positions: Tensor,
        share: slice,
        team: Team,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._note = note
        self._needs, self._inputs, self._dense, self._positions, self._share, self._team = (
            needs,
            inputs,
            dense,
            positions,
            share,
            team,
        )
        self.watch = Stopwatch(inputs.device)
        self._halted: list[tuple[slice, Halted]] = []
        self._groups, self._no_pausing = 0, False

    def collect(
        self, number: int, targets: list[Target], originals: Mapping[str, Tensor]
    ) -> dict[str, InputStats]:
        """Statistics of the inputs of some matrices of block `number`; nothing after them is computed.

        `originals`: the block's dense weights by name in the block, which may hold pruned ones already.
        """
        collector = Collector(self._needs, self._positions, self.watch)

        def observe(part: slice) -> None:
            first, shape = self._share.start + part.start, (part.stop - part.start, self._inputs.length)
            collector.batch(first, shape)
            self._pass(self._inputs, number, part, {})
            if self._dense and Need.CROSS in self._needs:
                collector.batch(first, shape, dense=True)
                self._pass(self._dense, number, part, originals)

        with exact_matmul(), collector.attached({t.name: t.module for t in targets}):
            self._inputs.each(observe, collector.restart)
        return collector.results(self._team)

    def grouped(
        self, number: int, targets: list[Target], originals: Mapping[str, Tensor], order: str, pausing: bool
    ) -> Iterator[tuple[list[Target], dict[str, InputStats]]]:
        """Matrices and their statistics: all at once, or by the input they share, each group as those before it are when its turn comes.

        With `pausing` every micro-batch passes the block but once, halting before each group (`advance` lets it finish); without, what
        comes before a group is computed again for it. Both give the same statistics.
        """
        if order == "block":
            yield targets, self.collect(number, targets, originals)
            return
        groups = self.groups(number, targets)
        self._groups = len(groups)
        if pausing and groups and not self._no_pausing:
            modules = [[target.module for target in group] for group in groups]
            parts = list(self._inputs.slices())
            self._halted = [
                (part, Halted(functools.partial(self._inputs.run, number, part, {}), modules))
                for part in parts
            ]
        for place, group in enumerate(groups):
            yield group, self._of_halted(place, group) or self.collect(number, group, originals)

    @torch.no_grad()
    def _of_halted(self, place: int, group: list[Target]) -> dict[str, InputStats] | None:
        """Statistics of the group at a place, from halted passes; None where there are none, or no memory for them is left."""
        if not self._halted:
            return None
        collector = Collector(self._needs, self._positions, self.watch)
        try:
            with exact_matmul():
                for part, passing in self._halted:
                    collector.batch(
                        self._share.start + part.start, (part.stop - part.start, self._inputs.length)
                    )
                    x = passing.go_on(place)
                    for target in group:
                        collector.take(target.name, x)
        except (RuntimeError, MemoryError) as error:
            self._give_up(error)
            return None
        return collector.results(self._team)

    def _give_up(self, error: BaseException) -> None:
        """No halted passes any more, if it is memory that they lack: smaller micro-batches would hold as much."""
        if not out_of_memory(error):
            raise error
        self._halted, self._no_pausing = [], True
        free_cached_memory(self._inputs.device)
        self._note("out of memory with halted passes; computing again from now on")

    @torch.no_grad()
    def advance(self, number: int) -> None:
        """Move the inputs through block `number`; halted passes go on from where they are."""
        halted, self._halted = self._halted, []
        done = 0
        try:
            for part, passing in halted:
                self._inputs.put(part, passing.go_on(self._groups), number)
                done = part.stop
        except (RuntimeError, MemoryError) as error:
            self._give_up(error)
        halted.clear()
        self._inputs.forward(number, done=done)

    def drop(self) -> None:
        """Forget halted passes."""
        self._halted.clear()

    def groups(self, number: int, targets: list[Target]) -> list[list[Target]]:
        """The matrices by the input they share, in the order in which the block computes them."""
        collector = Collector(Need.NONE, self._positions, self.watch)
        with collector.attached({t.name: t.module for t in targets}):
            collector.batch(0, (1, self._inputs.length))
            self._pass(self._inputs, number, slice(0, 1), {})
        by_name = {t.name: t for t in targets}
        return [[by_name[name] for name in group] for group in collector.groups()]

    @staticmethod
    def _pass(stream: BlockInputs, number: int, part: slice, weights: Mapping[str, Tensor]) -> None:
        try:
            stream.run(number, part, weights)
        except Enough:
            pass
