"""Which parts of a recipe of recovery go together: what contradicts or ignores each other is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

from llmprune import registry
from llmprune.recovery.exchange import Exchange
from llmprune.recovery.parts import Trainable
from llmprune.recovery.phases import Numbers
from llmprune.recovery.trainables.kept import Kept


def check(recipe: Any) -> None:
    """Raise `ValueError` for a `RecoveryRecipe` whose parts do not go together."""
    trainable = recipe.trainable_class()
    if recipe.rule is None:
        if recipe.moves:
            raise ValueError(
                f"schedule {recipe.schedule.name} moves masks, so the recipe needs a rule: magnitude"
            )
    elif not recipe.moves:
        raise ValueError(
            f"rule {recipe.rule.name} has nothing to do where masks do not move; "
            "set schedule.moves above 0, or leave out the rule"
        )
    _check_rest(recipe)
    _check_growth(recipe, trainable)
    _check_knowledge(recipe, trainable)
    _check_numbers(recipe, trainable)
    _check_learning(recipe, trainable)
    _check_scope(recipe)


def _check_rest(recipe: Any) -> None:
    """What is said of moves, of growth, of recomputing is for recipes that have them."""
    if not recipe.moves:
        usual: Any = registry.find("recovery.schedules", recipe.schedule.name)
        plain = dataclasses.asdict(usual.Config())
        for key in ("start", "freeze"):
            if recipe.schedule.options[key] != plain[key]:
                raise ValueError(
                    f"schedule.{key} {recipe.schedule.options[key]:g} is of masks that move, and they do "
                    "not; leave it out, or set schedule.moves"
                )
        if recipe.trainable.options.get("grown") == "dense":
            raise ValueError("trainable.grown dense is of weights that grow, and no mask moves; leave it out")
    numbers = recipe.numbers
    if numbers.ramp and not numbers.lam:
        raise ValueError(f"numbers.ramp {numbers.ramp:g} lets lam rise, which is 0; set numbers.lam")
    if numbers.beta_fall != "none" and not numbers.beta:
        raise ValueError(
            f"numbers.beta_fall {numbers.beta_fall} lets beta fall, which is 0; set numbers.beta"
        )
    if recipe.scope == "block" and recipe.recompute != "auto":
        raise ValueError(f"recompute {recipe.recompute} is for scope model, got scope block; leave it out")


def _check_growth(recipe: Any, trainable: type[Trainable]) -> None:
    """Weights are exchanged by a schedule and a rule that both are for that."""
    exchanges = recipe.schedule.name == "exchange" and recipe.moves
    grows = recipe.rule is not None and issubclass(
        registry.find("recovery.rules", recipe.rule.name), Exchange
    )
    if grows and not exchanges:
        raise ValueError(
            f"rule {recipe.rule.name} exchanges weights, got schedule {recipe.schedule.name}; "
            "take schedule exchange"
        )
    if exchanges and not grows:
        raise ValueError(
            f"schedule exchange is for a rule that lets weights grow, got rule {recipe.rule.name}; "
            "take grow-gradient"
        )
    if grows and not issubclass(trainable, Kept):
        raise ValueError(
            f"rule {recipe.rule.name} needs weights that can grow, got trainable {recipe.trainable.name}; "
            "take kept"
        )


def _check_knowledge(recipe: Any, trainable: type[Trainable]) -> None:
    """A rule knows only what the trainable, the optimizer and the scope can tell."""
    if recipe.rule is None:
        return
    rule: Any = registry.find("recovery.rules", recipe.rule.name)
    if "moments" in rule.wants:
        if recipe.optimizer.name != "adamw":
            raise ValueError(
                f"rule {recipe.rule.name} needs the moments of adamw, got optimizer {recipe.optimizer.name}"
            )
        if not issubclass(trainable, Kept) and recipe.trainable.name != "split":
            raise ValueError(
                f"rule {recipe.rule.name} needs the moments of single weights, got trainable "
                f"{recipe.trainable.name}; take kept, dense or split"
            )
    if "inputs" in rule.wants and recipe.scope == "block":
        raise ValueError(
            f"rule {recipe.rule.name} needs the inputs of the whole model, got scope block; take magnitude"
        )


def _check_numbers(recipe: Any, trainable: type[Trainable]) -> None:
    """Numbers are for pruned weights that have values, while masks move."""
    if recipe.numbers == Numbers():
        return
    if not recipe.moves:
        raise ValueError(
            "numbers are for pruned weights while masks move, and with this schedule they do not; "
            "leave out numbers, or set schedule.moves"
        )
    if not issubclass(trainable, Kept):
        raise ValueError(
            f"numbers are for trainable kept or dense, got {recipe.trainable.name}; leave out numbers"
        )
    if recipe.numbers.rho > 0 and recipe.trainable.options["grown"] == "dense":
        raise ValueError(
            f"with numbers.rho {recipe.numbers.rho:g} a weight comes back with what is left of it, got "
            "trainable.grown dense; leave that out"
        )


def _check_learning(recipe: Any, trainable: type[Trainable]) -> None:
    """What learns a mask has the rule that takes it, and steps in which that matters."""
    name, rule = recipe.trainable.name, recipe.rule and recipe.rule.name
    learns = trainable.learned is not Trainable.learned
    if learns and rule != "learned":
        raise ValueError(f"trainable {name} learns its masks, got rule {rule or 'none'}; take rule learned")
    if rule == "learned" and not learns:
        raise ValueError(f"rule learned is for trainables that learn a score, got {name}; take magnitude")
    freeze = recipe.schedule.options["freeze"]
    if name in ("scores", "patterns") and freeze > 0 and recipe.others == "none":
        raise ValueError(
            f"trainable {name} trains nothing while masks are frozen, got schedule.freeze {freeze:g}; "
            "set it to 0, or others: norms"
        )
    if name == "norms" and recipe.others == "none":
        raise ValueError("trainable norms trains nothing with others none; set others: norms")
    if name == "rounded":
        raise ValueError("trainable rounded is for tuning during a run; take kept")
    if recipe.soup.copies * recipe.soup.phases > 1 and recipe.moves:
        raise ValueError(
            f"copies and phases of a soup must keep their masks, and schedule {recipe.schedule.name} moves "
            "them; set soup.copies and soup.phases to 1"
        )


def _check_scope(recipe: Any) -> None:
    """Blocks are trained by themselves against their own outputs."""
    terms = [spec.name for spec, _ in recipe.objective]
    if (recipe.scope == "block") != (terms == ["block"]):
        raise ValueError(
            f"objective block is for scope block, and alone there, got scope {recipe.scope} and {terms}"
        )
    if recipe.scope == "block" and recipe.others != "none":
        raise ValueError(f"scope block trains matrices only, got others {recipe.others}; set others: none")
