"""Sees matrix products with given parameters while a model runs, whatever the modules are called.

Mixtures of experts stack the matrices of their experts in one parameter, so there is no module per matrix
that a hook could observe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor
from torch.overrides import TorchFunctionMode

# Function -> the places of inputs and weight among its arguments, and whether the product is x @ w^T.
_PRODUCTS = {
    "linear": (0, 1, True),
    "matmul": (0, 1, False),
    "__matmul__": (0, 1, False),
    "mm": (0, 1, False),
    "bmm": (0, 1, False),
    "addmm": (1, 2, False),
    "baddbmm": (1, 2, False),
}


class Seen(NamedTuple):
    """One product `inputs @ W^T` with a matrix W [R, C] of a parameter.

    Attributes:
        parameter: its name.
        expert: which matrix of the parameter; None where that cannot be told.
        inputs: [..., C].
        transposed: whether the parameter holds the matrix as [C, R].
    """

    parameter: str
    expert: int | None
    inputs: Tensor
    transposed: bool


class Products(TorchFunctionMode):
    """Calls `seen` for every product with a matrix of some parameters, inside the `with`.

    Args:
        parameters: matrices, [R, C] or [C, R], or stacks of such.
        seen: called before the product.
    """

    def __init__(self, parameters: Mapping[str, Tensor], seen: Callable[[Seen], None]) -> None:
        super().__init__()
        self._parameters = dict(parameters)
        self._places = sorted((t.data_ptr(), _end(t), name) for name, t in self._parameters.items())
        self._seen = seen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        place = _PRODUCTS.get(getattr(func, "__name__", ""))
        if place is not None and len(args) > place[1]:
            one, two = args[place[0]], args[place[1]]
            if isinstance(one, Tensor) and isinstance(two, Tensor):
                self._look(one, two, place[2])
                if not place[2] and one.ndim == 2 and two.ndim > 1:  # W @ x^T
                    self._look(two.mT, one, True)
        return func(*args, **kwargs)

    def _look(self, inputs: Tensor, weight: Tensor, linear: bool) -> None:
        name = self._name(weight) if weight.ndim in (2, 3) else None
        if name is None:
            return
        stack = self._parameters[name]
        direct = _lies_as(weight, stack)
        transposed = direct != linear
        if weight.ndim == 2:
            step = stack.stride(0) * stack.element_size() if stack.ndim == 3 else 0
            expert = (weight.data_ptr() - stack.data_ptr()) // step if step else None
            self._seen(Seen(name, expert, inputs, transposed))
        else:
            for expert, rows in enumerate(inputs.reshape(len(weight), -1, inputs.shape[-1])):
                # Experts that get all tokens in one product get zeros for those of other experts.
                self._seen(Seen(name, expert, rows[rows.any(dim=-1)], transposed))

    def _name(self, weight: Tensor) -> str | None:
        """The parameter that a weight is a part of."""
        here = weight.data_ptr()
        return next((name for start, end, name in self._places if start <= here < end), None)


def _end(tensor: Tensor) -> int:
    """Where the memory of a tensor ends."""
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


def _lies_as(weight: Tensor, stack: Tensor) -> bool:
    """Whether the last two axes of a weight are those of the stack, and not exchanged."""
    own, axes = tuple(weight.shape[-2:]), tuple(stack.shape[-2:])
    if axes[0] != axes[1] and own in (axes, axes[::-1]):
        return own == axes
    if stack.stride(-1):
        return weight.stride(-1) == stack.stride(-1)
    return own[-1] == axes[-1]
