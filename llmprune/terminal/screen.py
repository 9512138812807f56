"""What a run prints: the plan before the work, progress while it runs, and the result at the end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.common.messages import duration, size_text
from llmprune.machine.interrupts import INTERRUPTS
from llmprune.model.classes import CAUSAL
from llmprune.record.figures import (
    direction,
    score_rows,
    score_table,
    seconds_by_phase,
    size_remark,
    sizes_on_disk,
    sparsity_reached,
    speed_measured,
)
from llmprune.record.recovered import advice, training_rows
from llmprune.terminal.console import Bars, Lines, Screen
from llmprune.terminal.layout import GAP

if TYPE_CHECKING:
    from llmprune.contracts import CalibrationSet
    from llmprune.model.opening import Model
    from llmprune.planning.plan import Plan
    from llmprune.recipe.types import Recipe


class Terminal:
    """A reporter that prints on a console. `close` must be called at the end."""

    def __init__(self, console: Screen) -> None:
        self.console = console
        self._progress = Bars(console) if console.is_terminal or console.is_jupyter else Lines(console)

    def plan(
        self, model: Model, recipe: Recipe, plan: Plan, calibration: CalibrationSet, output: Path
    ) -> None:
        """Print the plan, and warn where it may not fit into memory."""
        self.console.table("Plan", _plan_rows(model, recipe, plan, calibration, output))
        self.console.verbatim()
        less_pruning = "use fewer --samples, another recipe, or more memory"
        less_scoring = (
            "tasks need the whole model, texts one block: leave tasks out, or use prune and score elsewhere"
        )
        self._warn_of_memory("pruning", plan.memory, plan.available, less_pruning)
        self._warn_of_memory("scoring", plan.scoring, plan.available, less_scoring)
        for remark in plan.remarks:
            self.console.say(remark, "bold")
        if plan.remarks:
            self.console.verbatim()

    def _warn_of_memory(self, work: str, needed: int, available: int, remedy: str) -> None:
        if needed > available:
            sizes = f"{size_text(needed)}, {size_text(available)} of memory are free"
            self.console.say(f"THIS MAY NOT FIT: {work} needs about {sizes}; {remedy}", "bold")

    def stage(self, title: str, steps: int) -> None:
        """Begin a stage of `steps` steps."""
        self._progress.stage(title, steps)

    def step(self) -> None:
        """Count a step of the stage as done. A stage repeated for a long text counts from 1 again."""
        INTERRUPTS.check()
        self._progress.step()

    def note(self, text: str) -> None:
        """Print something the user should know, above the bars."""
        self.console.say(text)

    def close(self) -> None:
        """Stop drawing progress."""
        self._progress.close()


def _plan_rows(
    model: Model, recipe: Recipe, plan: Plan, calibration: CalibrationSet, output: Path
) -> list[tuple[str, str]]:
    from llmprune.machine.device import describe
    from llmprune.record.record import calibrated_on

    source = calibrated_on({"source": calibration.source, **calibration.details})
    patterns = sorted({str(m.pattern) for m in plan.matrices.values()})
    tokens = plan.samples * plan.sequence_length
    skeleton = model.skeleton
    method = f"{' + '.join(recipe.methods)} (recipe {recipe.name}), {', '.join(patterns)}"
    pruned = f"{len(plan.matrices)} pruned ({plan.weights:,} weights), {len(plan.skipped)} skipped"
    rows = [
        ("model", f"{model.label}, {type(skeleton.model).__name__}, {len(skeleton.blocks)} blocks"),
        ("recipe", recipe.chosen),
        ("method", f"{method}, target sparsity {plan.sparsity:.4g}"),
        ("matrices", f"{pruned}; embeddings and head stay"),
        ("sparsity", _shares(recipe, plan)),
        *[("stays dense", line) for line in plan.dense],
        ("calibration", f"{plan.samples} samples x {plan.sequence_length} = {tokens:,} tokens of {source}"),
        ("device", f"{describe(skeleton.device)}, {str(skeleton.dtype).removeprefix('torch.')}"),
        ("time", _times(plan)),
        ("memory", _memory(plan)),
        ("disk", f"{size_text(plan.disk)} in {output}"),
    ]
    return [(name, text) for name, text in rows if text]


def _shares(recipe: Recipe, plan: Plan) -> str:
    """How far apart the sparsities are that an allocator gives; empty where it gives one."""
    shares = [m.sparsity for m in plan.matrices.values() if m.reason == recipe.allocator.name]
    if not shares or f"{min(shares):.2f}" == f"{max(shares):.2f}":
        return ""
    return f"{min(shares):.2f} to {max(shares):.2f} by matrix, shared out by {recipe.allocator.name}"


def _times(plan: Plan) -> str:
    """The time that pruning and scoring will take, in words; empty where there is no estimate."""
    if plan.pruning_seconds is None:
        return ""
    times = f"about {duration(plan.pruning_seconds)} of pruning"
    if plan.scoring_seconds is not None:
        times += f", {duration(plan.scoring_seconds)} of scoring (dense and pruned)"
    return f"{times}, by estimate" + ("" if plan.tasks_counted else "; tasks come on top")


def _memory(plan: Plan) -> str:
    """The memory that pruning and scoring will need, in words."""

    def on_gpu(needed: int | None) -> str:
        return f" ({size_text(needed)} on the GPU)" if needed is not None else ""

    needed = f"about {size_text(plan.memory)} at the peak of pruning{on_gpu(plan.device_memory)}"
    if plan.scoring:
        needed += f", {size_text(plan.scoring)} while scoring{on_gpu(plan.device_scoring)}"
    where = "in RAM" if plan.offload == "ram" else "in a file beside the output"
    return f"{needed}; {size_text(plan.available)} free; block inputs {where}"


def print_matrices(console: Screen, plan: Plan) -> None:
    """Print every matrix with its target sparsity and what set it (`--dry-run`)."""
    rows = [
        (m.name, f"{m.shape[0]} x {m.shape[1]}", str(m.pattern), f"{m.sparsity:.4g}", m.reason)
        for m in plan.matrices.values()
    ]
    rows += [(name, "", "", "skipped", "rule") for name in plan.skipped]
    console.table("Matrices", rows, ("matrix", "shape", "pattern", "sparsity", "set by"))


def print_result(console: Screen, record: Mapping[str, Any], output: Path) -> None:
    """Print the scores and totals of a run, and what can be done with its output."""
    console.verbatim()
    console.verbatim("Result", "bold")
    if scores := _scores(record):
        console.table("", *scores)
        console.verbatim()
    console.table("", _totals(record, output))
    console.verbatim()
    if "recovery" in record and (told := advice(record)):
        console.say(told, "bold")
        console.verbatim()
    console.say(size_remark(record))
    console.verbatim()
    folder = shlex.quote(str(output))
    packed, auto_class = "format" in record, record["model"].get("auto_class", CAUSAL)
    loading = f'{auto_class}.from_pretrained({json.dumps(str(output))}, dtype="auto")'
    steps = [
        ("load it", f"{'import llmprune; ' if packed else ''}{loading}"),
        ("recount it", f"llmprune inspect {folder}"),
        ("score it", f"llmprune eval {folder} --perplexity FILE"),
        *([] if packed else [("pack it", f"llmprune convert {folder} --to packed --output {folder}-packed")]),
        ("measure it", f"llmprune bench {folder}"),
        ("share it", f"llmprune push {folder} YOUR-NAME/{shlex.quote(output.resolve().name)}"),
    ]
    next_steps(console, steps)


def _scores(record: Mapping[str, Any]) -> tuple[Sequence[Sequence[str]], tuple[str, ...]] | None:
    """The rows and the head of the table of scores; None for a run without any."""
    if "recovery" in record:
        head, rows = score_table(record)
        return (rows, head) if rows else None
    plain = [row[:6] for row in score_rows(record)]
    return (plain, ("", "dense", "pruned", "", "change", "")) if plain else None


def _totals(record: Mapping[str, Any], output: Path) -> list[tuple[str, str]]:
    totals = record["totals"]
    private = totals["peak_private_memory_bytes"]
    curves = "the curves and " if {"curve", "blocks"} & set(record.get("recovery", {})) else ""
    work = "training" if "recovery" in record else "pruning"
    pruning = f"; {size_text(private)} while {work}, shared file pages left out" if private else ""
    return [
        *(training_rows(record) if "recovery" in record else []),
        ("sparsity", sparsity_reached(record)),
        ("weights on disk", sizes_on_disk(record)),
        *([("speed", said)] if (said := speed_measured(record)) else []),
        ("seconds", seconds_by_phase(record)),
        ("peak memory", f"{size_text(totals['peak_memory_bytes'])}{pruning}"),
        ("output", f"{output} (open report.html for {curves}every matrix)"),
    ]


def next_steps(console: Screen, steps: list[tuple[str, str]]) -> None:
    """Print commands to copy. They are never folded; on a narrow terminal each stands below its label."""
    width = max(len(label) for label, _ in steps)
    beside = not console.folds or width + GAP + max(len(line) for _, line in steps) <= console.width
    for label, line in steps:
        console.verbatim(f"{label:<{width}}  {line}" if beside else f"{label}\n  {line}")


def print_scores(console: Screen, scores: Mapping[str, Any]) -> None:
    """Print the scores of one checkpoint."""
    rows = []
    for name, entry in scores["perplexity"].items():
        protocol = entry["protocol"]
        note = f"{protocol['windows']} windows of {protocol['window']} tokens, {protocol['dtype']}"
        rows.append((f"perplexity {name}", f"{entry['value']:.4f}", note))
    for task, metrics in scores["tasks"].items():
        for metric, entry in metrics.items():
            if metric != "protocol":
                stderr = f"± {entry['stderr']:.4f}, " if entry["stderr"] is not None else ""
                better = direction(metrics["protocol"], metric).replace(", higher is better", "")
                note = f"{stderr}{metrics['protocol']['documents']} documents{better}"
                rows.append((f"{task} {metric}", f"{entry['value']:.4f}", note))
    rows.append(("seconds", f"{scores['seconds']:.1f}", scores["environment"]["device"]))
    console.verbatim()
    console.table(f"Scores of {scores['model']}", rows)


def print_counts(console: Screen, counts: Mapping[str, Any]) -> None:
    """Print the recount of a checkpoint."""
    rows = []
    for m in counts["matrices"]:
        shape = f"{m['shape'][0]} x {m['shape'][1]}"
        rows.append((m["name"], shape, f"{m['zeros']:,}", f"{m['sparsity']:.4f}", " ".join(m["patterns"])))
    console.table(f"Recount of {counts['model']}", rows, ("matrix", "shape", "zeros", "sparsity", "patterns"))
    verdicts = {
        None: "no record beside the weights",
        True: "the record agrees",
        False: "THE RECORD DISAGREES with this recount",
    }
    overall = " ".join(counts["patterns"]) or "no N:M pattern holds everywhere"
    total = f"overall {counts['sparsity']:.4%}: {counts['zeros']:,} zeros of {counts['weights']:,} weights"
    console.verbatim()
    console.say(f"{total}; {overall}; {verdicts[counts['record_agrees']]}")


def print_converted(console: Screen, converted: Mapping[str, Any]) -> None:
    """Print what a conversion has written, and what can be done with it."""
    sizes, left = converted["bytes"], converted["dense"]
    share = sizes["written"] / sizes["dense"]
    rows = [
        ("output", converted["output"]),
        ("format", converted["format"]),
        ("bytes", f"{size_text(sizes['dense'])} dense, {size_text(sizes['written'])} written ({share:.0%})"),
        ("seconds", f"{converted['seconds']:.1f}"),
    ]
    if converted["format"] != "dense":
        count = f"{converted['matrices']} packed"
        rows.insert(2, ("matrices", f"{count}, {len(left)} stay dense: packing would not make them smaller"))
    console.verbatim()
    console.table("Converted", rows)
    console.verbatim()
    folder = shlex.quote(converted["output"])
    steps = [("score it", f"llmprune eval {folder}"), ("measure it", f"llmprune bench {folder}")]
    # `bench` has nothing to compare where no matrix is packed.
    measurable = converted["format"] == "packed" and converted["matrices"]
    next_steps(console, steps if measurable else steps[:1])


def print_generated(console: Screen, generated: Mapping[str, Any]) -> None:
    """Print how fast text came."""
    speed = generated["tokens_per_second"]
    rows = [
        ("new tokens", f"{generated['tokens']} after {generated['prompt_tokens']} of the prompt"),
        ("first token", f"{generated['first_token_seconds']:.3f} s"),
        ("speed", f"{speed:.1f} tokens/s" if speed else "one token says nothing of it"),
        ("loading", f"{generated['load_seconds']:.1f} s, {generated['format']}"),
        ("peak memory", size_text(generated["peak_memory_bytes"])),
    ]
    if generated["kernels"]:
        rows.append(("kernels", generated["kernels"]))
    console.verbatim()
    console.verbatim()
    console.table("Generated", rows)


def print_pushed(console: Screen, pushed: Mapping[str, Any], public: bool) -> None:
    """Print where a pushed folder is now, and what can be done with it. `public`: as the user asked."""
    visibility = "private" if pushed["private"] else "public"
    state = f"new, {visibility}" if pushed["created"] else f"was there, stays {visibility}"
    rows = [
        ("repository", f"{pushed['repository']} ({state})"),
        ("url", pushed["url"]),
        ("commit", pushed["commit"]),
        ("files", f"{len(pushed['files'])}, {size_text(pushed['bytes'])}"),
    ]
    if pushed["removed"]:
        removed = ", ".join(pushed["removed"])
        rows.append(("removed", f"{removed} (weights of an earlier push; its commit still has them)"))
    console.verbatim()
    console.table("Pushed", rows)
    console.verbatim()
    repository, revision = pushed["repository"], pushed["revision"]
    argument = f', revision="{revision}"' if revision else ""
    option = f" --revision {revision}" if revision else ""
    steps = [
        ("load it", f'{pushed["auto_class"]}.from_pretrained("{repository}"{argument}, dtype="auto")'),
        ("recount it", f"llmprune inspect {repository}{option}"),
    ]
    next_steps(console, steps)
    if pushed["private"]:
        settings = f"make it public in its settings: {pushed['url'].partition('/tree/')[0]}/settings"
        kept = "--public changes no repository that is there; " if public else ""
        console.say(f"Only those with access to it see it; {kept}{settings}")
