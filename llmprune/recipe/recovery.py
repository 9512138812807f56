"""Recipes of `recover`: which parts a method of training with sparsity is put together from, as checked
data.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from llmprune import registry
from llmprune.common.messages import nearest, shown
from llmprune.common.shipped import read_yaml, shipped, shipped_names
from llmprune.recipe import contradictions
from llmprune.recipe.values import group, is_number, listed, number
from llmprune.recovery.method import Method, RateSpec
from llmprune.recovery.optimizer import OptimizerSpec
from llmprune.recovery.phases import Numbers
from llmprune.recovery.task import Term

FOLDER = ("recipes", "recovery")
DEFAULT = "recover-best"
OTHERS = ("none", "norms", "all")
SCOPES = ("model", "block")
_MOST_COPIES = 100
_ROOMS = {"schedule": "schedules", "rule": "rules", "trainable": "trainables"}


@dataclass(frozen=True, kw_only=True)
class PartSpec:
    """A part by its name in the registry, with all its options."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as a recipe file has them."""
        return {"name": self.name, **self.options}


@dataclass(frozen=True, kw_only=True)
class SoupSpec:
    """Sparse Model Soups (arXiv 2306.16788): in each phase some copies are trained and averaged.

    Attributes:
        phases: each prunes an equal share of what is left; the last reaches the final sparsity.
        copies: trained with other seeds. 1 for no soup.
    """

    phases: int = 1
    copies: int = 1

    def __post_init__(self) -> None:
        for name in ("phases", "copies"):
            if not 1 <= getattr(self, name) <= _MOST_COPIES:
                raise ValueError(
                    f"soup.{name} must be from 1 to {_MOST_COPIES}, got {shown(getattr(self, name))}"
                )


@dataclass(frozen=True, kw_only=True)
class RecoveryRecipe:
    """Everything that decides how a sparse model is trained. Build one with `load`, which checks every value.

    Attributes:
        name: of its file, or its own. description: what it is, in a sentence.
        schedule, rule, trainable: parts by name; a rule of None where masks never move.
        objective: the terms of the loss, each with its weight.
        numbers: what pruned weights do, see `recovery.parts`.
        rate, optimizer: how tensors move.
        rates: learning rates to try on `trial` of the steps; the one with the lowest held-out loss is used.
            Empty: that of `rate`.
        others: what else is trained: `none`, `norms` (all vectors of the model) or `all` (embeddings, too).
        scope: whether the whole model is trained at once, or one block after the other.
        batch: sequences per step. clip: the largest norm of all gradients together; 0 for any.
        held_out: the share of the sequences that are not trained on.
        soup: copies that are averaged.
        recompute: whether activations are computed twice to save memory: `auto`, `on` or `off`.
        seed: of everything random.
        chosen: why, where the program has chosen it.
    """

    name: str
    description: str = ""
    schedule: PartSpec
    rule: PartSpec | None = None
    trainable: PartSpec
    objective: tuple[tuple[PartSpec, float], ...]
    numbers: Numbers = field(default_factory=Numbers)
    rate: RateSpec = field(default_factory=RateSpec)
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    rates: tuple[float, ...] = ()
    trial: float = 0.1
    others: str = "none"
    scope: str = "model"
    batch: int = 8
    clip: float = 0.0
    held_out: float = 0.05
    soup: SoupSpec = SoupSpec()
    recompute: str = "auto"
    seed: int = 0
    chosen: str = ""

    @property
    def moves(self) -> bool:
        """Whether masks move."""
        return bool(self.schedule.options["moves"])

    @property
    def prunes(self) -> bool:
        """Whether it can end sparser than it began: masks move, or phases of a soup prune."""
        return self.moves or self.soup.phases > 1

    @property
    def teaches(self) -> bool:
        """Whether a teacher is needed."""
        return any(term.objective.teaches for term in self.terms())

    def terms(self) -> tuple[Term, ...]:
        """The terms of the loss."""
        return tuple(
            Term(registry.build("recovery.objectives", spec.name, spec.options), weight)
            for spec, weight in self.objective
        )

    def trainable_class(self) -> Any:
        """The class of what is trained of a matrix."""
        return registry.find("recovery.trainables", self.trainable.name)

    def method(self, steps: int, rate: float | None = None) -> Method:
        """The method, for so many steps; `rate` in place of the recipe's own."""
        spec = self.rate if rate is None else dataclasses.replace(self.rate, rate=rate)
        rule = self.rule and registry.build("recovery.rules", self.rule.name, self.rule.options)
        return Method(
            schedule=registry.build("recovery.schedules", self.schedule.name, self.schedule.options),
            rule=rule or None,
            numbers=self.numbers,
            terms=self.terms(),
            trainable=functools.partial(
                registry.build, "recovery.trainables", self.trainable.name, self.trainable.options
            ),
            rate=spec,
            optimizer=self.optimizer,
            steps=steps,
            batch=self.batch,
            clip=self.clip,
            seed=self.seed,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as the record stores them and a recipe file would have them."""
        value = dataclasses.asdict(self)
        for key in _ROOMS:
            part = getattr(self, key)
            value[key] = part and part.as_dict()
        value["objective"] = [{**spec.as_dict(), "weight": weight} for spec, weight in self.objective]
        return value


def names() -> list[str]:
    """The names of the shipped recipes of recovery."""
    return shipped_names(*FOLDER)


def load(
    recipe: str | os.PathLike[str] | Mapping[str, Any] = DEFAULT, overrides: Mapping[str, Any] | None = None
) -> RecoveryRecipe:
    """Load a recipe and check all its values.

    Args:
        recipe: the name of a shipped recipe, a YAML file, or a mapping of its fields.
        overrides: values that replace the recipe's, by dotted key, such as `{"rate.rate": 1e-4}`; with a
            rate, no others are tried.

    Raises:
        ValueError: an unknown recipe, key, part or option, or a value out of range.
    """
    if isinstance(recipe, (str, os.PathLike)):
        values, label = _named(os.fspath(recipe))
    elif isinstance(recipe, Mapping):
        values, label = dict(recipe), recipe.get("name") or "custom"
    else:
        raise ValueError(f"a recipe of recovery is a name, a file or a mapping, got {shown(recipe)}")
    overrides = dict(overrides or {})
    named = "rate.rate" in overrides or is_number(overrides.get("rate"))
    if named and "rates" not in overrides:
        values["rates"] = []  # else those of the recipe would be tried in its place
    for key, value in overrides.items():
        _override(values, str(key), value)
    return from_dict({**values, "name": label})


def _named(name: str) -> tuple[dict[str, Any], str]:
    if name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"no such recipe file: {name}")
        return read_yaml(Path(name)), Path(name).stem
    if name in names():
        return read_yaml(shipped(*FOLDER, f"{name}.yaml")), name
    raise nearest("recipe of recovery", name, names())


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a value by dotted key; a part that is only named becomes a mapping, and so does a bare rate."""
    head, dot, rest = key.partition(".")
    if not dot:
        values[head] = None if value == "none" and head == "rule" else value
        return
    inner = values.get(head)
    if head == "rate" and is_number(inner):
        inner = {"rate": inner}
    inner = {"name": inner} if isinstance(inner, str) else {} if inner is None else inner
    if not isinstance(inner, Mapping):
        raise ValueError(
            f"{head} has no keys of its own, got {shown(key)} for {shown(inner)}; set all of {head}"
        )
    values[head] = inner = dict(inner)
    _override(inner, rest, value)


def from_dict(values: Mapping[str, Any]) -> RecoveryRecipe:
    """A recipe from plain values, those of a YAML file or a record, all of them checked."""
    hints = get_type_hints(RecoveryRecipe)
    for key in values:
        if key not in hints:
            raise nearest("key of a recovery recipe", key, hints)
    fields = {key: value for key, value in values.items() if value is not None}
    fields.setdefault("schedule", "fixed")
    for key in ("trainable", "objective"):
        if not fields.get(key):
            raise ValueError(f"a recipe of recovery needs {key}, for example '{key}: {_EXAMPLES[key]}'")
    for key, room in _ROOMS.items():
        if key in fields:
            fields[key] = _part(f"recovery.{room}", fields[key])
    fields["objective"] = _objective(fields["objective"])
    groups = (("numbers", Numbers), ("rate", RateSpec), ("optimizer", OptimizerSpec), ("soup", SoupSpec))
    for key, cls in groups:
        if key in fields:
            given = fields[key]
            fields[key] = group(cls, key, {key: given} if is_number(given) and key == "rate" else given)
    if "rates" in fields:
        fields["rates"] = tuple(number("rates", value) for value in listed("rates", fields["rates"]))
    for key in ("held_out", "trial", "clip"):
        if key in fields:
            fields[key] = number(key, fields[key])
    if isinstance(fields.get("recompute"), bool):  # YAML reads on and off so
        fields["recompute"] = "on" if fields["recompute"] else "off"
    recipe = RecoveryRecipe(**fields)
    _check(recipe)
    contradictions.check(recipe)
    return recipe


_EXAMPLES = {"trainable": "kept", "objective": "next-token"}


def _part(room: str, value: Any) -> PartSpec:
    kind = registry.kind_of(room)
    value = {"name": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        available = ", ".join(registry.names(room))
        raise ValueError(f"{kind} needs a name: one of {available}, got {shown(value)}")
    options = {key: inner for key, inner in value.items() if key != "name"}
    built = registry.build(room, value["name"], options)  # checks the options and fills in the defaults
    return PartSpec(name=value["name"], options=dataclasses.asdict(built.config))


def _objective(value: Any) -> tuple[tuple[PartSpec, float], ...]:
    terms = []
    for term in value if isinstance(value, (list, tuple)) else [value]:
        term = {"name": term} if isinstance(term, str) else term
        if not isinstance(term, dict):
            raise ValueError(f"objective must be names or mappings with name and weight, got {shown(term)}")
        weight = number("the weight of an objective", term.get("weight", 1.0))
        if not weight > 0:
            raise ValueError(f"the weight of an objective must be above 0, got {weight}")
        plain = {key: inner for key, inner in term.items() if key != "weight"}
        terms.append((_part("recovery.objectives", plain), weight))
    return tuple(terms)


def _check(recipe: RecoveryRecipe) -> None:
    """Raise `ValueError` for values that are out of range."""
    if recipe.others not in OTHERS:
        raise ValueError(f"others must be one of {', '.join(OTHERS)}, got {shown(recipe.others)}")
    if recipe.scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)}, got {shown(recipe.scope)}")
    if recipe.recompute not in ("auto", "on", "off"):
        raise ValueError(f"recompute must be auto, on or off, got {shown(recipe.recompute)}")
    for key, least in (("batch", 1), ("seed", 0)):
        value = getattr(recipe, key)
        if type(value) is not int or not least <= value < 2**63:
            raise ValueError(f"{key} must be a whole number from {least}, got {shown(value)}")
    for key in ("held_out", "trial"):
        if not 0 < getattr(recipe, key) < 1:
            raise ValueError(f"{key} must be in (0, 1), got {getattr(recipe, key)}")
    if recipe.clip < 0:
        raise ValueError(f"clip must be at least 0, got {recipe.clip}")
    if not all(0 < rate <= 10 for rate in recipe.rates):
        raise ValueError(f"rates must be above 0 and at most 10, got {list(recipe.rates)}")
    for key in ("name", "description", "chosen"):
        if not isinstance(getattr(recipe, key), str):
            raise ValueError(f"{key} must be text, got {shown(getattr(recipe, key))}")
