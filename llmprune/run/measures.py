"""What allocators measure of the dense model, block by block, before they decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from llmprune import patterns
from llmprune.checkpoint.reader import read_ahead
from llmprune.contracts import Allocator, InputStats, Job, Measure
from llmprune.model.activations import BlockInputs
from llmprune.model.gradients import NoWayBack, Passed, squared_gradients
from llmprune.model.target import Target
from llmprune.model.targets import targets_of
from llmprune.run.matrix import seeded
from llmprune.run.observer import Observer
from llmprune.run.shared import Run


@dataclass(frozen=True)
class _Jobs:
    """The matrices of a block that have statistics, each read when its turn comes.

    `shard`: tensors as stored. `squares`: squared gradients by the names of parameters.
    """

    targets: list[Target]
    shard: Mapping[str, Tensor]
    stats: Mapping[str, InputStats]
    seed: int
    squares: Mapping[str, Tensor] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Job]:
        for t in self.targets:
            if t.name not in self.stats:
                continue
            gradient = t.gather(self.squares) if self.squares else None
            weight, generator = t.read(self.shard[t.tensor]), seeded(self.seed, t.name)
            stats, pattern = self.stats[t.name], patterns.Unstructured()
            yield Job(t.name, weight, stats, pattern, 0.0, generator, t.routed, gradient)


def measure(run: Run) -> dict[int, Measure]:
    """What the recipe's allocator measures of each block of the dense model; the same on every process.

    Empty for an allocator that measures nothing, and where the model does not allow what it measures, which
    is said. The reporter gets a step per block, and one more where the allocator looks at gradients.
    """
    allocator = run.recipe.build_allocator()
    if allocator.rows:
        return _by_gradients(run, allocator)
    return _by_inputs(run, allocator) if allocator.needs else {}


def _by_gradients(run: Run, allocator: Allocator) -> dict[int, Measure]:
    """The measures of an allocator that asks for gradients."""
    skeleton = run.skeleton
    rows = run.calibration.tokens[: allocator.rows, : allocator.length]  # every process knows all of them
    mine = rows[run.team.share(len(rows))]
    # A process without a row passes one for nothing: all must do, and be refused, alike.
    counts = len(mine) > 0
    stats = InputStats(rows.numel(), rows.shape[1], {})
    found: dict[int, Measure] = {}

    passed = squared_gradients(skeleton, mine if counts else rows[:1], run.store, run.reporter.step)
    for number, squares, shard in _as_far(passed, run):
        for square in squares.values():
            square *= counts / len(rows)
        run.team.add(*squares.values())
        targets = targets_of(skeleton, list(skeleton.blocks)[number])
        # A matrix that nothing was computed with is worth nothing only here: it is like the model as a whole.
        known = {t.name: stats for t in targets if bool(t.gather(squares).any())}
        found[number] = allocator.measure(_Jobs(targets, shard, known, run.recipe.seed, squares))
    return dict(sorted(found.items()))


def _as_far(passed: Iterator[Passed], run: Run) -> Iterator[Passed]:
    """What is passed back; nothing where the model has no way back, which is said."""
    try:
        yield from passed
    except NoWayBack as error:
        run.reporter.note(f"allocator {run.recipe.allocator.name}: {error}, so gradients cannot be measured")


def _by_inputs(run: Run, allocator: Allocator) -> dict[int, Measure]:
    """The measures of an allocator that asks for statistics of inputs."""
    skeleton = run.skeleton
    inputs = BlockInputs(skeleton, run.tokens, skeleton.device)
    observer = Observer(run, allocator.needs, inputs)
    shards = read_ahead(skeleton.source, skeleton.block_tensors())
    measures: dict[int, Measure] = {}
    for number, (name, shard) in enumerate(zip(skeleton.blocks, shards, strict=True)):
        parameters = skeleton.parameters_of(name)
        skeleton.fill(parameters, shard)
        targets = targets_of(skeleton, name)
        stats = observer.collect(number, targets, {})
        if stats:
            measures[number] = allocator.measure(_Jobs(targets, shard, stats, run.recipe.seed))
        inputs.forward(number)
        skeleton.free(parameters)
        run.reporter.step()
    # Blocks that no token reached count as average ones.
    mean = fmean(v for v in measures.values() if isinstance(v, float)) if measures else 0.0
    return {number: measures.get(number, mean) for number in range(len(skeleton.blocks))}
