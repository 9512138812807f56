"""The dataclasses a recipe consists of. `loading` builds them and checks their values."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmprune import patterns, registry
from llmprune.common.messages import shown
from llmprune.contracts import Algorithm, Allocator, BlockStep, Pattern, Pruner, Step
from llmprune.recipe.given import GivenMasks

DEFAULT_SPARSITY = 0.5
ROUNDING = "rounding"  # the update after which kept values are codes of a few bits

# How input statistics are summed: over all tokens at once; or, as the published code of SparseGPT, Wanda and
# DSnoT does, as running means over the sequences in float32, whose rounding decides some weights.
SUMS = ("exact", "published")
# What the next block sees of a pruned weight: what the checkpoint will store, or the float32 result.
PRECISIONS = ("stored", "float32")


@dataclass(frozen=True, kw_only=True)
class AlgorithmSpec:
    """An algorithm with its options.

    Attributes:
        name: the algorithm, by its name in the registry.
        targets: glob patterns; it works on the matrices whose names match one of them.
        options: its options with every default filled in.
    """

    name: str
    targets: tuple[str, ...] = ("*",)
    options: Mapping[str, Any] = field(default_factory=dict)

    def applies(self, matrix: str) -> bool:
        """Whether the algorithm works on the matrix of this name."""
        return any(fnmatch.fnmatchcase(matrix, target) for target in self.targets)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Another sparsity or pattern for the matrices whose names match, or none at all. The first match counts.

    Attributes:
        match: a glob pattern on names of matrices.
        sparsity: their sparsity; None leaves it to the pattern or the allocator.
        pattern: their pattern; None for the recipe's.
        skip: do not prune them.
    """

    match: str
    sparsity: float | None = None
    pattern: str | None = None
    skip: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """Settings that a recipe file makes for certain patterns, sparsities and values only.

    Attributes:
        pattern: a glob pattern that the recipe's `pattern` must match.
        sparsity: the least sparsity for which the case applies.
        values: a glob pattern that the recipe's `values` must match, such as `int4`.
        set: recipe fields by dotted key, with their values.
        because: the reason, shown in the plan.
    """

    pattern: str = "*"
    sparsity: float = 0.0
    values: str = "*"
    set: Mapping[str, Any] = field(default_factory=dict)
    because: str = ""


@dataclass(frozen=True, kw_only=True)
class CalibrationSpec:
    """Where calibration rows come from. The run replaces None and `auto` by values that fit the model.

    Attributes:
        source: a source by name or file, or a mixture of sources.
        samples: rows.
        sequence_length: tokens per row.
        temperature, top_p: how text is sampled from the model (source `self`); None without that source.
        chat_template: `auto` renders chats with the tokenizer's template where it has one, `on` needs one,
            `off` writes them as lines of `role: content`.
    """

    source: str = "auto"
    samples: int | None = None
    sequence_length: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    chat_template: str = "auto"


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """How the matrices of experts are pruned, which see only the tokens routed to their expert.

    Attributes:
        tokens: `routed`, or `all`: statistics as if every token were routed to every expert.
        least: fewer tokens than that are too few for statistics.
        fewer: what then: `magnitude` prunes by magnitude, `all-tokens` takes statistics of all tokens,
            `error` ends the run.
    """

    tokens: str = "routed"
    least: int = 64
    fewer: str = "magnitude"


# Keys of a recipe that are absent from records where they are as usual.
UNMENTIONED = {
    "sums": "exact",
    "precision": "stored",
    "experts": dataclasses.asdict(ExpertsSpec()),
    "masks": "",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the masks. Build one with `loading.load`, which checks every value.

    Attributes:
        name: the name of its file, or its own.
        description: what it is for, in a sentence.
        sparsity: share of weights to remove.
        pattern: `unstructured` or `N:M`.
        scope: the weights whose scores compete with one another, such as `row`; None for the pruner's own.
        pruner, refiner, update, allocator: the algorithms.
        rules: exceptions for some matrices.
        order: when statistics of a block are collected, see `loading.ORDERS`.
        permute: reorder input channels so that an N:M pattern costs less.
        calibration: where calibration rows come from.
        experts: how the matrices of experts are pruned.
        seed: seed of everything random.
        masks: a fingerprint of the masks that take the place of the pruner; empty where it prunes.
        chosen: why, where the program chose the recipe or a case of it.
    """

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
    experts: ExpertsSpec = ExpertsSpec()
    seed: int = 0
    masks: str = ""
    chosen: str = ""

    def build_pruner(self) -> Pruner:
        """The pruner with its options; what stands for it where masks are given."""
        if self.masks:
            return GivenMasks()
        pruner: Pruner = registry.build("pruners", self.pruner.name, self.pruner.options)
        return pruner

    def build_steps(self) -> list[tuple[AlgorithmSpec, Step]]:
        """The refiner and those updates that work on one matrix, in the order they run."""
        return [(spec, step) for spec, step in self._built() if isinstance(step, Step)]

    @property
    def bits(self) -> int | None:
        """Of the codes that kept values are rounded to; None where they are not rounded."""
        found = [update.options["bits"] for update in self.update if update.name == ROUNDING]
        return found[0] if found else None

    def build_block_steps(self) -> list[tuple[AlgorithmSpec, BlockStep]]:
        """The updates that work on a whole block, in the order they run, after all those of its matrices."""
        return [(spec, step) for spec, step in self._built() if isinstance(step, BlockStep)]

    def _built(self) -> list[tuple[AlgorithmSpec, Algorithm]]:
        specs = [("refiners", self.refiner)] if self.refiner else []
        specs += [("updates", update) for update in self.update]
        return [(spec, registry.build(room, spec.name, spec.options)) for room, spec in specs]

    @property
    def methods(self) -> list[str]:
        """Pruner, refiner and updates in words, in the order they run."""
        specs = (self.pruner, self.refiner, *self.update)
        return [method_name(spec.name, spec.options) for spec in specs if spec]

    def build_allocator(self) -> Allocator:
        """The allocator with its options."""
        allocator: Allocator = registry.build("allocators", self.allocator.name, self.allocator.options)
        return allocator

    def rule_for(self, matrix: str) -> Rule | None:
        """The first rule that matches a matrix."""
        return next((rule for rule in self.rules if fnmatch.fnmatchcase(matrix, rule.match)), None)

    @property
    def row_scope(self) -> bool:
        """Whether scores compete within each row (output) only."""
        return self._scope == "row"

    @property
    def _scope(self) -> str:
        """The recipe's scope, else the pruner's own."""
        if self.scope:
            return self.scope
        if self.masks:
            return GivenMasks.scope
        pruner: Any = registry.find("pruners", self.pruner.name)
        return str(pruner.scope)

    def pattern_for(self, rule: Rule | None) -> Pattern:
        """The pattern of a matrix for which this rule holds, None for no rule."""
        return patterns.parse((rule and rule.pattern) or self.pattern, self._scope)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as the record stores them and a recipe file would have them."""
        value = dataclasses.asdict(self)
        for key in ("pruner", "refiner", "allocator"):
            value[key] = value[key] and _flat(value[key])
        for key in ("temperature", "top_p"):
            if value["calibration"][key] is None:
                del value["calibration"][key]
        if value["calibration"]["chat_template"] == "auto":
            del value["calibration"]["chat_template"]
        value["update"] = [_flat(update) for update in value["update"]]
        value["rules"] = [
            {k: v for k, v in rule.items() if v is not None and v is not False} for rule in value["rules"]
        ]
        for key, usual in UNMENTIONED.items():
            if value[key] == usual:
                del value[key]
        return value


def method_name(name: str, options: Mapping[str, Any]) -> str:
    """An algorithm in words: its name, and of rounding the bits."""
    return f"{name} to {options['bits']} bits" if name == ROUNDING else name


def _flat(spec: dict[str, Any]) -> dict[str, Any]:
    return {"name": spec["name"], "targets": list(spec["targets"]), **spec["options"]}


def resolve_sparsity(pattern: str, sparsity: Any) -> float:
    """The sparsity asked for, else that of an N:M pattern, else the default.

    Raises:
        ValueError: a sparsity out of range, or one that contradicts the N:M pattern.
    """
    parsed = patterns.parse(pattern)
    number = isinstance(sparsity, (int, float)) and not isinstance(sparsity, bool)
    if sparsity is not None and not (number and 0 <= sparsity < 1):
        raise ValueError(f"sparsity must be in [0, 1), the share of weights to remove, got {shown(sparsity)}")
    if not isinstance(parsed, patterns.NM):
        return DEFAULT_SPARSITY if sparsity is None else float(sparsity) + 0.0  # + 0.0 makes -0.0 zero
    if sparsity is not None and abs(sparsity - parsed.sparsity) > 1e-6:
        raise ValueError(
            f"sparsity {sparsity} contradicts pattern {pattern}, which is {parsed.sparsity:g}; leave "
            "--sparsity out"
        )
    return parsed.sparsity


def rule_sparsity(recipe: Recipe, rule: Rule) -> float | None:
    """The sparsity that a rule sets, directly or by its N:M pattern; None where the allocator decides it."""
    if rule.pattern is None and rule.sparsity is None:
        return None
    if rule.pattern == "unstructured" and rule.sparsity is None:
        return None
    return resolve_sparsity(rule.pattern or recipe.pattern, rule.sparsity)
