"""Reordering the input channels of matrices for N:M patterns, where the block computes the same as before.

The matrices that make the channels get their rows reordered alike. Which ones make them is found by trial,
not by the names of an architecture: reorder the rows of some matrices, and see whether the inputs come out
reordered. Free to be reordered are the neurons of an MLP and, within each head, the values on their way to
the output projection.
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
from llmprune.model.activations import BlockInputs
from llmprune.model.target import Target
from llmprune.model.targets import targets_of
from llmprune.numerics.permutation import column_order, kept_score
from llmprune.patterns import NM
from llmprune.run.block import Block, Companion
from llmprune.run.matrix import Row, seeded
from llmprune.run.observer import Observer
from llmprune.run.shared import Run
from llmprune.statistics.collecting import input_of

_MOST_MAKERS = 4  # siblings that could make the channels, at most; with more of them nothing is tried
# Squared relative errors that rounding explains, for numbers of two bytes and of four: of a matrix's inputs,
# and of what the block adds to the hidden states, whose sums run in another order. A wrong guess is off by
# about 1, but by much less where heads attend almost alike.
_INPUTS, _OUTPUTS = (1e-5, 1e-10), (1e-2, 1e-8)

Targets = Mapping[str, Target]  # by name in the block


@dataclass(frozen=True)
class Link:
    """The rows of `makers` make the input channels of `reader`, free to be reordered within stretches.

    A stretch has `width` channels.

    The reader's C channels are S stretches, each repeated `repeats` times in a row (grouped-query attention).
    A maker's R rows are the S stretches, over and over (fused projections). Names are those in the block.
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


class ChannelPermuter(Companion):
    """Reorders the channels of dense blocks for N:M patterns, before any of their matrices is pruned."""

    phase = "permute"

    def __init__(self, run: Run, inputs: BlockInputs) -> None:
        self._plan, self._skeleton, self._team, self._seed = run.plan, run.skeleton, run.team, run.recipe.seed
        self._inputs, self._observer = inputs, Observer(run, Need.SECOND_MOMENT, inputs)
        self._score = registry.build("pruners", "ria", {})
        self._known: dict[tuple[tuple[str, tuple[int, int]], ...], list[Link]] = {}

    def needs_dense(self, block: Block) -> bool:
        """Whether what can be reordered must be found out in this very block: it is the first of its kind."""
        return self._kind(self._targets(block.number)) not in self._known

    def enter(self, block: Block) -> None:
        """Reorder the block, in its module and in the tensors that will be stored."""
        block.notes = self.permute(block.number, block.shard)

    def permute(self, number: int, shard: dict[str, Tensor]) -> dict[str, Row]:
        """Reorder block `number`, which is loaded and dense, in its module and in `shard`.

        Returns:
            What the record says of its matrices, by name.
        """
        targets = self._targets(number)
        links = [link for link in self.learn(number) if self._wanted(link, targets)]
        if not links:
            return {}
        stats = self._observer.collect(number, [targets[link.reader] for link in links], {})
        notes: dict[str, Row] = {}
        for link in links:
            reader = targets[link.reader]
            find_orders = functools.partial(self._orders, link, reader, stats[reader.name], shard)
            orders, before, after = self._team.on_first(find_orders)
            if after <= before:
                continue
            self._reorder(link, targets, orders, shard)
            kept = {"kept_before": before, "kept_after": after}
            notes.setdefault(reader.name, {})["columns_permuted"] = kept
            for maker in link.makers:
                notes.setdefault(targets[maker].name, {})["rows_permuted"] = True
        return notes

    def _targets(self, number: int) -> Targets:
        block = list(self._skeleton.blocks)[number]
        found = (t for t in targets_of(self._skeleton, block) if t.module is not None and not t.routed)
        return {target.name.removeprefix(f"{block}."): target for target in found}

    def _wanted(self, link: Link, targets: Targets) -> bool:
        """Whether a stretch holds several whole groups of the reader's pattern, and its matrices are pruned.

        A matrix that is not pruned stays as it is.
        """
        plans = [self._plan.matrices.get(targets[name].name) for name in (link.reader, *link.makers)]
        pattern = plans[0].pattern if plans[0] else None
        if not all(plans) or not isinstance(pattern, NM):
            return False
        return link.width % pattern.width == 0 and link.width > pattern.width

    def _orders(
        self, link: Link, reader: Target, stats: InputStats, shard: Mapping[str, Tensor]
    ) -> tuple[Tensor, float, float]:
        """Orders [S, width] of the stretches, and the shares of the score kept without and with them."""
        pattern = self._plan.matrices[reader.name].pattern
        assert isinstance(pattern, NM)
        generator = seeded(self._seed, f"{reader.name} channels")
        weight = reader.view(shard[reader.tensor])
        score = self._score.score(weight, stats, generator)
        # A stretch and its repeats are reordered alike: their scores count below one another.
        stretches = score.view(len(score), -1, link.repeats, link.width).permute(1, 0, 2, 3).flatten(1, 2)
        found = [column_order(stretch, pattern.n, pattern.width, generator) for stretch in stretches]
        orders = torch.stack(found)
        whole = float(score.sum(dtype=torch.float64)) or 1.0
        reordered = score[:, link.columns(orders)]
        before, after = (kept_score(s, pattern.n, pattern.width) / whole for s in (score, reordered))
        return orders.cpu(), before, after

    def _reorder(self, link: Link, targets: Targets, orders: Tensor, shard: dict[str, Tensor]) -> None:
        reader = targets[link.reader]
        where = reader.tensor
        shard[where] = reader.stored(reader.oriented(shard[where])[:, link.columns(orders)])
        changed = [reader.weight_name]
        for name in link.makers:
            maker, bias = targets[name], f"{targets[name].name}.bias"
            rows, where = link.rows(orders, maker.shape[0]), maker.tensor
            shard[where] = maker.stored(maker.oriented(shard[where])[rows])
            changed.append(maker.weight_name)
            if bias in self._skeleton.group_of:
                (where,) = self._skeleton.group_of[bias].tensors
                shard[where] = shard[where][rows]
                changed.append(bias)
        self._skeleton.fill(changed, shard)

    @staticmethod
    def _kind(targets: Targets) -> tuple[tuple[str, tuple[int, int]], ...]:
        """Blocks of one kind have matrices of the same names and shapes."""
        return tuple((name, target.shape) for name, target in targets.items())

    def learn(self, number: int) -> list[Link]:
        """What can be reordered in block `number`, loaded and dense; one block of each kind is tried."""
        targets = self._targets(number)
        kind = self._kind(targets)
        if kind not in self._known:
            self._known[kind] = self._team.on_first(lambda: self._links(number, targets))
        return self._known[kind]

    def _links(self, number: int, targets: Targets) -> list[Link]:
        """For every matrix the first guess that holds, where one does."""
        found = []
        for reader in targets:
            guesses = self._guesses(reader, targets)
            link = next((link for link in guesses if self._holds(link, number, targets)), None)
            if link is not None:
                found.append(link)
        return found

    def _guesses(self, reader: str, targets: Targets) -> Iterator[Link]:
        """Links that shapes allow between a matrix and its siblings: all channels, then those of a head."""
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
        """Whether, on one sequence, reordering the makers' rows only reorders the reader's inputs."""
        stretches = targets[link.reader].shape[1] // (link.width * link.repeats)
        generator = seeded(self._seed, f"{link}")
        drawn = [torch.randperm(link.width, generator=generator) for _ in range(stretches)]
        orders = torch.stack(drawn).to(self._skeleton.device)
        weights: dict[str, Tensor] = {}
        for name in link.makers:
            module, rows = targets[name].module, link.rows(orders, targets[name].shape[0])
            weight: Tensor = module.weight  # type: ignore[assignment, union-attr]
            weights[f"{name}.weight"] = targets[name].stored(targets[name].oriented(weight)[rows])
            if getattr(module, "bias", None) is not None:
                weights[f"{name}.bias"] = module.bias[rows]  # type: ignore[index, union-attr]
        reader, columns = targets[link.reader], link.columns(orders)
        before, after = self._inputs_of(reader, number, {}), self._inputs_of(reader, number, weights)
        exact = self._skeleton.dtype.itemsize > 2
        size = _INPUTS[exact] * before.square().sum()
        if (after - before[..., columns]).square().sum() > size or (after - before).square().sum() <= size:
            return False
        own: Tensor = reader.module.weight  # type: ignore[assignment, union-attr]
        weights[f"{link.reader}.weight"] = reader.stored(reader.oriented(own)[:, columns])
        hidden, first = self._inputs.hidden(slice(0, 1)), slice(0, 1)
        with torch.no_grad():
            out = self._inputs.run(number, first, {}).float()
            same = self._inputs.run(number, first, weights).float()
        # Per token: a few tokens are so large that their rounding errors would hide all others.
        errors = (out - same).square().sum(-1) / (out - hidden.float()).square().sum(-1).clamp_min(1e-30)
        return bool(errors.median() <= _OUTPUTS[exact])

    @torch.no_grad()
    def _inputs_of(self, target: Target, number: int, weights: Mapping[str, Tensor]) -> Tensor:
        """What a matrix of block `number` reads of the first sequence, [1, T, C] in float32."""
        assert target.module is not None
        return input_of(target.module, lambda: self._inputs.run(number, slice(0, 1), weights))


def _subsets(names: list[str]) -> Iterator[tuple[str, ...]]:
    """Single ones first, all of them last: no more is reordered than must be."""
    if len(names) <= _MOST_MAKERS:
        for size in range(1, len(names) + 1):
            yield from combinations(names, size)
