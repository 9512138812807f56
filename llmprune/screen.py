"""The terminal: the plan before the work, progress while it runs, and the table at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from llmprune.contracts import CalibrationSet
    from llmprune.model.opening import Model
    from llmprune.plan import Plan
    from llmprune.recipe import Recipe


def _table(title: str, head: tuple[str, ...] = ()) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=bool(head),
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for name in head or ("", ""):
        table.add_column(name, overflow="fold")
    return table


def gigabytes(value: int) -> str:
    """Bytes for people."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


class Terminal:
    """A reporter that draws on a console; `close` must be called at the end."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"),
            TimeRemainingColumn(), console=console,
        )  # fmt: skip
        self._task: Any = None

    def plan(self, model: Model, recipe: Recipe, plan: Plan, calibration: CalibrationSet, output: Path) -> None:
        """The plan, before the work."""
        from llmprune.device import describe
        from llmprune.record import calibrated_on

        source = calibrated_on({"source": calibration.source, **calibration.details})
        steps = " + ".join(recipe.methods)
        patterns = sorted({str(m.pattern) for m in plan.matrices.values()})
        tokens = plan.samples * plan.sequence_length
        table = _table("Plan")
        for row in (
            ("model", f"{model.label}, {type(model.skeleton.model).__name__}, {len(model.skeleton.blocks)} blocks"),
            *([("recipe", recipe.chosen)] if recipe.chosen else []),
            ("method", f"{steps} (recipe {recipe.name}), {', '.join(patterns)}, target sparsity {plan.sparsity:.4g}"),
            (
                "matrices",
                f"{len(plan.matrices)} pruned ({plan.weights:,} weights), {len(plan.skipped)} skipped; embeddings and head stay",
            ),
            ("calibration", f"{plan.samples} samples x {plan.sequence_length} = {tokens:,} tokens of {source}"),
            ("device", f"{describe(model.skeleton.device)}, {str(model.skeleton.dtype).removeprefix('torch.')}"),
            ("memory", _memory(plan)),
            ("disk", f"{gigabytes(plan.disk)} in {output}"),
        ):
            table.add_row(*row)
        self.console.print(table)
        for work, needed, remedy in (
            ("pruning", plan.memory, "use fewer --samples, another recipe, or more memory"),
            ("scoring", plan.scoring, "tasks need the whole model, texts one block: leave tasks out, or use prune and score elsewhere"),
        ):
            if needed > plan.available:
                told = f"THIS MAY NOT FIT: {work} needs about {gigabytes(needed)}, {gigabytes(plan.available)} of memory are free; {remedy}"
                self.console.print(told, style="bold", soft_wrap=True)
        if calibration.source == "builtin" and model.label != "demo":
            self.console.print("calibration is Python's own library text; for an English model, --calibration c4 follows the papers")
        self.console.print()

    def stage(self, title: str, steps: int) -> None:
        """A stage of so many steps begins."""
        self._progress.start()
        self._task = self._progress.add_task(title, total=steps)

    def step(self) -> None:
        """One step of the stage is done. A stage that runs several times over (a long text) starts its count again."""
        task = next(t for t in self._progress.tasks if t.id == self._task)
        if task.finished:
            self._progress.reset(self._task)
        self._progress.advance(self._task)

    def note(self, text: str) -> None:
        """Something the user should know, above the bars."""
        self._progress.console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Stop drawing."""
        if self._task is not None:
            self._progress.stop()  # one that never started would still print an empty line


def _memory(plan: Plan) -> str:
    def on_gpu(needed: int | None) -> str:
        return f" ({gigabytes(needed)} on the GPU)" if needed is not None else ""

    where = "in RAM" if plan.offload == "ram" else "in a file beside the output"
    scoring = f", {gigabytes(plan.scoring)} while scoring{on_gpu(plan.device_scoring)}" if plan.scoring else ""
    return (
        f"about {gigabytes(plan.memory)} at the peak of pruning{on_gpu(plan.device_memory)}{scoring}; {gigabytes(plan.available)} free; "
        f"block inputs {where}"
    )


def print_matrices(console: Console, plan: Plan) -> None:
    """Every matrix with its target and the rule that set it (`--dry-run`)."""
    table = _table("Matrices", ("matrix", "shape", "pattern", "sparsity", "set by"))
    for m in plan.matrices.values():
        table.add_row(m.name, f"{m.shape[0]} x {m.shape[1]}", str(m.pattern), f"{m.sparsity:.4g}", m.reason)
    for name in plan.skipped:
        table.add_row(name, "", "", "skipped", "rule")
    console.print(table)


def print_result(console: Console, record: Mapping[str, Any], output: Path) -> None:
    """What the user got, and what to do next."""
    from llmprune.report import HONEST, score_rows

    totals = record["totals"]
    table = _table("Result", ("", "dense", "pruned", ""))
    table.add_row("sparsity", "", f"{totals['sparsity']:.4%}", f"{totals['zeros']:,} of {totals['weights']:,} weights are zero")
    for row in score_rows(dict(record)):
        table.add_row(*row)
    size = totals["bytes"]
    table.add_row("weights on disk", gigabytes(size["dense"]), gigabytes(size["written"]), "")
    seconds = totals["seconds"]
    phases = ", ".join(f"{k} {v:.1f}" for k, v in seconds.items() if k != "total" and v >= 0.05)
    table.add_row("seconds", "", f"{seconds['total']:.1f}", phases)
    private = totals["peak_private_memory_bytes"]
    pruning = f"{gigabytes(private)} while pruning, shared file pages left out" if private else ""
    table.add_row("peak memory", "", gigabytes(totals["peak_memory_bytes"]), pruning)
    table.add_row("output", "", str(output), "open report.html for every matrix")
    console.print()
    console.print(table)
    console.print(f"\n{HONEST}", soft_wrap=True)
    console.print(
        f'Load it: AutoModelForCausalLM.from_pretrained("{output}", dtype="auto")   Recount it: llmprune inspect {output}',
        soft_wrap=True,
    )


def print_scores(console: Console, scores: Mapping[str, Any]) -> None:
    """The scores of one checkpoint."""
    from llmprune.report import direction

    table = _table(f"Scores of {scores['model']}", ("", "", ""))
    for name, entry in scores["perplexity"].items():
        protocol = entry["protocol"]
        note = f"{protocol['windows']} windows of {protocol['window']} tokens, {protocol['dtype']}"
        table.add_row(f"perplexity {name}", f"{entry['value']:.4f}", note)
    for task, metrics in scores["tasks"].items():
        for metric, entry in metrics.items():
            if metric != "protocol":
                stderr = f"+- {entry['stderr']:.4f}, " if entry["stderr"] is not None else ""
                lower = direction(metrics["protocol"], metric).replace(", higher is better", "")
                table.add_row(f"{task} {metric}", f"{entry['value']:.4f}", f"{stderr}{metrics['protocol']['documents']} documents{lower}")
    table.add_row("seconds", f"{scores['seconds']:.1f}", scores["environment"]["device"])
    console.print()
    console.print(table)


def print_counts(console: Console, counts: Mapping[str, Any]) -> None:
    """The recount of a checkpoint."""
    table = _table(f"Recount of {counts['model']}", ("matrix", "shape", "zeros", "sparsity", "patterns"))
    for m in counts["matrices"]:
        table.add_row(m["name"], f"{m['shape'][0]} x {m['shape'][1]}", f"{m['zeros']:,}", f"{m['sparsity']:.4f}", " ".join(m["patterns"]))
    console.print(table)
    verdicts = {None: "no record beside the weights", True: "the record agrees", False: "THE RECORD DISAGREES with this recount"}
    overall = " ".join(counts["patterns"]) or "no N:M pattern holds everywhere"
    total = f"overall {counts['sparsity']:.4%}: {counts['zeros']:,} zeros of {counts['weights']:,} weights"
    console.print(f"\n{total}; {overall}; {verdicts[counts['record_agrees']]}", soft_wrap=True)


def print_pushed(console: Console, pushed: Mapping[str, Any], public: bool) -> None:
    """Where it lies now, and what to do next."""
    visibility = "private" if pushed["private"] else "public"
    state = f"new, {visibility}" if pushed["created"] else f"was there, stays {visibility}"
    table = _table("Pushed")
    table.add_row("repository", f"{pushed['repository']} ({state})")
    table.add_row("url", pushed["url"])
    table.add_row("commit", pushed["commit"])
    table.add_row("files", f"{len(pushed['files'])}, {gigabytes(pushed['bytes'])}")
    if pushed["removed"]:
        table.add_row("removed", f"{', '.join(pushed['removed'])} (weights of an earlier push; its commit still has them)")
    console.print()
    console.print(table)
    at, revision = (f', revision="{pushed["revision"]}"', f" --revision {pushed['revision']}") if pushed["revision"] else ("", "")
    load = f'AutoModelForCausalLM.from_pretrained("{pushed["repository"]}"{at}, dtype="auto")'
    console.print(f"\nLoad it: {load}   Recount it: llmprune inspect {pushed['repository']}{revision}", soft_wrap=True)
    if pushed["private"]:
        settings = f"make it public in its settings: {pushed['url'].partition('/tree/')[0]}/settings"
        kept = "--public changes no repository that is there; " if public else ""
        console.print(f"Only those with access to it see it; {kept}{settings}", soft_wrap=True)
