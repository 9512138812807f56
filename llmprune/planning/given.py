"""What a run will do that starts from given masks: their patterns and sparsities, matrix by matrix."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llmprune.checkpoint.masks import KeepMasks
from llmprune.contracts import Pattern
from llmprune.model.masking import Masking
from llmprune.model.opening import Model
from llmprune.model.target import Target
from llmprune.model.targets import all_targets
from llmprune.numerics.counts import true_per_row
from llmprune.patterns import NM, Unstructured, exact_pattern
from llmprune.planning.plan import MatrixPlan
from llmprune.recipe.types import Recipe

REASON = "given masks"


@dataclass(frozen=True)
class Given:
    """KeepMasks that a run starts from.

    Attributes:
        masking: whose masks they are.
        matrices: the plan of the matrices to be pruned, by name.
        remarks: what the user should know before the run begins.
    """

    masking: Masking
    matrices: dict[str, MatrixPlan]
    remarks: tuple[str, ...] = ()


def given(masks: KeepMasks, recipe: Recipe, model: Model) -> Given:
    """The masks of a file as the start of a run.

    Raises:
        ValueError: a matrix that is to be pruned has no mask, or one of another shape or pattern; a mask that
            belongs to no matrix; a recipe that would decide what the masks have decided.
    """
    _check_recipe(recipe)
    targets = all_targets(model.skeleton)
    masking = Masking(masks, targets, model.label)
    planned = [t for t in targets if not ((rule := recipe.rule_for(t.name)) and rule.skip)]
    missing = [t.key for t in planned if t.name not in masking]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(planned)} matrices)" if len(missing) > 1 else ""
        raise ValueError(
            f"{masks.path} has no mask for {missing[0]}{more}; give masks of every matrix, or leave some "
            "dense by rules of the recipe (skip: true)"
        )
    matrices, exact = {}, set()
    for target in planned:
        keep = masking.keep(target.name)
        pattern, sparsity = _pattern(recipe, target, keep, masks)
        matrices[target.name] = MatrixPlan(target.name, target.shape, pattern, sparsity, REASON)
        exact.add(str(exact_pattern(keep)) if pattern.width == 1 else "")
    return Given(masking, matrices, _remarks(recipe, exact))


def _check_recipe(recipe: Recipe) -> None:
    """Raise `ValueError` where a recipe decides sparsities itself, or moves the columns of the masks."""
    if recipe.allocator.name != "uniform":
        raise ValueError(
            f"allocator {recipe.allocator.name!r} decides the sparsity of every matrix, and so do the masks; "
            "leave out one of the two (--allocator uniform)"
        )
    for rule in recipe.rules:
        if rule.sparsity is not None and not isinstance(recipe.pattern_for(rule), NM):
            raise ValueError(
                f"rule {rule.match!r} sets sparsity {rule.sparsity:g}, and the masks have their own; "
                "leave out one of the two"
            )
    if recipe.permute:
        raise ValueError(
            "permute reorders the columns that the masks are of; leave it out (--set permute=false)"
        )


def _pattern(recipe: Recipe, target: Target, keep: Tensor, masks: KeepMasks) -> tuple[Pattern, float]:
    """Pattern and sparsity of a matrix by its mask: those with which `Pattern.check` finds it exact."""
    pattern = recipe.pattern_for(recipe.rule_for(target.name))
    if isinstance(pattern, NM):
        try:
            pattern.check(keep, pattern.sparsity)
        except ValueError as error:
            raise ValueError(
                f"the mask of {target.key} in {masks.path} is not {pattern}: {error}; give masks of that "
                "pattern, or --pattern unstructured"
            ) from None
        return pattern, pattern.sparsity
    rows, columns = keep.shape
    pruned = columns - true_per_row(keep)
    if recipe.row_scope and bool((pruned == pruned[0]).all()):
        return Unstructured("row"), _share(int(pruned[0]), columns)
    return Unstructured("matrix"), _share(int(pruned.sum()), rows * columns)


def _share(count: int, size: int) -> float:
    """The sparsity whose product with a size, rounded down, is a count."""
    share = count / size
    return share if int(size * share) == count else (count + 0.25) / size


def _remarks(recipe: Recipe, exact: set[str]) -> tuple[str, ...]:
    """A remark where all masks hold an N:M pattern that the recipe does not know of, and may move."""
    moving = [spec.name for spec, step in recipe.build_steps() if step.changes == "mask"]
    if not moving or len(exact) > 1 or exact & {"", "None"}:
        return ()
    held = next(iter(exact))
    told = f"the masks hold {held} in every group, which {moving[0]} need not keep; --pattern {held} keeps it"
    return (f"note: {told}",)
