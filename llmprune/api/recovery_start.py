"""What a recovery starts from: masks, their aim and the dense model; and the recipe where none is named."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmprune import patterns
from llmprune.api.arguments import AnyPath
from llmprune.checkpoint.bitmask import Bitmasked
from llmprune.checkpoint.contents import RECORD
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.reader import read_record
from llmprune.checkpoint.stored_masks import holds_masks, masks_at
from llmprune.common.messages import duration, first_line, shown, size_text
from llmprune.contracts import Pattern
from llmprune.hub import aliases
from llmprune.model.masking import Masking
from llmprune.model.opening import Model
from llmprune.model.targets import all_targets
from llmprune.recipe import recovery as recipes
from llmprune.recipe.recovery import RecoveryRecipe
from llmprune.recipe.types import resolve_sparsity
from llmprune.run.lesson import Lesson

# Tried in this order where no recipe is named: the first whose memory fits, and whose teacher is at hand.
CHOICES = (recipes.DEFAULT, "masked-finetuning", "masklora", "ebft", "perp")


def chosen_lesson(
    lesson_of: Callable[[RecoveryRecipe], Lesson],
    overrides: Mapping[str, Any],
    steps: Callable[[Lesson], int],
    limit: float,
) -> Lesson:
    """The lesson with the first recipe of `CHOICES` that can be followed here.

    Args:
        lesson_of: raises `ValueError` where a recipe needs a dense model that is not at hand.
        overrides: fields of the recipe by dotted key.
        steps: how many it would take.
        limit: minutes that it may take, by estimate.

    Raises:
        ValueError: none fits; the message is that of the last, or names the quickest.
    """
    reasons: list[str] = []
    quickest: tuple[float, str] = (math.inf, "")
    for name in CHOICES:
        recipe = recipes.load(name, overrides)
        try:
            lesson = lesson_of(recipe)
        except ValueError as error:
            if name == CHOICES[-1]:
                raise
            reasons.append(str(error))
            continue
        plan = lesson.plan(steps(lesson))
        # Each process times itself, and all must take the same recipe.
        needed, free, seconds = lesson.team.tell((plan.memory, plan.available, plan.seconds))
        if needed > free:
            reasons.append(f"{name} needs {size_text(needed)}, {size_text(free)} are free")
        elif seconds > 60 * limit:
            reasons.append(f"{name} would take about {duration(seconds)} (--time-limit {limit:g})")
            quickest = min(quickest, (seconds, name))
        else:
            why = f"the best that fits here: {reasons[0]}" if reasons else "the usual one, and it fits"
            return dataclasses.replace(lesson, recipe=dataclasses.replace(recipe, chosen=why))
    if not quickest[1]:
        plan.check()
    raise ValueError(
        f"no recipe trains {plan.tokens:,} tokens within time limit {limit:g} here: {quickest[1]}, the "
        f"quickest, would take about {duration(quickest[0])}; give fewer --tokens, or a higher --time-limit"
    )


def masking_of(model: Model, masks: AnyPath | None) -> Masking | None:
    """The masks of the start; None for a dense one."""
    if isinstance(model.source, Packed) and model.source.values != "same":
        raise ValueError(
            f"{model.label} holds values rounded to {model.source.values}, which training would leave; train "
            "before rounding, or make it dense first (llmprune convert --to dense)"
        )
    if masks is not None:
        given, own = masks_at(Path(masks).expanduser()), model.folder
        if own is not None and holds_masks(own) and masks_at(own).digest != given.digest:
            raise ValueError(
                f"{model.label} has masks of its own, and those of {masks} are others; leave them out"
            )
        return Masking(given, all_targets(model.skeleton), model.label)
    if isinstance(model.source, Bitmasked):
        raise ValueError(
            f"{model.label} holds its masks as sparse-bitmask; make them readable here: llmprune convert "
            f"{model.label} --to packed --output DIR (or --to dense)"
        )
    if model.folder is None or not holds_masks(model.folder):
        return None
    return Masking(masks_at(model.folder), all_targets(model.skeleton), model.label)


def check_pruned(model: Model, masking: Masking, masks: AnyPath) -> None:
    """Raise `ValueError` where masks of a file of their own prune weights that are not zero."""
    for target in masking.targets:
        weight = target.oriented(target.part(model.source.load(target.tensor)))
        left = int(((weight != 0) & ~masking.keep(target.name)).sum())
        if left:
            raise ValueError(
                f"{left:,} weights of {target.key} that {masks} prunes are not zero in {model.label}; "
                f"prune them first: llmprune mask apply {model.label} --masks {masks} --output DIR"
            )


def aim_of(
    recipe: RecoveryRecipe, masking: Masking | None, sparsity: Any, pattern: str | None, path: AnyPath
) -> tuple[Pattern, float] | None:
    """The pattern and sparsity to end with; None for those of the start's masks, or for a dense result.

    Raises:
        ValueError: a recipe that cannot reach them.
    """
    if masking is None and sparsity is None and pattern is None:
        raise ValueError(
            f"{path} has no masks, so it is dense; give --sparsity or --pattern to a recipe that prunes as "
            "it trains (gmp, sr-ste, ...), or the masks with --masks FILE; --sparsity 0 trains it dense"
        )
    if sparsity is None and pattern is None:
        return None
    name = pattern or "unstructured"
    wanted = resolve_sparsity(name, sparsity)
    if masking is None and wanted == 0:
        if recipe.prunes:
            raise ValueError(f"recipe {recipe.name} prunes, and sparsity 0 prunes nothing; take another")
        return None
    if not recipe.prunes:
        first = "it keeps the masks of the start" if masking else "first prune the model: llmprune prune"
        raise ValueError(
            f"recipe {recipe.name} moves no mask, got sparsity {wanted:g}, pattern {name}; {first}, or take "
            "a recipe that prunes, such as --recipe gmp"
        )
    if masking is not None and wanted < masking.masks.sparsity - 1e-3:
        given = f"pattern {pattern}, that is sparsity {wanted:g}," if pattern else f"sparsity {wanted:g}"
        raise ValueError(
            f"{path} is {masking.masks.sparsity:.2%} sparse, and {given} is less; leave it out, or train the "
            "dense model"
        )
    found = patterns.parse(name)
    if masking is None and recipe.schedule.name == "exchange":
        raise ValueError(
            f"recipe {recipe.name} exchanges weights of a pruned model, and {path} is dense; "
            "first prune it: llmprune prune"
        )
    return found, wanted


def base_of(
    model: Model, recipe: RecoveryRecipe, masking: Masking | None, teacher: AnyPath | None, opened_at: Any
) -> Model | None:
    """The dense model, where one is needed or named.

    Raises:
        ValueError: it cannot be found, or is of another vocabulary or tokenizer.
    """
    needed = (
        recipe.teaches or recipe.trainable_class().revives or recipe.trainable.options.get("grown") == "dense"
    )
    if teacher is None and masking is None and recipe.scope == "block":
        raise ValueError(
            f"recipe {recipe.name} tunes the blocks of a pruned model towards those of the dense one, and "
            f"{model.label} is dense itself; first prune it: llmprune prune"
        )
    if teacher is None and (masking is None or not needed):
        return None
    own = teacher is None or is_recorded(model, teacher)
    name, revision = _recorded(model) if own else (teacher, None)
    if name is None:
        raise ValueError(
            f"recipe {recipe.name} needs the dense model of {model.label}; name it with --teacher"
        )
    try:
        base: Model = opened_at(name, revision)
    except ValueError as error:
        if teacher is not None:
            raise
        raise ValueError(
            f"recipe {recipe.name} needs the dense model {shown(name)}, which the record names and which "
            f"cannot be opened ({first_line(error)}); name it with --teacher"
        ) from None
    _check_alike(model, base)
    return base


def is_recorded(model: Model, teacher: AnyPath) -> bool:
    """Whether a teacher that was named is the model that the record names, which is then opened in that
    revision.
    """
    named = str(teacher)
    return (aliases.ALIASES[named].repository if named in aliases.ALIASES else named) == _recorded(model)[0]


def _recorded(model: Model) -> tuple[str | None, str | None]:
    """The dense model by name and revision in the record; no name where it was a folder of some machine."""
    folder = model.folder
    if folder is None or not (folder / RECORD).is_file():
        return None, None
    about = read_record(folder).get("model", {})
    name, revision = about.get("source"), about.get("revision")
    local = not isinstance(name, str) or (name != "demo" and "/" not in name and Path(name).exists())
    return (None, None) if local else (name, revision if isinstance(revision, str) else None)


def _check_alike(model: Model, base: Model) -> None:
    """Raise `ValueError` where a teacher has another vocabulary, tokenizer or shape than the start."""
    for what, own, other in (
        ("vocabulary", model.skeleton.vocabulary, base.skeleton.vocabulary),
        ("width", model.skeleton.width, base.skeleton.width),
        ("number of blocks", len(model.skeleton.blocks), len(base.skeleton.blocks)),
    ):
        if own != other:
            raise ValueError(
                f"teacher {base.label} has {what} {other} and {model.label} {own}; name the dense model "
                "it was made of"
            )
    probe = "The quick brown fox, 123 — naïve.\n\tdef f(x): return x"
    if model.tokenizer is not None and base.tokenizer is not None:
        own, other = (m.tokenizer(probe)["input_ids"] for m in (model, base))
        if list(own) != list(other):
            raise ValueError(f"teacher {base.label} has another tokenizer than {model.label}; name another")
