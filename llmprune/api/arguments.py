"""Checks the arguments of the Python functions, and turns them into plain Python values.

Numbers of numpy and torch become plain numbers; a value of a wrong type raises `ValueError` with one line.
Every parameter has one check, found by the parameter's name, in whichever function it occurs. Whether a value
is in range is checked where it is used.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

from llmprune.common.messages import shown
from llmprune.evaluation.scores import EvaluationSpec, TaskFiles, evaluation_spec
from llmprune.recipe.types import Recipe
from llmprune.run.samples import Wish
from llmprune.text.prompts import MOST

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, Any], Any]
AnyPath = str | os.PathLike[str]
_REPORTS = ("plan", "stage", "step", "note")


def plain(value: Any) -> Any:
    """A value whose numpy and torch numbers are made plain ones, also inside mappings and lists."""
    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.dtype in (torch.float16, torch.float32):
        value = value.detach().cpu().numpy()[()]
    if isinstance(value, (np.float16, np.float32)):
        return float(str(value))  # by its shortest decimal form, so that 0.7 in single precision is 0.7
    if isinstance(value, np.generic) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim == 0):
        return value.item()
    if isinstance(value, Mapping):
        return {plain(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return value


def _wrong(name: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{name} must be {wanted}, got {shown(value)}")


def _number(name: str, value: Any) -> Any:
    return plain(value)


def _flag(name: str, value: Any) -> bool:
    value = plain(value)
    if not isinstance(value, bool):
        raise _wrong(name, "True or False", value)
    return value


def _maybe_flag(name: str, value: Any) -> bool | None:
    return None if value is None else _flag(name, value)


def _whole(name: str, value: Any) -> int | None:
    value = plain(value)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise _wrong(name, "a whole number", value)
    return value


def _some(name: str, value: Any) -> int:
    found = _whole(name, value)
    if found is None:
        raise _wrong(name, "a whole number", value)
    return found


def _counts(name: str, value: Any) -> tuple[int, ...]:
    """Whole numbers from 1, ascending, each once."""
    found = plain(value)
    found = [found] if isinstance(found, int) else found
    listed = list(found) if isinstance(found, (list, tuple, range)) else []
    if not listed or not all(type(number) is int and number >= 1 for number in listed):
        raise _wrong(name, "a whole number from 1, or a list of them", value)
    return tuple(sorted(set(listed)))


def _real(name: str, value: Any) -> float:
    found = plain(value)
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise _wrong(name, "a number", value)
    return float(found)


def _maybe_function(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise _wrong(name, "a function that takes text", value)
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "text", value)
    return value


def _maybe_text(name: str, value: Any) -> str | None:
    return None if value is None else _text(name, value)


def _path(name: str, value: Any) -> str:
    found = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(found, str) or not found:
        raise _wrong(name, "a path", value)
    return found


def _paths(name: str, value: Any) -> list[str]:
    """One path or several."""
    listed = value if isinstance(value, (list, tuple)) else [value]
    if not listed:
        raise _wrong(name, "a path, or a list of them", value)
    return [_path(name, each) for each in listed]


def _maybe_path(name: str, value: Any) -> str | None:
    return None if value is None else _path(name, value)


def _method(name: str, value: Any) -> Any:
    """An algorithm by name or as a mapping, for `update` also a list of them; the recipe checks the rest."""
    value = plain(value)
    several = name == "update" and isinstance(value, list)
    if not (value is None or isinstance(value, (str, Mapping)) or several):
        raise _wrong(name, "a name or a mapping {name: ..., option: value}", value)
    return value


def _recipe(name: str, value: Any) -> Any:
    if isinstance(value, Recipe):
        return value.as_dict()
    if isinstance(value, Mapping):
        return _keyed(name, "a name, a YAML file or a mapping of recipe fields", value)
    if value is not None and not (isinstance(value, (str, os.PathLike)) and os.fspath(value)):
        raise _wrong(name, "a name, a YAML file or a mapping of recipe fields", value)
    return _maybe_path(name, value)


def _settings(name: str, value: Any) -> Any:
    return None if value is None else _keyed(name, "a mapping of recipe fields by dotted key", value)


def _keyed(name: str, wanted: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(name, wanted, value)
    return dict(plain(value))


def _calibration(name: str, value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return _path(name, value)
    if value is not None and (isinstance(value, bytes) or not isinstance(value, (str, Iterable))):
        raise _wrong(name, "a SOURCE, an iterable of strings or int64 tokens [N, T]", value)
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """The texts of one name or file, or of a list of them."""
    return _several(name, "a text's name or file, or a list of them", value, lambda one: [_path(name, one)])


def _tasks(name: str, value: Any) -> tuple[str, ...]:
    """The tasks of one name, a list of names, or names separated by commas."""

    def split(one: Any) -> list[str]:
        return [task.strip() for task in _text(name, one).split(",")]

    return _several(name, "a task's name or a list of names", value, split)


def _several(name: str, wanted: str, value: Any, parts: Callable[[Any], list[str]]) -> tuple[str, ...]:
    """The parts of one value or of each in a list, empty ones left out; None has none."""
    listed = [] if value is None else [value] if isinstance(value, (str, os.PathLike)) else value
    if isinstance(listed, (bytes, Mapping)) or not isinstance(listed, Iterable):
        raise _wrong(name, wanted, value)
    try:
        return tuple(part for one in listed for part in parts(one) if part)
    except ValueError:
        raise _wrong(name, wanted, value) from None


def _device(name: str, value: Any) -> str:
    if isinstance(value, (str, torch.device)):
        return str(value)
    raise _wrong(name, "auto, cpu, cuda, cuda:N or a torch.device", value)


def _dtype(name: str, value: Any) -> str:
    if isinstance(value, (str, torch.dtype)):
        return str(value).removeprefix("torch.")
    raise _wrong(name, "auto, float32, bfloat16, float16 or a torch.dtype", value)


def any_model(name: str, value: Any) -> Any:
    """A model by name, hub id or folder, or a transformers model in memory."""
    if isinstance(value, torch.nn.Module) and hasattr(value, "config"):
        return value
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return _path(name, value)
    raise _wrong(name, "a name, a hub id, a folder or a transformers model in memory", value)


def _stored_model(name: str, value: Any) -> str:
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return _path(name, value)
    raise _wrong(name, "a name, a hub id or a folder", value)


def _tokenizer(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise ValueError(
            f"tokenizer must be a transformers tokenizer, got {shown(value)}; "
            "AutoTokenizer.from_pretrained(...) makes one"
        )
    return value


def _evaluation(name: str, value: Any) -> Any:
    if value is not None and not isinstance(value, EvaluationSpec):
        raise ValueError(
            f"evaluation must be an EvaluationSpec, got {shown(value)}; run_model takes perplexity=, tasks= "
            "and suite= itself"
        )
    return value


def _reporter(name: str, value: Any) -> Any:
    if value is not None and not all(callable(getattr(value, method, None)) for method in _REPORTS):
        raise _wrong(name, f"an object with the methods {', '.join(_REPORTS)}", value)
    return value


def minutes(given: Any, otherwise: float) -> float:
    """A time limit in minutes, a number or the text of one; `otherwise` where none is given."""
    try:
        limit = otherwise if given is None else float(given)
    except (TypeError, ValueError):
        limit = -1.0
    if isinstance(given, bool) or not limit >= 0:
        raise ValueError(f"the time limit must be a number of minutes from 0, got {shown(given)}")
    return limit


CHECKS: Mapping[str, Check] = {
    "model": any_model,
    "path": _stored_model,
    "paths": _paths,
    "folder": _path,
    "a": _path,
    "b": _path,
    "output": _maybe_path,
    "recipe": _recipe,
    "settings": _settings,
    "masks": _maybe_path,
    "teacher": _maybe_path,
    "text": _calibration,
    "tokens": _whole,
    "epochs": _some,
    "samples_text": _whole,
    "recover": _recipe,
    "score": _flag,
    "overlap": _flag,
    "sparsity": _number,
    "samples": _number,
    "seqlen": _number,
    "chat_template": _maybe_text,
    "seed": _number,
    "time_limit": _number,
    "limit": _whole,
    "eval_seqlen": _whole,
    "pattern": _maybe_text,
    "pruner": _method,
    "refiner": _method,
    "update": _method,
    "allocator": _method,
    "calibration": _calibration,
    "device": _device,
    "dtype": _dtype,
    "offload": _text,
    "to": _text,
    "values": _maybe_text,
    "prompt": _text,
    "seconds": _real,
    "products_only": _flag,
    "plot": _maybe_path,
    "max_new_tokens": _some,
    "temperature": _real,
    "stream": _maybe_function,
    "rows": _counts,
    "report": _maybe_function,
    "format": _text,
    "tokenizer": _tokenizer,
    "revision": _maybe_text,
    "token": _maybe_text,
    "repository": _text,
    "perplexity": _texts,
    "tasks": _tasks,
    "metric": _maybe_text,
    "suite": _maybe_path,
    "include_tasks": _maybe_path,
    "task_data": _maybe_path,
    "evaluation": _evaluation,
    "reporter": _reporter,
    "progress": _maybe_flag,
    "keep": _text,
    "overwrite": _flag,
    "resume": _flag,
    "restart": _flag,
    "dry_run": _flag,
    "private": _flag,
    "trust_remote_code": _flag,
    "blocks": _maybe_text,
    "dequantize": _flag,
}


def choices(kind: str) -> Check:
    """A check for one value or a list of them, each checked as the parameter `kind`; None for no value."""

    def check(name: str, value: Any) -> list[Any] | None:
        value = list(plain(value)) if isinstance(value, np.ndarray) and value.ndim == 1 else value
        listed = list(value) if isinstance(value, (list, tuple, range)) else [value]
        if value is None or not listed:
            return None
        if any(one is None for one in listed):
            raise _wrong(name, "one value or a list of values", value)
        return [CHECKS[kind](name, one) for one in listed]

    return check


def checked(**others: Check) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that checks each argument with the check of its name, or with the one in `others`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        named = [p.name for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        checks = {name: others.get(name) or CHECKS[name] for name in named}

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound = signature.bind(*args, **kwargs)
            for name, value in bound.arguments.items():
                if name in checks:
                    bound.arguments[name] = checks[name](name, value)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def check_once(given: Mapping[str, Any], settings: Mapping[str, Any] | None) -> None:
    """Raise `ValueError` for a field of the recipe that has a parameter and is in `settings` too."""
    for key, value in (settings or {}).items():
        if key in given and value != given[key]:
            raise ValueError(
                f"{key} is given twice: {shown(given[key])}, and {shown(value)} in settings (--set); give it "
                "once"
            )


def check_format(format: str) -> None:
    """Raise `ValueError` for a form in which weights are not saved."""
    if format not in ("dense", "packed"):
        raise ValueError(f"format must be dense or packed, got {shown(format)}")


def texts(samples_text: int | None) -> Wish:
    """How many texts a report shall have. Raises `ValueError` for a number out of range."""
    if samples_text is not None and not 0 <= samples_text <= MOST:
        raise ValueError(f"samples_text must be a whole number from 0 to {MOST}, got {samples_text}")
    return Wish.of(samples_text)


def evaluation(
    perplexity: Any,
    tasks: Any,
    suite: Any,
    eval_seqlen: int | None,
    include_tasks: Any,
    task_data: Any,
    limit: int | None,
    trust_remote_code: bool,
) -> EvaluationSpec:
    """What to score, from arguments that were checked before. Raises `ValueError` for values out of range."""
    include, data = (Path(folder) if folder else None for folder in (include_tasks, task_data))
    files = TaskFiles(include, data, trust_remote_code)
    return evaluation_spec(perplexity, tasks, suite, eval_seqlen, limit, files)
