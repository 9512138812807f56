"""What allocators measure of the dense model before they decide: one number per block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from llmprune import patterns
from llmprune.checkpoint.reader import read_ahead
from llmprune.contracts import InputStats, Job
from llmprune.model.activations import BlockInputs
from llmprune.model.target import Target
from llmprune.model.targets import targets_of
from llmprune.run.matrix import seeded
from llmprune.run.observer import Observer
from llmprune.run.shared import Run


@dataclass(frozen=True)
class _Jobs:
    """The matrices of a block that tokens reached, each read when its turn comes.

    `stored`: dense weights, by matrix.
    """

    targets: list[Target]
    stored: Mapping[str, Tensor]
    stats: Mapping[str, InputStats]
    seed: int

    def __iter__(self) -> Iterator[Job]:
        for t in self.targets:
            if t.name not in self.stats:
                continue
            weight, stats = t.read(self.stored[t.name]), self.stats[t.name]
            yield Job(t.name, weight, stats, patterns.Unstructured(), 0.0, seeded(self.seed, t.name))


def measure(run: Run) -> dict[int, float]:
    """What the recipe's allocator measures of each block of the dense model; the same on every process.

    Empty for an allocator that measures nothing. The reporter gets a step per block.
    """
    allocator, skeleton = run.recipe.build_allocator(), run.skeleton
    if not allocator.needs:
        return {}
    inputs = BlockInputs(skeleton, run.tokens, skeleton.device)
    observer = Observer(run, allocator.needs, inputs)
    shards = read_ahead(skeleton.source, skeleton.block_tensors())
    measures: dict[int, float] = {}
    for number, (name, shard) in enumerate(zip(skeleton.blocks, shards, strict=True)):
        parameters = skeleton.parameters_of(name)
        skeleton.fill(parameters, shard)
        targets = targets_of(skeleton, name)
        stats = observer.collect(number, targets, {})
        weights = {t.name: shard[t.tensor] for t in targets}
        if stats:
            measures[number] = allocator.measure(_Jobs(targets, weights, stats, run.recipe.seed))
        inputs.forward(number)
        skeleton.free(parameters)
        run.reporter.step()
    # Blocks that no token reached count as average ones.
    mean = sum(measures.values()) / max(1, len(measures))
    return {number: measures.get(number, mean) for number in range(len(skeleton.blocks))}
