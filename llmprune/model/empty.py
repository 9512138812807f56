"""A model without weights: parameters on meta, buffers as the model makes them, and nothing changed for other threads."""

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

_building = threading.local()


def build_empty(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """The causal language model of a config, for weights in `dtype`. The config is not written to.

    Buffers are real: rotary tables are not in the checkpoint, and a cast of the whole model would round them.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)  # transformers writes the dtype into it
    own = _own_class(config, trust_remote_code)
    # Code of the checkpoint, and wrappers of several models, make the dtype torch's default for the whole process meanwhile.
    with libraries(), _empty_parameters():
        if own is None:
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
        config = _config_of(own, config)
        _set_dtype(config, dtype)
        with _DefaultDtype(dtype):
            return own(config)


def _own_class(config: Any, trust_remote_code: bool) -> Any:
    """The class that transformers itself has for a config; None where the checkpoint brings its own code or there is none."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.auto_factory import _get_model_class

    if type(config) not in AutoModelForCausalLM._model_mapping:
        return None
    if trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return None
    return _get_model_class(config, AutoModelForCausalLM._model_mapping)


def _config_of(model_class: Any, config: Any) -> Any:
    """The part of a config that a class is made from: of a multimodal model's, perhaps the text model's."""
    text = config.sub_configs.get("text_config")
    return config.get_text_config() if text is not None and model_class.config_class is text else config


def _set_dtype(config: Any, dtype: torch.dtype) -> None:
    config.dtype = dtype
    for key in config.sub_configs:
        if (inner := getattr(config, key, None)) is not None:
            inner.dtype = dtype


class _DefaultDtype(TorchFunctionMode):
    """What this thread makes in torch's default dtype is in another one; the default itself, which all threads share, stays."""

    # These say which dtype they give.
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
        made = func(*args, **kwargs)
        if (
            not isinstance(made, Tensor)
            or made.dtype != torch.get_default_dtype()
            or made.dtype == self._dtype
        ):
            return made
        explicit = kwargs.get("dtype") is not None or getattr(func, "__name__", "") in self._EXPLICIT
        if explicit or any(
            isinstance(a, Tensor) and a.is_floating_point() for a in tree_leaves((args, kwargs))
        ):
            return made
        return made.to(self._dtype)


@contextmanager
def _empty_parameters() -> Iterator[None]:
    """Parameters of modules made by this thread inside the `with` are on meta; those of other threads are not touched."""
    _watch_registrations()
    _building.active = True
    try:
        yield
    finally:
        _building.active = False


@functools.cache
def _watch_registrations() -> None:
    # It stays registered: taking it away could disturb a module that another thread is making at that moment.
    register_module_parameter_registration_hook(_emptied)  # type: ignore[arg-type]  # it may return another one


def _emptied(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or not getattr(_building, "active", False):
        return None  # leave it as it is
    empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    empty.__dict__.update(parameter.__dict__)
    return empty
