"""Collects input statistics with hooks while a block runs forward.

Matrices that read the same input (such as q, k and v) form a group, for which statistics are collected once.
C input features, N sequences, T tokens.
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
    """Ends a forward pass when every observed matrix has had its input."""


def input_of(module: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """The first input of a module in a forward pass, in float32; the pass ends there."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].float())
        raise Enough

    handle = module.register_forward_pre_hook(keep)
    try:
        forward()
    except Enough:
        pass
    finally:
        handle.remove()
    return seen[0]


class Halted:
    """A forward pass that stops before some groups of modules, so that their weights can still be changed.

    The pass runs in a greenlet, which can be suspended in the middle of its calls and continued later.

    Args:
        forward: runs the pass and returns its output.
        groups: groups of modules that share an input, in the order of the pass.
    """

    def __init__(self, forward: Callable[[], Tensor], groups: Sequence[Sequence[nn.Module]]) -> None:
        self._pass, self._groups = greenlet(forward), groups

    def go_on(self, group: int) -> Tensor:
        """Continue up to the group with this number, and return its input.

        If `group` is the number of groups, continue to the end of the pass and return its output.

        Raises:
            ValueError: the pass does not reach the groups in this order.
        """
        last = group == len(self._groups)
        handle = None if last else self._groups[group][0].register_forward_pre_hook(self._stop)
        try:
            result: Tensor = self._pass.switch()
        finally:
            if handle:
                handle.remove()
        if self._pass.dead != last:
            raise ValueError(
                "a block does not call its matrices in the same order for every micro-batch; "
                "this architecture is not supported"
            )
        return result

    @staticmethod
    def _stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        getcurrent().parent.switch(inputs[0])


class Collector:
    """Collects statistics of the inputs of modules, once for modules that get the very same tensor.

    Such modules (q, k, v; gate, up) form a group. The first of them in the order of the pass is its leader.

    Args:
        needs: the statistics to collect.
        positions: the sampled tokens, int64 [S, 2] of (sequence, position).
        watch: measures the time it takes.
        sums: how they are summed.
    """

    def __init__(
        self, needs: Need, positions: Tensor, watch: Stopwatch, sums: type[StatsSums] = StatsSums
    ) -> None:
        self.needs, self._positions, self._watch, self._kind = needs, positions, watch, sums
        self.restart()
        self._routed: frozenset[str] = frozenset()
        self._wanted: Callable[[], bool] | None = None
        self._taken: set[str] = set()  # matrices that have had their input of this micro-batch
        # id of an input -> the input and the leader of its group.
        # Holding the tensor keeps its id from being reused.
        self._inputs: dict[int, tuple[Tensor, str]] = {}
        self._shape, self._first, self._dense = (0, 0), 0, False
        self._modules = self._seen = 0

    def restart(self) -> None:
        """Forget what was collected."""
        self._sums: dict[str, StatsSums] = {}
        self._leader: dict[str, str] = {}

    @contextmanager
    def attached(
        self,
        modules: Mapping[str, nn.Module],
        routed: frozenset[str] = frozenset(),
        wanted: Callable[[], bool] | None = None,
    ) -> Iterator[None]:
        """Collect from every forward pass inside the `with`.

        Each pass ends with `Enough` when all the modules have had their input, unless some matrices are
        `routed`: those of experts, which get some of the tokens, or none. `wanted`: whether to collect from
        those now; None for always.
        """
        self._modules, self._routed = 0 if routed else len(modules), routed
        self._wanted = wanted
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def batch(self, first: int, shape: tuple[int, int], dense: bool = False) -> None:
        """Announce the next micro-batch.

        Args:
            first: number of its first sequence.
            shape: (N, T).
            dense: whether it passes through the dense model. The same sequences must have passed through the
                pruned one just before.
        """
        self._inputs.clear()
        self._taken.clear()
        self._seen = 0
        self._first, self._shape, self._dense = first, shape, dense

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def collect(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if name in self._routed:
                if self._wanted is None or self._wanted():
                    self.take_some([name], inputs[0])
                return
            self.take(name, inputs[0])
            self._seen += 1
            if self._seen == self._modules:
                raise Enough

        return collect

    def take(self, name: str, x: Tensor) -> None:
        """Add the input of a module, for the micro-batch announced last.

        Raises:
            ValueError: the architecture is not supported: groups change, or a module does not get every token
                once.
        """
        self._taken.add(name)
        _, leader = self._inputs.setdefault(id(x), (x, name))
        if self._leader.setdefault(name, leader) != leader:
            raise ValueError(
                f"{name} does not always read the same input as {self._leader[name]}; "
                "this architecture is not supported"
            )
        if leader != name:
            return
        # Some models put more tokens before the text, or run it in several streams.
        length, rest = divmod(x.numel(), x.shape[-1] * self._shape[0])
        if rest or length < self._shape[1]:
            raise ValueError(
                f"{name} sees {tuple(x.shape)}, not every token; this architecture is not supported"
            )
        if name not in self._sums:
            self._sums[name] = self._kind(self.needs, self._positions)
        with self._watch.running():
            if self._dense:
                self._sums[name].add_dense(x)
            else:
                self._sums[name].add(x.reshape(self._shape[0], length, x.shape[-1]), self._first)

    @property
    def inputs(self) -> list[tuple[str, Tensor]]:
        """The inputs of the micro-batch announced last, each with the leader of its group."""
        return [(leader, x) for x, leader in self._inputs.values()]

    def has(self, name: str) -> bool:
        """Whether a matrix has had its input of the micro-batch announced last."""
        return name in self._taken

    def take_some(self, names: Sequence[str], x: Tensor) -> None:
        """Add what an expert sees of the micro-batch announced last: [n, C], the inputs of some matrices.

        Nothing is added for the dense model, which routes other tokens to it.
        """
        if self._dense:
            return
        _, leader = self._inputs.setdefault(id(x), (x, names[0]))
        for name in names:
            leader = self._leader.setdefault(name, leader)
        if leader not in names:
            return
        if leader not in self._sums:
            self._sums[leader] = StatsSums(self.needs & ~Need.CROSS, self._positions)
        sequences = self._positions[:, 0]
        here = (sequences >= self._first) & (sequences < self._first + self._shape[0])
        with self._watch.running():
            rows = x.reshape(-1, x.shape[-1])
            self._sums[leader].add_some(rows, int(here.sum()), self._shape[1])

    def groups(self) -> list[list[str]]:
        """Names of the modules of each group, in the order of the forward pass."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            groups.setdefault(leader, []).append(name)
        return list(groups.values())

    def results(self, team: Team, widths: Mapping[str, int] | None = None) -> dict[str, InputStats]:
        """Statistics over all processes, by module name; the modules of a group share one object.

        Matrices that no token has reached are not among them. `widths`: C of matrices that may be so.

        Raises:
            ValueError: inputs are not finite; the message names the first such module in the order of the
                pass.
        """
        self._inputs.clear()
        if widths and not team.alone:
            self._agree(team, widths)
        for name in sorted(self._sums):
            self._sums[name].merge(team)
        broken = next((name for name, sums in self._sums.items() if not sums.finite), None)
        if broken is not None:
            raise ValueError(
                f"the inputs of {broken} hold the first NaN or Inf, or numbers too large to square; "
                "try --dtype float32, else the checkpoint is broken in this block "
                "(huge weights, a norm's epsilon in config.json)"
            )
        finished = {name: sums.result() for name, sums in self._sums.items() if sums.count}
        self._sums.clear()
        return {name: finished[leader] for name, leader in self._leader.items() if leader in finished}

    def _agree(self, team: Team, widths: Mapping[str, int]) -> None:
        """Take part in the sums of matrices that only other processes have seen."""
        for rank in range(team.size):
            self._leader = {**team.tell(self._leader, rank), **self._leader}
        for leader in set(self._leader.values()) - set(self._sums):
            self._sums[leader] = StatsSums(self.needs & ~Need.CROSS, self._positions)
            self._sums[leader].add_none(widths[leader])
