"""Builds a model without weights: parameters on the meta device, buffers with their values.

Settings that other threads share, such as torch's default dtype, are not changed.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from llmprune.machine.state import libraries
from llmprune.model.classes import class_of

_building = threading.local()


def build_empty(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The model of a config, for weights in `dtype`. The config is not changed.

    Buffers have their values: rotary tables are not in the
    checkpoint, and casting the whole model would round them.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)  # transformers writes the dtype into it
    _, model_class = class_of(config, trust_remote_code)
    # `from_config` changes torch's default dtype for the whole process while it runs, hence `libraries`.
    with libraries(), _empty_parameters():
        if model_class is None:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
        config = _config_of(model_class, config)
        _set_dtype(config, dtype)
        with _DefaultDtype(dtype):
            return model_class(config)


def _config_of(model_class: Any, config: Any) -> Any:
    """The config to make a class from; for the language model in a multimodal one it is only a part."""
    text = config.sub_configs.get("text_config")
    return config.get_text_config() if text is not None and model_class.config_class is text else config


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    """Write the dtype into a config and the configs inside it."""
    config.dtype = dtype
    for key in config.sub_configs:
        if (inner := getattr(config, key, None)) is not None:
            inner.dtype = dtype


class _DefaultDtype(TorchFunctionMode):
    """Gives this thread another default dtype for tensors.

    Torch's own default, which all threads share, does not change.
    """

    # Functions whose result has a dtype that the caller chose.
    _EXPLICIT = frozenset(("to", "type", "type_as", "float", "double", "half", "bfloat16"))

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or result.dtype != torch.get_default_dtype():
            return result
        if result.dtype == self._dtype:
            return result
        explicit = kwargs.get("dtype") is not None or getattr(func, "__name__", "") in self._EXPLICIT
        inputs = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if explicit or any(tensor.is_floating_point() for tensor in inputs):
            return result
        return result.to(self._dtype)


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Put the parameters of modules that this thread makes inside the `with` on the meta device."""
    _watch_registrations()
    _building.active = True
    try:
        yield
    finally:
        _building.active = False


@functools.cache
def _watch_registrations() -> None:
    # The hook is never removed, since that could disturb a
    # module that another thread is making at that moment.
    register_module_parameter_registration_hook(_emptied)  # type: ignore[arg-type]  # typed as returning None


def _emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """The parameter on the meta device; None (leave it unchanged) outside of `_empty_parameters`."""
    if parameter is None or not getattr(_building, "active", False):
        return None
    empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    return empty
