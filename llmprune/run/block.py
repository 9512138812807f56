"""A block while a run works on it, and what goes through the blocks together with the pruned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from llmprune.checkpoint.reader import WeightSource, read_ahead
from llmprune.contracts import InputStats
from llmprune.model.target import Target
from llmprune.model.targets import targets_of
from llmprune.run.clock import Clock
from llmprune.run.matrix import Row
from llmprune.run.shared import Run

Tensors = dict[str, Tensor]


class Companion:
    """Something that goes through the blocks of a run in their order: `enter` and `leave` for every block."""

    phase = "forward"  # of the record's seconds

    def enter(self, block: Block) -> None:
        """The block is loaded and dense."""

    def leave(self, block: Block) -> None:
        """The matrices of the block are pruned."""

    def needs_dense(self, block: Block) -> bool:
        """Whether it must `enter` with dense weights even a block that an earlier run has pruned."""
        return False


class Block:
    """One block at work.

    Attributes:
        number: from 0. name: of its module.
        shard: its tensors by their names in the checkpoint, dense at first and pruned in the end.
        exact: its pruned weights in float32, where the recipe keeps them so between blocks and the checkpoint
            stores another dtype.
        targets: its matrices that are to be pruned.
        originals: its dense parameters by their names in the block, where a companion keeps them.
        stats: statistics of the inputs of the matrices that are pruned already, by matrix, where a step on
            the whole block follows: they may be as large as the block.
        masks: their packed keep masks. scales: those of rounded weights, as in `Pruned.scales`.
        rows: their rows of the record. All three go by names in the checkpoint.
        notes: more for the record, by matrix.
    """

    def __init__(self, run: Run, number: int, shard: Tensors, clock: Clock) -> None:
        self.number, self.shard, self.clock = number, shard, clock
        self.name = list(run.skeleton.blocks)[number]
        self.module = run.skeleton.blocks[self.name]
        self.last = number + 1 == len(run.skeleton.blocks)
        self.targets = self._find_targets(run)
        self.originals: dict[str, Tensor] = {}
        self.stats: dict[str, InputStats] = {}
        self.keeps_stats = bool(run.recipe.build_block_steps())
        self.exact: Tensors = {}
        self._keeps_exact = run.recipe.precision == "float32"
        self.masks: Tensors = {}
        self.scales: Tensors = {}
        self.rows: list[Row] = []
        self.notes: dict[str, Row] = {}
        self._skeleton, self._parameters = run.skeleton, run.skeleton.parameters_of(self.name)

    def _find_targets(self, run: Run) -> list[Target]:
        return [t for t in targets_of(run.skeleton, self.name) if t.name in run.plan.matrices]

    def weight(self, target: Target) -> Tensor:
        """The present weight of a matrix in the checkpoint's layout: the exact one where there is one."""
        return target.part(self.exact.get(target.tensor, self.shard[target.tensor]))

    def put(self, target: Target, weight: Tensor) -> None:
        """Take a new weight of a matrix, in the checkpoint's layout, into the module and into what is stored.

        Its cast to the checkpoint's dtype is stored; the module gets the exact weight where the recipe says
        so.
        """
        name, dtype = target.tensor, self.shard[target.tensor].dtype
        exact = self._keeps_exact and dtype != weight.dtype
        if target.module is not None:
            self.shard[name] = weight.to(dtype).contiguous()
            if exact:
                self.exact[name] = weight.contiguous()
        else:
            target.part(self.shard[name]).copy_(weight)
            if exact:
                if name not in self.exact:
                    self.exact[name] = self.shard[name].float()
                target.part(self.exact[name]).copy_(weight)
        target.assign(self.weight(target))

    def dense(self) -> Tensors:
        """The tensors of the block as they are; they stay so when matrices are put in place."""
        written = {target.tensor for target in self.targets if target.module is None}
        return {name: t.clone() if name in written else t for name, t in self.shard.items()}

    def parameters(self) -> Tensors:
        """The parameters of the module, by name in it; they too stay as they are."""
        written = {name for target in self.targets if target.module is None for name in target.owners}
        return {
            name: parameter.detach().clone() if f"{self.name}.{name}" in written else parameter
            for name, parameter in self.module.named_parameters()
        }

    def enter(self, companions: Sequence[Companion]) -> None:
        """Load the block and let every companion enter it."""
        self._load()
        for companion in companions:
            companion.enter(self)
            self.lap(companion.phase)

    def leave(self, companions: Sequence[Companion]) -> None:
        """Let every companion leave the block, and give its memory back."""
        for companion in companions:
            companion.leave(self)
            self.lap(companion.phase)
        self._skeleton.free(self._parameters)

    def done(self, block_done: BlockDone) -> None:
        """Hand the block over, and forget its tensors: the next block is read while this object exists."""
        self.shard = {name: t for name, t in self.shard.items() if name not in self._skeleton.shared}
        block_done(self)
        self.lap("write")
        self.shard, self.exact = {}, {}

    def lap(self, phase: str, of_it: tuple[str, float] = ("", 0.0)) -> None:
        """Count the time since the last lap to a phase."""
        self.clock.lap(phase, of_it)

    def _load(self) -> None:
        self._skeleton.fill(self._parameters, self.shard)
        for target in targets_of(self._skeleton, self.name):
            shared = target.shared(self.shard[target.tensor])
            if shared is not None:
                self.shard[target.tensor] = shared
        self.lap("read")


class FinishedBlock(Block):
    """A block that an earlier run has pruned and written: the streams of block inputs pass it once more."""

    def _find_targets(self, run: Run) -> list[Target]:
        return []  # nothing is left to prune

    def enter(self, companions: Sequence[Companion]) -> None:
        """Let companions enter with the dense weights where one needs them; then load the pruned ones."""
        if any(companion.needs_dense(self) for companion in companions):
            pruned = self.shard
            self.shard = {name: self._skeleton.source.load(name) for name in pruned}
            super().enter(companions)
            self.shard = pruned
        self._load()

    def done(self, block_done: BlockDone) -> None:
        """Nothing to hand over."""
        self.shard = {}

    def lap(self, phase: str, of_it: tuple[str, float] = ("", 0.0)) -> None:
        """All of its time is that of the replay."""
        super().lap("replay")


BlockDone = Callable[[Block], None]


def blocks_of(run: Run, source: WeightSource, finished: int, clock: Clock) -> Iterator[Block]:
    """The blocks of a run in order, each read from `source`, which holds the `finished` first ones pruned.

    The next block is read while one is at work.
    """
    for number, shard in enumerate(read_ahead(source, run.skeleton.block_tensors())):
        kind = FinishedBlock if number < finished else Block
        yield kind(run, number, shard, clock)
        del shard
