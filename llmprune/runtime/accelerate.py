"""What is faster on a GPU than a dense product: measured per layer, at the row counts asked for.

Layers whose dense weight holds 2:4 are tried as torch's semi-structured tensors, packed layers in the ways of
`kernels.ways`. Nothing is taken that does not win, or whose result is not that of the dense product.
n rows of x, R outputs, C inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from llmprune.common.messages import first_line
from llmprune.kernels import gpu, ways
from llmprune.machine import device as devices
from llmprune.runtime import semi_structured
from llmprune.runtime.layers import PackedLinear
from llmprune.runtime.semi_structured import TwoOfFourLinear

Clock = Callable[[Callable[[], Tensor], torch.device], float]
WINS = 1.05  # times faster at least: less is within what measurements differ by
_CLOSE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}  # relative, by norm
DENSE = "dense"


@dataclass
class Layer:
    """What was measured and done of one layer.

    Attributes:
        name, shape: of the layer; [R, C].
        kind: `2:4` or `packed`.
        ratios: seconds of the dense product by those of the fastest other way, by rows of x.
        ways: what is taken from now on, by rows of x; `dense` for the dense weight.
        left: why nothing was changed; empty where something was.
        refused: ways that were not taken, each with the reason.
    """

    name: str
    shape: tuple[int, int]
    kind: str
    ratios: dict[int, float] = field(default_factory=dict)
    ways: dict[int, str] = field(default_factory=dict)
    left: str = ""
    refused: dict[str, str] = field(default_factory=dict)

    def line(self) -> str:
        """For people."""
        each = ", ".join(f"{n}: {ratio:.2f} ({self.ways.get(n, DENSE)})" for n, ratio in self.ratios.items())
        words = [f"{self.name} {list(self.shape)} {self.kind}", each, self.left and f"left: {self.left}"]
        why = "; ".join(f"{way}: {reason}" for way, reason in self.refused.items())
        return ", ".join(word for word in (*words, why) if word)


def measured(model: nn.Module, rows: Sequence[int], clock: Clock = devices.seconds_of) -> Iterator[Layer]:
    """Measure layer by layer and change what wins; the model is changed as the results come.

    Args:
        model: on one GPU or several.
        rows: row counts of x, ascending.
        clock: seconds of a call on a device.
    """
    times_used: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            times_used[id(parameter)] = times_used.get(id(parameter), 0) + 1
    for name, module in list(model.named_modules()):
        if isinstance(module, PackedLinear):
            yield _packed(name, module, rows, clock)
        elif isinstance(module, nn.Linear):
            found = Layer(name, (module.out_features, module.in_features), "2:4")
            found.left = _unfit(module, times_used[id(module.weight)] > 1)
            if not found.left:
                _two_of_four(model, module, found, rows, clock)
            yield found
        elif isinstance(module, TwoOfFourLinear):
            yield Layer(name, (module.out_features, module.in_features), "2:4", left="done before")


def _unfit(linear: nn.Linear, shared: bool) -> str:
    """Why a layer cannot be tried; empty where it can."""
    weight = linear.weight
    if isinstance(weight, torch.sparse.SparseSemiStructuredTensor):
        return "done before"
    if type(linear) is not nn.Linear or type(weight) is not nn.Parameter:
        return f"it is a {type(linear).__name__} of its own, not an ordinary linear layer"
    if not devices.on_nvidia(weight):
        return f"its weight is on {weight.device}"
    if hasattr(linear, "_hf_hook"):
        return "it is moved between devices; load the model on one GPU"
    if shared:
        return "it shares its weight with another layer"
    if weight.dtype not in semi_structured.DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}; bfloat16 or float16 is wanted"
    if not semi_structured.holds_two_of_four(weight):
        return "its weight does not hold 2:4"
    return ""


@torch.no_grad()
def _two_of_four(
    model: nn.Module, linear: nn.Linear, found: Layer, rows: Sequence[int], clock: Clock
) -> None:
    """Measure a 2:4 layer with the backend that is faster for the most rows, and convert what wins."""
    weight, bias = linear.weight, linear.bias
    inputs = {n: _inputs(n, weight) for n in rows}
    best: tuple[str, Tensor, dict[int, float]] | None = None
    for backend in semi_structured.backends():
        try:
            sparse = semi_structured.converted(weight, backend)
        except (RuntimeError, NotImplementedError) as error:
            found.refused[backend] = first_line(error)
            continue
        seconds = {}
        for n, x in inputs.items():
            call = functools.partial(nn.functional.linear, x, sparse, bias)
            taken = _right_seconds(found, backend, call, nn.functional.linear(x, weight, bias), clock)
            seconds[n] = float("inf") if taken is None else taken
        if backend not in found.refused and (best is None or seconds[rows[-1]] < best[2][rows[-1]]):
            best = backend, sparse, seconds
    if best is None:
        found.left = "no backend takes it"
        return
    backend, sparse, seconds = best
    for n, x in inputs.items():
        dense = clock(functools.partial(nn.functional.linear, x, weight, bias), x.device)
        found.ratios[n] = dense / seconds[n]
    _take(model, linear, found, backend, sparse)


def _take(model: nn.Module, linear: nn.Linear, found: Layer, backend: str, sparse: Tensor) -> None:
    """Put the semi-structured weight where it wins: instead of the dense one, or beside it."""
    steps = [(n, ratio >= WINS) for n, ratio in found.ratios.items()]
    found.ways = {n: backend if wins else DENSE for n, wins in steps}
    if not any(wins for _, wins in steps):
        found.left = "2:4 is not faster"
    elif all(wins for _, wins in steps):
        linear.weight = nn.Parameter(sparse, requires_grad=False)
    else:
        model.set_submodule(found.name, TwoOfFourLinear(linear, sparse, steps))


@torch.no_grad()
def _packed(name: str, layer: PackedLinear, rows: Sequence[int], clock: Clock) -> Layer:
    """Measure the ways of a packed layer beside its dense product; take the fastest for each row count."""
    packed, dtype = layer.packed(), layer.layout.dtype
    found = Layer(name, (layer.out_features, layer.in_features), "packed")
    found.left = "" if devices.on_nvidia(packed.values) else f"it is on {packed.values.device}"
    try:
        beside = None if found.left else gpu.prepared(packed)
    except ValueError as error:
        found.left = str(error)
    if beside is None or found.left:
        return found
    weight = layer.layout.matrix(layer.dense())
    steps = []
    for n in rows:
        x = _inputs(n, weight)
        dense = clock(functools.partial(nn.functional.linear, x, weight), weight.device)
        wanted = nn.functional.linear(x, weight)
        times: dict[ways.Way, float] = {}
        for way in ways.candidates(packed, n, dtype):
            call = functools.partial(ways.multiply, x, packed, beside, way)
            if (seconds := _right_seconds(found, way.name, call, wanted, clock)) is not None:
                times[way] = seconds
        if not times:
            raise ValueError(f"no product with {name} is right on {weight.device}: {found.line()}")
        fastest = min(times, key=times.__getitem__)
        steps.append((n, fastest))
        found.ratios[n], found.ways[n] = dense / times[fastest], fastest.name
    if all(way == ways.TORCH for _, way in steps):
        found.left = "nothing is faster than unpacking with torch"
    else:
        layer.plan = ways.Plan(*beside, tuple(steps))
    return found


def _right_seconds(
    found: Layer, way: str, call: Callable[[], Tensor], wanted: Tensor, clock: Clock
) -> float | None:
    """Seconds of a product whose result is right; else None, and the reason stands in `found.refused`."""
    if way in found.refused:
        return None
    try:
        y = call()
        size = float(wanted.float().norm()) or 1.0
        error = float((y.float() - wanted.float()).norm()) / size
        if not error <= _CLOSE[wanted.dtype]:
            raise ValueError(f"its result differs from the dense product by {error:.2g}")
        return clock(call, wanted.device)
    except Exception as error:  # of backends and compilers, of many kinds
        found.refused[way] = first_line(error)
        return None


def _inputs(n: int, weight: Tensor) -> Tensor:
    """x [n, C] for a weight [R, C]."""
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (n, weight.shape[1])
    return torch.randn(shape, generator=generator, device=weight.device, dtype=torch.float32).to(weight.dtype)
