"""Reordering the input channels of a matrix where the block computes the same: whatever makes them is reordered alike.

Which matrices make the channels of which is found by trial, not by the names of an architecture: reorder the rows of the makers and see
whether the inputs come out reordered. Free are the neurons of an MLP and, within each head, what the values carry to the output projection.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from llmprune import registry
from llmprune.contracts import InputStats, Need
from llmprune.machine.processes import Team
from llmprune.model.activations import BlockInputs
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import Target, find_targets
from llmprune.numerics.permutation import column_order, kept_score
from llmprune.patterns import NM
from llmprune.planning.plan import Plan
from llmprune.run.matrix import Row, seeded
from llmprune.run.observer import Observer
from llmprune.statistics.collecting import input_of

_MOST_MAKERS = 4  # siblings that could make the channels, at most; with more of them nothing is tried
# Squared errors that rounding explains, in two bytes a number and in four: of a matrix's inputs, and of what the block adds, whose sums run
# in another order. A wrong guess is off by about 1, but where heads attend almost alike by much less.
_INPUTS, _OUTPUTS = (1e-5, 1e-10), (1e-2, 1e-8)

Targets = Mapping[str, Target]  # by name in the block


@dataclass(frozen=True)
class Link:
    """The input channels of `reader` are made by the rows of `makers`, in stretches of `width`, each free to be reordered in itself.

    The reader's C channels are S stretches, each `repeats` times in a row (grouped-query attention); a maker's R rows are the S
    stretches, over and over (fused projections). Names are those in the block.
    """

    reader: str
    makers: tuple[str, ...]
    width: int
    repeats: int

    def columns(self, orders: Tensor) -> Tensor:
        """Index [C] of the reader's columns, for the orders [S, width] of the stretches."""
        return _index(orders.repeat_interleave(self.repeats, dim=0))

    def rows(self, orders: Tensor, rows: int) -> Tensor:
        """Index [R] of a maker's rows."""
        return _index(orders.repeat(rows // orders.numel(), 1))


def _index(orders: Tensor) -> Tensor:
    return (orders + orders.shape[1] * torch.arange(len(orders), device=orders.device)[:, None]).reshape(-1)


class ChannelPermuter:
    """Reorders the channels of dense blocks, before anything of them is pruned, for the N:M matrices of a plan."""

    def __init__(
        self,
        plan: Plan,
        skeleton: Skeleton,
        inputs: BlockInputs,
        positions: Tensor,
        share: slice,
        team: Team,
        seed: int,
    ) -> None:
        self._plan, self._skeleton, self._inputs, self._team, self._seed = plan, skeleton, inputs, team, seed
        self._observer = Observer(Need.SECOND_MOMENT, inputs, None, positions, share, team)
        self._score = registry.build("pruners", "ria", {})
        self._known: dict[tuple[tuple[str, tuple[int, int]], ...], list[Link]] = {}

    def permute(self, number: int, shard: dict[str, Tensor]) -> dict[str, Row]:
        """Reorder block `number`, loaded and dense, in `shard` and in its modules; what the record says of its matrices, by full name."""
        targets = self._targets(number)
        links = [link for link in self.learn(number) if self._wanted(link, targets)]
        if not links:
            return {}
        stats = self._observer.collect(number, [targets[link.reader] for link in links], {})
        notes: dict[str, Row] = {}
        for link in links:
            reader = targets[link.reader]
            orders, before, after = self._team.on_first(
                functools.partial(self._orders, link, reader, stats[reader.name], shard)
            )
            if after <= before:
                continue
            self._reorder(link, targets, orders, shard)
            notes.setdefault(reader.name, {})["columns_permuted"] = {
                "kept_before": before,
                "kept_after": after,
            }
            for maker in link.makers:
                notes.setdefault(targets[maker].name, {})["rows_permuted"] = True
        return notes

    def _targets(self, number: int) -> Targets:
        block = list(self._skeleton.blocks)[number]
        return {
            t.name.removeprefix(f"{block}."): t for t in find_targets(block, self._skeleton.blocks[block])
        }

    def _wanted(self, link: Link, targets: Targets) -> bool:
        """Whether a stretch holds several whole groups of the reader's pattern; a matrix that is not pruned stays as it is."""
        plans = [self._plan.matrices.get(targets[name].name) for name in (link.reader, *link.makers)]
        pattern = plans[0].pattern if plans[0] else None
        return (
            all(plans)
            and isinstance(pattern, NM)
            and link.width % pattern.width == 0
            and link.width > pattern.width
        )

    def _orders(
        self, link: Link, reader: Target, stats: InputStats, shard: Mapping[str, Tensor]
    ) -> tuple[Tensor, float, float]:
        """Orders [S, width] of the stretches, and the share of the score that the N:M groups keep without them and with them."""
        pattern = self._plan.matrices[reader.name].pattern
        assert isinstance(pattern, NM)
        generator = seeded(self._seed, f"{reader.name} channels")
        score = self._score.score(
            reader.view(shard[self._skeleton.stored[reader.weight_name]]), stats, generator
        )
        # A stretch and its repeats are reordered alike: their scores count below one another.
        stretches = score.view(len(score), -1, link.repeats, link.width).permute(1, 0, 2, 3).flatten(1, 2)
        orders = torch.stack(
            [column_order(stretch, pattern.n, pattern.width, generator) for stretch in stretches]
        )
        whole = float(score.sum(dtype=torch.float64)) or 1.0
        before, after = (
            kept_score(s, pattern.n, pattern.width) / whole for s in (score, score[:, link.columns(orders)])
        )
        return orders.cpu(), before, after

    def _reorder(self, link: Link, targets: Targets, orders: Tensor, shard: dict[str, Tensor]) -> None:
        stored, reader = self._skeleton.stored, targets[link.reader]
        where = stored[reader.weight_name]
        shard[where] = reader.stored(reader.oriented(shard[where])[:, link.columns(orders)])
        changed = [reader.weight_name]
        for name in link.makers:
            maker, bias = targets[name], f"{targets[name].name}.bias"
            rows, where = link.rows(orders, maker.shape[0]), stored[maker.weight_name]
            shard[where] = maker.stored(maker.oriented(shard[where])[rows])
            changed.append(maker.weight_name)
            if bias in stored:
                shard[stored[bias]] = shard[stored[bias]][rows]
                changed.append(bias)
        self._skeleton.fill(changed, shard)

    def knows(self, number: int) -> bool:
        """Whether a block with the same matrices was tried."""
        return tuple((name, target.shape) for name, target in self._targets(number).items()) in self._known

    def learn(self, number: int) -> list[Link]:
        """What can be reordered in block `number`, loaded and dense; of blocks with the same matrices one is tried."""
        targets = self._targets(number)
        key = tuple((name, target.shape) for name, target in targets.items())
        if key not in self._known:
            self._known[key] = self._team.on_first(
                lambda: [link for name in targets if (link := self._try(number, name, targets))]
            )
        return self._known[key]

    def _try(self, number: int, reader: str, targets: Targets) -> Link | None:
        return next(
            (link for link in self._guesses(reader, targets) if self._holds(link, number, targets)), None
        )

    def _guesses(self, reader: str, targets: Targets) -> Iterator[Link]:
        """Links that shapes allow between a matrix and its siblings: all channels at once first, then those of each head."""
        parent, columns = reader.rpartition(".")[0], targets[reader].shape[1]
        rows = {n: t.shape[0] for n, t in targets.items() if n != reader and n.rpartition(".")[0] == parent}
        config = self._skeleton.model.config.get_text_config()
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        whole = [n for n, r in rows.items() if r % columns == 0]
        yield from (Link(reader, makers, columns, 1) for makers in _subsets(whole))
        if columns % head == 0 and head < columns:
            for count in dict.fromkeys(rows.values()):
                if count % head == 0 and columns % count == 0:
                    alike = [n for n, r in rows.items() if r == count]
                    yield from (Link(reader, makers, head, columns // count) for makers in _subsets(alike))

    def _holds(self, link: Link, number: int, targets: Targets) -> bool:
        """Whether, on one sequence, the reader's inputs come out reordered when the rows of the makers are, and nothing else notices."""
        stretches = targets[link.reader].shape[1] // (link.width * link.repeats)
        generator = seeded(self._seed, f"{link}")
        orders = torch.stack([torch.randperm(link.width, generator=generator) for _ in range(stretches)]).to(
            self._skeleton.device
        )
        weights: dict[str, Tensor] = {}
        for name in link.makers:
            module, rows = targets[name].module, link.rows(orders, targets[name].shape[0])
            weights[f"{name}.weight"] = targets[name].stored(targets[name].oriented(module.weight)[rows])  # type: ignore[arg-type]
            if getattr(module, "bias", None) is not None:
                weights[f"{name}.bias"] = module.bias[rows]  # type: ignore[index]
        reader, columns = targets[link.reader], link.columns(orders)
        before, after = self._inputs_of(reader, number, {}), self._inputs_of(reader, number, weights)
        exact = self._skeleton.dtype.itemsize > 2
        size = _INPUTS[exact] * before.square().sum()
        if (after - before[..., columns]).square().sum() > size or (after - before).square().sum() <= size:
            return False
        weights[f"{link.reader}.weight"] = reader.stored(reader.oriented(reader.module.weight)[:, columns])  # type: ignore[arg-type]
        hidden, first = self._inputs.hidden(slice(0, 1)), slice(0, 1)
        with torch.no_grad():
            out, same = (
                self._inputs.run(number, first, {}).float(),
                self._inputs.run(number, first, weights).float(),
            )
        # Per token: a few of them are so large that what rounding does to them hides all others.
        errors = (out - same).square().sum(-1) / (out - hidden.float()).square().sum(-1).clamp_min(1e-30)
        return bool(errors.median() <= _OUTPUTS[exact])

    @torch.no_grad()
    def _inputs_of(self, target: Target, number: int, weights: Mapping[str, Tensor]) -> Tensor:
        """What a matrix of block `number` reads of the first sequence, [1, T, C] in float32."""
        return input_of(target.module, lambda: self._inputs.run(number, slice(0, 1), weights))


def _subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Single ones first, all of them last: no more is reordered than must be."""
    if len(names) <= _MOST_MAKERS:
        for size in range(1, len(names) + 1):
            yield from combinations(names, size)
