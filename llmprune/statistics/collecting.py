"""Input statistics: what algorithms declare, accumulated once per input group while a block runs forward.

Everything is kept as sums, so batches and processes merge by addition. C input features, N sequences, T tokens, S sampled tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from llmprune.contracts import InputStats, Need
from llmprune.machine.device import Stopwatch
from llmprune.machine.processes import Team
from llmprune.statistics.sums import StatsSums


class Enough(Exception):
    """Ends a forward pass once every matrix observed has had its input."""


def input_of(module: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """What a module is fed first in a forward pass, in float32; the pass ends there."""
    seen: list[Tensor] = []

    def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].float())
        raise Enough

    handle = module.register_forward_pre_hook(see)
    try:
        forward()
    except Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


class Halted:
    """A forward pass that stops before each of some groups of modules, so that what they compute with can still be changed.

    The pass runs in a greenlet: it stands still where it is, with all that it holds, until it is told to go on.

    Args:
        forward: the pass. groups: modules by the input they share, in the order of the pass.
    """

    def __init__(self, forward: Callable[[], Tensor], groups: Sequence[Sequence[nn.Module]]) -> None:
        self._pass, self._groups = greenlet(forward), groups

    def go_on(self, group: int) -> Tensor:
        """Run to a group and return its input; after the last, where `group` is the number of groups, to the end, and return the output."""
        last = group == len(self._groups)
        handle = None if last else self._groups[group][0].register_forward_pre_hook(self._stop)
        try:
            result: Tensor = self._pass.switch()
        finally:
            if handle:
                handle.remove()
        if self._pass.dead != last:
            raise ValueError(
                "a block does not call its matrices in the same order for every micro-batch; this architecture is not supported"
            )
        return result

    @staticmethod
    def _stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        getcurrent().parent.switch(inputs[0])


class Collector:
    """Hooks on the inputs of modules; modules fed the very same tensor (q, k, v; gate, up) share one accumulation."""

    def __init__(self, needs: Need, positions: Tensor, watch: Stopwatch) -> None:
        self.needs, self._positions, self._watch = needs, positions, watch
        self.restart()
        self._inputs: dict[
            int, tuple[Tensor, str]
        ] = {}  # keeps this batch's tensors alive, so an id is never reused
        self._shape, self._first, self._dense = (0, 0), 0, False
        self._modules = self._seen = 0

    def restart(self) -> None:
        """Forget what was collected."""
        self._sums: dict[str, StatsSums] = {}
        self._leader: dict[str, str] = {}

    @contextmanager
    def attached(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """Collect from every forward pass inside the `with`; each ends with `Enough` once all the modules have had their input."""
        self._modules = len(modules)
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def batch(self, first: int, shape: tuple[int, int], dense: bool = False) -> None:
        """Announce the next micro-batch: its first sequence number, its shape [N, T], and whether it is the dense model's.

        A micro-batch of the dense model comes after the same sequences of the pruned one.
        """
        self._inputs.clear()
        self._seen = 0
        self._first, self._shape, self._dense = first, shape, dense

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.take(name, inputs[0])
            self._seen += 1
            if self._seen == self._modules:
                raise Enough

        return collect

    def take(self, name: str, x: Tensor) -> None:
        """Count what the module of this name is fed, of the micro-batch announced last."""
        _, leader = self._inputs.setdefault(id(x), (x, name))
        if self._leader.setdefault(name, leader) != leader:
            raise ValueError(
                f"{name} does not always read the same input as {self._leader[name]}; this architecture is not supported"
            )
        if leader != name:
            return
        if x.numel() != x.shape[-1] * self._shape[0] * self._shape[1]:
            raise ValueError(
                f"{name} sees {tuple(x.shape)}, not every token once; this architecture is not supported"
            )
        if name not in self._sums:
            self._sums[name] = StatsSums(self.needs, self._positions)
        with self._watch.running():
            if self._dense:
                self._sums[name].add_dense(x)
            else:
                self._sums[name].add(x.reshape(*self._shape, x.shape[-1]), self._first)

    def groups(self) -> list[list[str]]:
        """Names of the modules that were fed the very same tensor, in the order of the forward pass."""
        return [
            [name for name, of in self._leader.items() if of == leader]
            for leader in dict.fromkeys(self._leader.values())
        ]

    def results(self, team: Team) -> dict[str, InputStats]:
        """Statistics over all processes by module name; members of a group share one object.

        Raises:
            ValueError: inputs that are not finite, with the first module in the order of the pass that has them.
        """
        self._inputs.clear()
        sequences = int(self._positions[:, 0].max()) + 1
        shares = [Team(rank, team.size).share(sequences) for rank in range(team.size)]
        counts = [
            int(((self._positions[:, 0] >= s.start) & (self._positions[:, 0] < s.stop)).sum()) for s in shares
        ]
        for name in sorted(self._sums):
            self._sums[name].merge(team, counts)
        broken = next((name for name, sums in self._sums.items() if not sums.finite), None)
        if broken is not None:
            raise ValueError(
                f"the inputs of {broken} hold the first NaN or Inf, or numbers too large to square; try --dtype float32, else "
                "the checkpoint is broken in this block (huge weights, a norm's epsilon in config.json)"
            )
        finished = {name: sums.result() for name, sums in self._sums.items()}
        self._sums.clear()
        return {name: finished[leader] for name, leader in self._leader.items()}
