"""Loads recipes from YAML files or mappings, applies overrides, and checks every value once."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmprune import patterns, registry
from llmprune.common.messages import nearest, shown
from llmprune.common.shipped import parse_yaml, read_yaml, shipped, shipped_names
from llmprune.contracts import VALUES, BlockStep
from llmprune.recipe.given import NAME
from llmprune.recipe.types import (
    PRECISIONS,
    ROUNDING,
    SUMS,
    AlgorithmSpec,
    CalibrationSpec,
    Case,
    ExpertsSpec,
    Recipe,
    Rule,
    resolve_sparsity,
    rule_sparsity,
)
from llmprune.text import mixture

DEFAULT = "dsnot"
# When statistics are collected: for all matrices of a block before it is pruned; or for each group of
# matrices with the same input, once the groups before it are pruned.
ORDERS = ("block", "group")
CHAT_TEMPLATES = ("auto", "on", "off")
EXPERT_TOKENS, EXPERT_FEWER = ("routed", "all"), ("magnitude", "all-tokens", "error")


def load(recipe: str | Mapping[str, Any] = DEFAULT, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Load a recipe and check all its values.

    Args:
        recipe: the name of a shipped recipe, a YAML file, or a mapping of recipe fields.
        overrides: values that replace the recipe's, by dotted key, such as `{"pruner.damp": 0.1}`.

    Raises:
        ValueError: an unknown recipe, key, algorithm or option, a value out of range, or a sparsity that
            contradicts the N:M pattern.
    """
    values, label = _named(recipe) if isinstance(recipe, str) else (dict(recipe), _own_name(recipe))
    values = copy.deepcopy(values)
    if (overrides or {}).get("pattern") not in (None, "unstructured") and "sparsity" not in (overrides or {}):
        values.pop("sparsity", None)  # the N:M pattern implies one, whatever the file says
    _choose_cases(values, overrides or {})
    for key, value in (overrides or {}).items():
        if key == "name":
            raise ValueError(
                f"a recipe's name is that of its file; copy {label}.yaml under the name {shown(value)} "
                "instead of setting it"
            )
        _override(values, key, value)
    return from_dict({**values, "name": label})


def _named(name: str) -> tuple[dict[str, Any], str]:
    """The values and the name of a recipe that is given by name or file."""
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"no such recipe file: {name}")
        return read_yaml(Path(name)), name_of(name)
    if name in shipped_names("recipes"):
        return read_yaml(shipped("recipes", f"{name}.yaml")), name
    raise nearest("recipe", name, shipped_names("recipes"))


def name_of(recipe: str) -> str:
    """The name of a recipe that is given by name or file."""
    return Path(recipe).stem if recipe.endswith((".yaml", ".yml")) else recipe


def _own_name(values: Mapping[str, Any]) -> str:
    """The name of a recipe given as fields; it must be fit to become part of a folder's name."""
    name = values.get("name", "custom")
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,99}", name):
        raise ValueError(
            f"a recipe's name must be text that can stand in the name of a folder, got {shown(name)}"
        )
    return name


def _choose_cases(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Apply the cases that match to a recipe's values, with their reasons in `chosen`.

    A case is left out where an override sets one of the fields that it would set.
    """
    cases = [_case(case) for case in _typed("cases", values.pop("cases", None) or [], list)]
    pattern = _typed("pattern", overrides.get("pattern", values.get("pattern", "unstructured")), str)
    sparsity = resolve_sparsity(pattern, overrides.get("sparsity", values.get("sparsity")))
    kept = _typed("values", overrides.get("values", values.get("values", "same")), str)
    given, reasons = {key.partition(".")[0] for key in overrides}, []
    for case in cases:
        heads = {key.partition(".")[0] for key in case.set}
        fits = fnmatch.fnmatchcase(pattern, case.pattern) and fnmatch.fnmatchcase(kept, case.values)
        if not heads & given and sparsity >= case.sparsity and fits:
            for key, value in case.set.items():
                _override(values, key, value)
            reasons.append(case.because)
    if reasons:
        values["chosen"] = "; ".join(reasons)


def _case(value: Any) -> Case:
    case: Case = _part(Case, "case", value)
    for key, wanted in (("pattern", str), ("values", str), ("set", dict), ("because", str)):
        _typed(f"{key} of a case", getattr(case, key), wanted)
    if not all(isinstance(key, str) for key in case.set):
        raise ValueError(f"set of a case must have dotted keys of the recipe, got {shown(case.set)}")
    resolve_sparsity("unstructured", case.sparsity)
    return case


def parse_assignment(text: str, form: str = "{}") -> tuple[str, Any]:
    """`dotted.key=value` from the command line, the value read as YAML. `form`: what is put around it."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"--set takes dotted.key=value, got {shown(text)}")
    try:
        return key.strip(), parse_yaml(form.format(value))
    except ValueError as error:
        raise ValueError(
            f"--set {key}: the value {shown(value)} is not valid YAML ({str(error)[:120]})"
        ) from None


def parse_choices(text: str) -> tuple[str, list[Any]]:
    """`dotted.key=a,b` from the command line: the value is read as the items of a YAML list.

    So `[a, b]` is one value, a list, and `[a, b], [c]` are two.
    """
    name, listed = parse_assignment(text, "[{}]")
    if not isinstance(listed, list) or not listed or None in listed:
        value = text.partition("=")[2]
        raise ValueError(f"--set {name}: {shown(value)} are no values; give some, with commas between them")
    return name, listed


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by dotted key."""
    head, _, rest = key.partition(".")
    if rest:
        inner = values.get(head)
        if inner is None:
            inner = values[head] = {"name": DEFAULT_NAMES[head]} if head in DEFAULT_NAMES else {}
        if isinstance(inner, str):
            inner = values[head] = {"name": inner}
        if not isinstance(inner, dict):
            raise ValueError(f"cannot set {shown(key)}: {head!r} holds {shown(inner)}")
        _override(inner, rest, value)
    elif isinstance(values.get(head), dict) and isinstance(value, str) and value == values[head].get("name"):
        return  # the algorithm is the recipe's own, whose options are kept
    elif value == "none" and head in ("refiner", "update"):
        values[head] = None
    elif head == "update" and isinstance(value, str) and "," in value:
        values[head] = value.split(",")
    else:
        values[head] = value


DEFAULT_NAMES = {"allocator": "uniform"}


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values, those of a YAML file or a record, all of them checked."""
    known = {f.name for f in dataclasses.fields(Recipe)} | {"values"}
    for key in values:
        if key not in known:
            raise nearest("recipe key", key, known)
    if not values.get("pruner"):
        raise ValueError("a recipe needs a pruner, for example 'pruner: wanda'")
    fields = {k: v for k, v in values.items() if v is not None}
    given = _typed("masks", fields.get("masks", ""), str)
    if given:
        del fields["pruner"]
    for key, room in (("pruner", "pruners"), ("refiner", "refiners"), ("allocator", "allocators")):
        if key in fields:
            fields[key] = _algorithm(room, fields[key])
    if given:
        fields["pruner"] = AlgorithmSpec(name=NAME)
    updates = fields.get("update", [])
    updates = updates if isinstance(updates, list) else [updates]
    updates = _with_rounding(updates, fields.pop("values", "same"))
    fields["update"] = tuple(_algorithm("updates", update) for update in updates)
    rules = _typed("rules", fields.get("rules", []), list)
    fields["rules"] = tuple(_part(Rule, "rule", rule) for rule in rules)
    if any(not isinstance(rule.match, str) for rule in fields["rules"]):
        raise ValueError("every rule needs 'match', a glob pattern on matrix names such as '*.down_proj'")
    fields["calibration"] = _calibration(fields.get("calibration", {}))
    fields["experts"] = _experts(fields.get("experts", {}))
    for key in ("name", "description", "pattern", "scope", "order", "chosen", "sums", "precision"):
        if key in fields:
            _typed(key, fields[key], str)
    fields["sparsity"] = resolve_sparsity(fields.get("pattern", "unstructured"), fields.get("sparsity"))
    recipe = Recipe(**fields)
    _check(recipe)
    return recipe


def _with_rounding(updates: list[Any], values: Any) -> list[Any]:
    """The updates, with one that rounds to these values as the last of a matrix, unless they name it."""
    if not isinstance(values, str) or values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(VALUES)}, got {shown(values)}")
    names = [update.get("name") if isinstance(update, dict) else update for update in updates]
    if ROUNDING in names:
        named = updates[names.index(ROUNDING)]
        bits = named.get("bits", 4) if isinstance(named, dict) else 4
        if values != "same" and VALUES[values] != bits:
            raise ValueError(
                f"values {values} contradict the update rounding to {shown(bits)} bits; keep one"
            )
        return updates
    if values == "same":
        return updates
    of_blocks = [isinstance(n, str) and issubclass(registry.find("updates", n), BlockStep) for n in names]
    place = of_blocks.index(True) if True in of_blocks else len(updates)
    return [*updates[:place], {"name": ROUNDING, "bits": VALUES[values]}, *updates[place:]]


def _typed(key: str, value: Any, wanted: type) -> Any:
    """The value. Raises `ValueError` where it is not of the wanted type."""
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ValueError(f"{shown(key)} must be {wanted.__name__}, got {shown(value)}")
    return value


def _part(cls: type, kind: str, value: Any) -> Any:
    """A dataclass from a mapping of its fields. Raises `ValueError` for an unknown field."""
    value = _typed(kind, value, dict)
    known = {f.name for f in dataclasses.fields(cls)}
    for key in value:
        if key not in known:
            raise nearest(f"{kind} key", key, known)
    if cls is Rule and "match" not in value:
        raise ValueError(
            "every rule needs 'match', a glob pattern on matrix names such as '*.down_proj', got "
            f"{shown(value)}"
        )
    return cls(**value)


def _calibration(value: Any) -> CalibrationSpec:
    spec: CalibrationSpec = _part(CalibrationSpec, "calibration", value)
    if isinstance(spec.source, dict):
        spec = dataclasses.replace(spec, source=mixture.as_text(spec.source))
    if isinstance(spec.chat_template, bool):  # YAML reads on and off so
        spec = dataclasses.replace(spec, chat_template="on" if spec.chat_template else "off")
    if spec.chat_template not in CHAT_TEMPLATES:
        raise ValueError(
            f"calibration.chat_template must be one of {', '.join(CHAT_TEMPLATES)}, got "
            f"{shown(spec.chat_template)}"
        )
    mixture.parse(_typed("calibration.source", spec.source, str))
    for key, least, most in (("temperature", 0.01, 100), ("top_p", 1e-6, 1)):
        given = getattr(spec, key)
        number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if given is not None and not (number and least <= given <= most):
            raise ValueError(f"calibration.{key} must be a number from {least} to {most}, got {shown(given)}")
    return spec


def _experts(value: Any) -> ExpertsSpec:
    spec: ExpertsSpec = _part(ExpertsSpec, "experts", value)
    for key, known in (("tokens", EXPERT_TOKENS), ("fewer", EXPERT_FEWER)):
        if getattr(spec, key) not in known:
            raise ValueError(
                f"experts.{key} must be one of {', '.join(known)}, got {shown(getattr(spec, key))}"
            )
    if isinstance(spec.least, bool) or not isinstance(spec.least, int) or spec.least < 0:
        raise ValueError(f"experts.least must be a whole number from 0, got {shown(spec.least)}")
    return spec


def _algorithm(room: str, value: Any) -> AlgorithmSpec:
    kind = room.removesuffix("s")
    value = {"name": value} if isinstance(value, str) else dict(_typed(kind, value, dict))
    if not isinstance(value.get("name"), str):
        raise ValueError(f"{kind} needs a name: one of {', '.join(registry.names(room))}, got {shown(value)}")
    name, targets = value.pop("name"), value.pop("targets", ["*"])
    if not isinstance(targets, list) or not targets or not all(isinstance(t, str) for t in targets):
        raise ValueError(f"targets of {shown(name)} must be a list of glob patterns, got {shown(targets)}")
    if room not in ("refiners", "updates") and targets != ["*"]:
        raise ValueError(
            f"only a refiner or an update takes targets; use rules to choose the matrices {kind} "
            f"{shown(name)} works on"
        )
    algorithm = registry.build(room, name, value)  # checks the options and fills in the defaults
    return AlgorithmSpec(name=name, targets=tuple(targets), options=dataclasses.asdict(algorithm.config))


def _check(recipe: Recipe) -> None:
    """Raise `ValueError` for values that are out of range or contradict each other."""
    if trial := recipe.build_allocator().trial_pruner:
        registry.build("pruners", trial, {})
    if recipe.scope is not None:
        patterns.parse("unstructured", recipe.scope)
    if recipe.order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {shown(recipe.order)}")
    for key, known in (("sums", SUMS), ("precision", PRECISIONS)):
        if getattr(recipe, key) not in known:
            raise ValueError(f"{key} must be one of {', '.join(known)}, got {shown(getattr(recipe, key))}")
    if not isinstance(recipe.permute, bool):
        raise ValueError(f"permute must be true or false, got {shown(recipe.permute)}")
    if isinstance(recipe.seed, bool) or not isinstance(recipe.seed, int) or not 0 <= recipe.seed < 2**63:
        raise ValueError(f"seed must be a whole number from 0, got {shown(recipe.seed)}")
    _check_rounding(recipe)
    spec = recipe.calibration
    for key, least in (("samples", 1), ("sequence_length", 2)):
        value = getattr(spec, key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"calibration.{key} must be a whole number from {least}, got {shown(value)}")
    for rule in recipe.rules:
        if rule.skip and (rule.sparsity is not None or rule.pattern is not None):
            raise ValueError(f"rule {shown(rule.match)} both skips and sets a sparsity or pattern; keep one")
        if not rule.skip:
            rule_sparsity(recipe, rule)


def _check_rounding(recipe: Recipe) -> None:
    """Raise `ValueError` where something would move weights that are rounded already, or leave some out."""
    on_matrices = [spec for spec, _ in recipe.build_steps()]
    found = [spec for spec in on_matrices if spec.name == ROUNDING]
    if len(found) > 1 or (found and on_matrices[-1] is not found[0]):
        names = ", ".join(update.name for update in recipe.update)
        raise ValueError(f"rounding must be the last update of a matrix, and stand there once, got {names}")
    if found and found[0].targets != ("*",):
        raise ValueError(
            f"rounding is of every pruned matrix, got targets {shown(list(found[0].targets))}; leave them out"
        )
