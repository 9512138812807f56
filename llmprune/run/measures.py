"""The first pass over a model for allocators that measure: block by block, dense, nothing kept but a number per block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from llmprune import patterns
from llmprune.checkpoint.reader import WeightSource, read_ahead
from llmprune.contracts import Allocator, InputStats, Job
from llmprune.machine.processes import Team
from llmprune.model.activations import BlockInputs
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import Target, find_targets
from llmprune.run.matrix import seeded
from llmprune.run.observer import Observer
from llmprune.statistics.sums import sample_positions


@dataclass(frozen=True)
class _Jobs:
    """The matrices of a block, each read when its turn comes."""

    targets: list[Target]
    stored: Mapping[str, Tensor]
    stats: Mapping[str, InputStats]
    seed: int

    def __iter__(self) -> Iterator[Job]:
        for t in self.targets:
            yield Job(
                t.name,
                t.read(self.stored[t.name]),
                self.stats[t.name],
                patterns.Unstructured(),
                0.0,
                seeded(self.seed, t.name),
            )


def measure(
    allocator: Allocator,
    skeleton: Skeleton,
    source: WeightSource,
    tokens: Tensor,
    seed: int,
    team: Team,
    block_done: Callable[[], None],
) -> dict[int, float]:
    """What the allocator measures of each block of the dense model on calibration tokens [N, T]; the same on every process."""
    if not allocator.needs:
        return {}
    share = team.share(len(tokens))
    inputs = BlockInputs(skeleton, tokens[share], skeleton.device)
    observer = Observer(
        allocator.needs, inputs, None, sample_positions(len(tokens), tokens.shape[1], seed), share, team
    )
    measures: dict[int, float] = {}
    for number, ((name, block), shard) in enumerate(
        zip(skeleton.blocks.items(), read_ahead(source, skeleton.block_tensors()), strict=True)
    ):
        parameters = skeleton.parameters_of(name)
        skeleton.fill(parameters, shard)
        targets = find_targets(name, block)
        stats = observer.collect(number, targets, {})
        measures[number] = allocator.measure(
            _Jobs(targets, {t.name: shard[skeleton.stored[t.weight_name]] for t in targets}, stats, seed)
        )
        inputs.forward(number)
        skeleton.free(parameters)
        block_done()
    return measures
