"""What the matrices of a block see: micro-batches run through it, the pruned model's and where needed the dense model's beside them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from llmprune.contracts import InputStats, Need
from llmprune.device import Stopwatch, exact_matmul
from llmprune.model.activations import BlockInputs
from llmprune.model.targets import Target
from llmprune.processes import Team
from llmprune.stats import Collector, Enough


class Observer:
    """Collects input statistics, `needs` of them, from this process's `share` of the sequences.

    Args:
        inputs: the pruned model's stream of block inputs. dense: the dense model's, None where nothing needs it.
        positions: the sampled tokens of `stats.sample_positions`.
    """

    def __init__(self, needs: Need, inputs: BlockInputs, dense: BlockInputs | None, positions: Tensor, share: slice, team: Team) -> None:
        self._needs, self._inputs, self._dense, self._positions, self._share, self._team = needs, inputs, dense, positions, share, team
        self.watch = Stopwatch(inputs.device)

    def collect(self, number: int, targets: list[Target], originals: Mapping[str, Tensor]) -> dict[str, InputStats]:
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
