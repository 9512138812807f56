"""Input statistics of the matrices of a block, collected while micro-batches run through it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from llmprune.contracts import InputStats, Need
from llmprune.machine.device import Stopwatch, exact_matmul, free_cached_memory, out_of_memory
from llmprune.model.activations import BlockInputs
from llmprune.model.products import Products, Seen
from llmprune.model.target import Target, by_expert
from llmprune.run.block import Block, Companion
from llmprune.run.experts import AllTokens
from llmprune.run.shared import Run
from llmprune.statistics.collecting import Collector, Enough, Halted
from llmprune.statistics.sums import EXPERT_BYTES, KINDS


class Observer(Companion):
    """Collects the statistics that are needed of the inputs of matrices, from this process's sequences.

    Args:
        run: the run. needs: which statistics.
        inputs: the block inputs of the pruned model, which this object moves on when it leaves a block.
        dense: those of the dense model; None where nothing needs them.
    """

    def __init__(self, run: Run, needs: Need, inputs: BlockInputs, dense: BlockInputs | None = None) -> None:
        self._run, self._needs, self._inputs, self._dense = run, needs, inputs, dense
        self._positions, self._first = run.positions, run.share.start
        self.watch = Stopwatch(inputs.device)
        self._halted: list[tuple[slice, Halted]] = []
        self._groups, self._no_pausing = 0, False
        self._all_tokens: AllTokens | None = None  # while experts run on all tokens too

    def _collector(self, needs: Need) -> Collector:
        return Collector(needs, self._positions, self.watch, KINDS[self._run.recipe.sums])

    def collect(
        self, number: int, targets: list[Target], originals: Mapping[str, Tensor]
    ) -> dict[str, InputStats]:
        """Statistics of the inputs of some matrices of block `number`; nothing after them is computed.

        `originals`: the block's dense weights by name in the block, which may hold pruned ones already.
        """
        spec = self._run.recipe.experts
        if spec.tokens == "all":
            routed = [t for t in targets if t.routed]
            others = [t for t in targets if not t.routed]
            stats = self._collected(number, others, originals) if others else {}
            return stats | self._of_all_tokens(number, routed) if routed else stats
        stats = self._collected(number, targets, originals)
        counts = {t.name: stats[t.name].count if t.name in stats else 0 for t in targets if t.routed}
        few = [t for t in targets if t.routed and counts[t.name] < spec.least]
        if few and spec.fewer == "error":
            raise ValueError(
                f"{len(few)} matrices of experts see fewer than {spec.least} calibration tokens, the first "
                f"is {few[0].name} with {counts[few[0].name]}; use more samples, or experts.fewer: "
                "magnitude or all-tokens"
            )
        return stats | self._of_all_tokens(number, few) if few and spec.fewer == "all-tokens" else stats

    def _of_all_tokens(self, number: int, targets: list[Target]) -> dict[str, InputStats]:
        """Statistics of experts' matrices as if every token were routed to each of these experts."""
        block = list(self._run.skeleton.blocks.values())[number]
        self._all_tokens = AllTokens(block, targets)
        try:
            with self._all_tokens.attached():
                return self._collected(number, targets, {})
        finally:
            self._all_tokens = None

    def _collected(
        self, number: int, targets: list[Target], originals: Mapping[str, Tensor]
    ) -> dict[str, InputStats]:
        collector = self._collector(self._needs)

        def observe(part: slice) -> None:
            first, shape = self._first + part.start, (part.stop - part.start, self._inputs.length)
            collector.batch(first, shape)
            self._pass(self._inputs, number, part, {})
            if self._dense and Need.CROSS in self._needs:
                collector.batch(first, shape, dense=True)
                kept, place = self._run.dense_inputs, (number, part.start, part.stop, targets[0].name)
                known = kept.input(place) if kept else None
                if known is not None:
                    collector.take(*known)
                    return
                self._pass(self._dense, number, part, originals)
                if kept:
                    kept.keep_input(place, collector.inputs)

        with exact_matmul(), self._watching(collector, targets):
            self._inputs.each(observe, collector.restart)
        return collector.results(self._run.team, {t.name: t.shape[1] for t in targets})

    @contextmanager
    def _watching(self, collector: Collector, targets: Sequence[Target]) -> Iterator[None]:
        """Collect from some matrices inside the `with`: at their layers, or at the products with a stack."""
        layers = {t.name: t.layer for t in targets if t.layer is not None}
        names: dict[tuple[str, int | None], list[str]] = {}
        for target in targets:
            names.setdefault(target.place, []).append(target.name)
        routed = frozenset(t.name for t in targets if t.routed)
        everywhere = self._all_tokens

        def seen(product: Seen) -> None:
            if everywhere and not everywhere.running:
                return
            found = names.get((product.parameter, product.expert), [])
            if found and found[0] in routed and found[0] not in layers:
                collector.take_some(found, product.inputs)
            elif found and found[0] not in routed and not collector.has(found[0]):
                # The block reads the layer's weight instead of calling the layer.
                collector.take(found[0], product.inputs)

        wanted = (lambda: everywhere.running) if everywhere else None
        with (
            collector.attached(layers, routed, wanted),
            Products({t.parameter: t.loaded() for t in targets}, seen),
        ):
            yield

    def groups_of(self, block: Block) -> Iterator[tuple[list[Target], dict[str, InputStats]]]:
        """The matrices of a block that are to be pruned, with their statistics.

        With `order: block` all of them at once. With `order: group` by the input they share, in the order of
        the forward pass; the statistics of a group are those of the block with the groups before it pruned.

        Where the plan says `pausing`, every micro-batch passes the block only once, and halts before each
        group (`leave` lets it finish). Otherwise what comes before a group is computed again for it. Both
        give the same statistics.
        """
        if not block.targets:
            return
        if self._run.recipe.order == "block":
            for portion in self._portions(block.targets):
                yield portion, self.collect(block.number, portion, block.originals)
            return
        groups = self.groups(block.number, block.targets)
        self._groups = len(groups)
        # Experts run one after the other, each through all its matrices.
        plain = all(target.module is not None and not target.routed for target in block.targets)
        if self._run.plan.pausing and plain and not self._no_pausing:
            modules = [[t.module for t in group if t.module is not None] for group in groups]
            for part in self._inputs.slices():
                forward = functools.partial(self._inputs.run, block.number, part, {})
                self._halted.append((part, Halted(forward, modules)))
        for place, group in enumerate(groups):
            for portion in self._portions(group):
                stats = self._of_halted(place, portion)
                yield portion, stats or self.collect(block.number, portion, block.originals)

    def _portions(self, targets: list[Target]) -> list[list[Target]]:
        """The matrices in portions whose statistics fit into memory together.

        Only experts are parted: pruning one changes no input of another one, nor of what comes before them.
        """
        routed = [target for target in targets if target.routed]
        if Need.GRAM not in self._needs or not routed:
            return [targets]
        portions: list[list[Target]] = []
        size = EXPERT_BYTES + 1
        for matrices in by_expert(routed):
            needed = sum(4 * c * c for c in {t.place: t.shape[1] for t in matrices}.values())
            if size + needed > EXPERT_BYTES:
                portions.append([])
                size = 0
            portions[-1] += matrices
            size += needed
        if len(portions) == 1:
            return [targets]
        rest = [target for target in targets if not target.routed]
        return [*portions, rest] if rest else portions

    @torch.no_grad()
    def _of_halted(self, place: int, group: list[Target]) -> dict[str, InputStats] | None:
        """Statistics of one group from halted passes; None without such passes or memory for them."""
        if not self._halted:
            return None
        collector = self._collector(self._needs)
        try:
            with exact_matmul():
                for part, passing in self._halted:
                    collector.batch(self._first + part.start, (part.stop - part.start, self._inputs.length))
                    x = passing.go_on(place)
                    for target in group:
                        collector.take(target.name, x)
        except (RuntimeError, MemoryError) as error:
            self._give_up(error)
            return None
        return collector.results(self._run.team)

    def _give_up(self, error: BaseException) -> None:
        """Do without halted passes where memory ran out: in smaller micro-batches they hold as much."""
        if not out_of_memory(error):
            raise error
        self._halted, self._no_pausing = [], True
        free_cached_memory(self._inputs.device)
        self._run.reporter.note("out of memory with halted passes; computing again from now on")

    def leave(self, block: Block) -> None:
        """Move the block inputs on through the block; halted passes go on from where they are."""
        block.stats.clear()  # as large as Gram matrices, and nothing needs them any more
        halted, self._halted = self._halted, []
        if not block.last:
            self._finish(block.number, halted)

    @torch.no_grad()
    def _finish(self, number: int, halted: list[tuple[slice, Halted]]) -> None:
        done = 0
        try:
            for part, passing in halted:
                self._inputs.put(part, passing.go_on(self._groups), number)
                done = part.stop
        except (RuntimeError, MemoryError) as error:
            self._give_up(error)
        halted.clear()
        self._inputs.forward(number, done=done)

    def groups(self, number: int, targets: list[Target]) -> list[list[Target]]:
        """The matrices by the input they share, in the order in which the block computes them."""
        collector = self._collector(Need.NONE)
        with self._watching(collector, targets):
            collector.batch(0, (1, self._inputs.length))
            self._pass(self._inputs, number, slice(0, 1), {})
        by_name = {t.name: t for t in targets}
        found = [[by_name[name] for name in group] for group in collector.groups()]
        return _with_experts(found, targets)

    @staticmethod
    def _pass(stream: BlockInputs, number: int, part: slice, weights: Mapping[str, Tensor]) -> None:
        try:
            stream.run(number, part, weights)
        except Enough:
            pass


def _with_experts(groups: list[list[Target]], targets: Sequence[Target]) -> list[list[Target]]:
    """The groups with the matrices of experts that play the same part in one group, seen or not.

    Experts work beside one another, so pruning one does not change what another one sees. Matrices that
    nothing has reached, and that are of no expert, come last, all together.
    """
    part = {t: t.parameter if t.layer is None else t.name.rpartition(".")[2] for t in targets if t.routed}
    found: list[list[Target]] = []
    placed: set[Target] = set()
    for group in groups:
        parts = {part[t] for t in group if t in part}
        # In the order of the pass: it halts before the first matrix of a group.
        whole = [*group, *(t for t in targets if part.get(t) in parts and t not in group)]
        whole = [t for t in whole if t not in placed]
        placed.update(whole)
        if whole:
            found.append(whole)
    rest = [t for t in targets if t not in placed]
    return [*found, rest] if rest else found
