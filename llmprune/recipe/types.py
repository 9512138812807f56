"""What a recipe is: frozen dataclasses, as `loading` builds and checks them."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmprune import patterns, registry
from llmprune.common.messages import shown
from llmprune.contracts import Algorithm, Allocator, BlockStep, Pattern, Pruner, Step

DEFAULT_SPARSITY = 0.5


# How input statistics are summed: over all tokens at once; or sequence by sequence as running means in float32, as
# the published code of SparseGPT, Wanda and DSnoT does, whose rounding decides some weights.
SUMS = ("exact", "published")
# What the next block sees of a pruned weight: what the checkpoint will store, or the float32 result before the cast.
PRECISIONS = ("stored", "float32")
UNMENTIONED = {"sums": "exact", "precision": "stored"}  # absent from records where they are as usual


@dataclass(frozen=True, kw_only=True)
class AlgorithmSpec:
    """An algorithm by name, its options, and the matrices it works on (glob patterns on their names)."""

    name: str
    targets: tuple[str, ...] = ("*",)
    options: Mapping[str, Any] = field(default_factory=dict)

    def applies(self, matrix: str) -> bool:
        """Whether the algorithm works on this matrix."""
        return any(fnmatch.fnmatchcase(matrix, target) for target in self.targets)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """For matrices whose name matches: another sparsity, another pattern, or not pruned at all. The first match wins."""

    match: str
    sparsity: float | None = None
    pattern: str | None = None
    skip: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a recipe file sets, by dotted key, where the pattern matches and the sparsity is at least so high, and the reason."""

    pattern: str = "*"
    sparsity: float = 0.0
    set: Mapping[str, Any] = field(default_factory=dict)
    because: str = ""


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """Where calibration rows come from; None and `auto` are resolved against the model.

    `temperature` and `top_p` are of text sampled from the model (source `self`), and None without it.
    """

    source: str = "auto"
    samples: int | None = None
    sequence_length: int | None = None
    temperature: float | None = None
    top_p: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a mask, checked. Build one with `load`."""

    name: str
    description: str = ""
    sparsity: float = DEFAULT_SPARSITY
    pattern: str = "unstructured"
    scope: str | None = None
    pruner: AlgorithmSpec
    refiner: AlgorithmSpec | None = None
    update: tuple[AlgorithmSpec, ...] = ()
    allocator: AlgorithmSpec = AlgorithmSpec(name="uniform")
    rules: tuple[Rule, ...] = ()
    order: str = "block"
    permute: bool = False
    sums: str = "exact"
    precision: str = "stored"
    calibration: CalibrationSpec = CalibrationSpec()
    seed: int = 0
    chosen: str = ""  # why, where the program chose the recipe

    def build_pruner(self) -> Pruner:
        """The pruner with its options."""
        return registry.build("pruners", self.pruner.name, self.pruner.options)  # type: ignore[no-any-return]

    def build_steps(self) -> list[tuple[AlgorithmSpec, Step]]:
        """Refiner and updates of a matrix, in the order they run."""
        return [(spec, step) for spec, step in self._built() if isinstance(step, Step)]

    def build_block_steps(self) -> list[tuple[AlgorithmSpec, BlockStep]]:
        """Updates of a whole block, in the order they run; all of them after those of a matrix."""
        return [(spec, step) for spec, step in self._built() if isinstance(step, BlockStep)]

    def _built(self) -> list[tuple[AlgorithmSpec, Algorithm]]:
        specs = [("refiners", self.refiner)] if self.refiner else []
        return [
            (s, registry.build(room, s.name, s.options))
            for room, s in [*specs, *(("updates", u) for u in self.update)]
        ]

    @property
    def methods(self) -> list[str]:
        """The names of pruner, refiner and updates, in the order they run."""
        return [spec.name for spec in (self.pruner, self.refiner, *self.update) if spec]

    def build_allocator(self) -> Allocator:
        """The allocator with its options."""
        return registry.build("allocators", self.allocator.name, self.allocator.options)  # type: ignore[no-any-return]

    def rule_for(self, matrix: str) -> Rule | None:
        """The first rule that matches a matrix."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(matrix, rule.match)), None)

    @property
    def row_scope(self) -> bool:
        """Whether the weights of a row compete with one another alone."""
        return (self.scope or registry.find("pruners", self.pruner.name).scope) == "row"  # type: ignore[attr-defined]

    def pattern_for(self, rule: Rule | None) -> Pattern:
        """The pattern of a matrix under its rule, compared in the recipe's scope or the pruner's own."""
        scope = self.scope or registry.find("pruners", self.pruner.name).scope  # type: ignore[attr-defined]
        return patterns.parse((rule and rule.pattern) or self.pattern, scope)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as stored in the record and as a recipe file would say it."""
        value = dataclasses.asdict(self)
        for key in ("pruner", "refiner", "allocator"):
            value[key] = value[key] and _flat(value[key])
        value["calibration"] = {
            k: v
            for k, v in value["calibration"].items()
            if v is not None or k not in ("temperature", "top_p")
        }
        value["update"] = [_flat(update) for update in value["update"]]
        value["rules"] = [
            {k: v for k, v in rule.items() if v is not None and v is not False} for rule in value["rules"]
        ]
        for key, usual in UNMENTIONED.items():
            if value[key] == usual:
                del value[key]
        return value


def _flat(spec: dict[str, Any]) -> dict[str, Any]:
    return {"name": spec["name"], "targets": list(spec["targets"]), **spec["options"]}


def resolve_sparsity(pattern: str, sparsity: Any) -> float:
    """The sparsity asked for, or the one an N:M pattern implies; the two may not contradict each other."""
    parsed = patterns.parse(pattern)
    if sparsity is not None and (
        isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 <= sparsity < 1
    ):
        raise ValueError(f"sparsity must be in [0, 1), the share of weights to remove, got {shown(sparsity)}")
    if not isinstance(parsed, patterns.NM):
        return DEFAULT_SPARSITY if sparsity is None else float(sparsity) + 0.0  # minus zero is zero
    if sparsity is not None and abs(sparsity - parsed.sparsity) > 1e-6:
        raise ValueError(
            f"sparsity {sparsity} contradicts pattern {pattern}, which is {parsed.sparsity:g}; leave --sparsity out"
        )
    return parsed.sparsity


def rule_sparsity(recipe: Recipe, rule: Rule) -> float | None:
    """The sparsity a rule sets (its own, or that of its N:M pattern), None where the allocator decides."""
    if rule.pattern is None and rule.sparsity is None:
        return None
    if rule.pattern == "unstructured" and rule.sparsity is None:
        return None
    return resolve_sparsity(rule.pattern or recipe.pattern, rule.sparsity)
