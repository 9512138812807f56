"""The Python functions that take a finished checkpoint: score it, recount it, publish it, load it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.api import arguments
from llmprune.api.arguments import AnyPath, checked
from llmprune.api.reporting import remark_to, telling
from llmprune.checkpoint.contents import RECORD
from llmprune.checkpoint.reader import Checkpoint, read_record
from llmprune.evaluation import audit
from llmprune.evaluation.scores import evaluation_spec, score
from llmprune.hub import upload
from llmprune.hub.download import locate
from llmprune.machine import device as devices
from llmprune.machine import processes
from llmprune.machine.state import libraries
from llmprune.model.opening import open_model
from llmprune.model.skeleton import Skeleton, read_config
from llmprune.model.targets import find_targets
from llmprune.planning import advice
from llmprune.record.card import card_text
from llmprune.record.record import environment
from llmprune.run.reporter import RunReporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@checked(path=arguments.any_model)
def evaluate(
    path: AnyPath | PreTrainedModel,
    *,
    perplexity: AnyPath | Sequence[AnyPath] = (),
    tasks: str | Sequence[str] = (),
    suite: AnyPath | None = None,
    eval_seqlen: int | None = None,
    include_tasks: AnyPath | None = None,
    task_data: AnyPath | None = None,
    limit: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Score any checkpoint: `{"model", "perplexity": {NAME: {"value", "protocol"}}, "tasks": {NAME: {METRIC: {"value", "stderr"}}}, ...}`.

    Without texts, tasks or suite, the model's default suite: `quick` for a hub model, else `demo`, which needs no network.
    A model in memory is scored too; its texts need a `tokenizer`.
    """
    given: tuple[Any, ...] = (perplexity, tasks, suite, eval_seqlen, include_tasks, task_data, limit)
    spec = evaluation_spec(*given, trust_remote_code=trust_remote_code)
    team = processes.current()
    with telling(reporter, progress, team) as told, devices.PrivateMemory() as memory:
        opened = team.in_turn(
            lambda: open_model(
                path,
                tokenizer=tokenizer,
                revision=revision,
                device=str(device),
                dtype=str(dtype),
                trust_remote_code=trust_remote_code,
            )
        )
        prepared = team.in_turn(lambda: spec.prepare(opened))
        for remark in advice.on_texts(opened, calibrated=False, evaluation=spec):
            remark_to(told, remark)
        scores = score(opened, prepared, "scoring", told, team)
    return {
        "model": opened.label,
        "perplexity": scores.perplexity,
        "tasks": scores.tasks,
        "seconds": round(scores.seconds, 3),
        "peak_memory_bytes": devices.peak_memory(),
        "peak_private_memory_bytes": memory.peak,
        "environment": environment(opened.skeleton.device, opened.skeleton.dtype, team.size),
    }


@checked()
def inspect(path: AnyPath, *, revision: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Recount zeros and N:M groups from disk, per matrix and overall; says whether a record beside them agrees."""
    located = locate(os.fspath(path), revision, trust_remote_code)
    source = Checkpoint(located.folder)
    skeleton = Skeleton(
        read_config(located.folder, trust_remote_code),
        source,
        torch.float32,
        torch.device("cpu"),
        trust_remote_code,
    )
    targets = [t for name, block in skeleton.blocks.items() for t in find_targets(name, block)]
    stored = {skeleton.stored[t.weight_name]: t for t in targets}
    counts = audit.recount(source, frozenset(n for n, t in stored.items() if t.transposed), list(stored))
    source.check()
    weights, zeros = sum(c.shape[0] * c.shape[1] for c in counts), sum(c.zeros for c in counts)
    summary: dict[str, Any] = {
        "model": located.label,
        "matrices": [
            {
                "name": c.name,
                "shape": list(c.shape),
                "zeros": c.zeros,
                "sparsity": c.sparsity,
                "patterns": audit.patterns([c]),
            }
            for c in counts
        ],
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "patterns": audit.patterns(counts),
        "bytes": sum(t.bytes for t in source.tensors.values()),
        "record_agrees": None,
    }
    if (located.folder / RECORD).is_file():
        summary["record_agrees"] = _agrees(read_record(located.folder), counts)
    return summary


def _agrees(record: dict[str, Any], counts: list[audit.Count]) -> bool:
    try:
        claimed = {m["name"]: m["sparsity"] for m in record["matrices"]}
        totals = record["totals"]["zeros"], record["totals"]["weights"]
        pruned = [c for c in counts if c.name in claimed]
        if len(pruned) < len(claimed) or totals != (
            sum(c.zeros for c in pruned),
            sum(c.shape[0] * c.shape[1] for c in pruned),
        ):
            return False
        return all(
            abs(claimed.get(c.name, c.sparsity) - c.sparsity) < 0.5 / (c.shape[0] * c.shape[1])
            for c in counts
        )
    except (LookupError, TypeError, AttributeError, OverflowError):
        raise ValueError(
            "llmprune.json is not a record of this program; remove it or restore the original"
        ) from None


@checked()
def push(
    folder: AnyPath,
    repository: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Upload a finished folder to the hub with its model card, in one commit; a push that broke off goes on where it stopped.

    Args:
        repository: `owner/name`, made where it is not there. private: of a new repository; one that is there stays as it is.
        revision: a branch, made where it is not there; `main` by default. token: else that of `hf auth login` or `HF_TOKEN`.
        progress: draw progress; None: in a notebook. reporter: told instead.

    Returns:
        `repository`, `url`, `revision`, `commit`, `created`, `private`, `files [{name, bytes}]`, `bytes`, `removed`.

    Raises:
        ValueError: an unfinished folder, one whose recount disagrees with its record (nothing is uploaded), or what the hub refuses.
    """
    path = Path(folder).expanduser()
    token = upload.check_destination(repository, token)
    files, source = upload.belonging_files(path), Checkpoint(path)
    with telling(reporter, progress, processes.ALONE) as told:
        told.stage("recounting zeros", 1)
        counts = inspect(
            path.resolve(), trust_remote_code=trust_remote_code
        )  # a name such as "demo" is a folder here
        if not counts["record_agrees"]:
            raise ValueError(
                f"llmprune.json in {path} does not fit its weights, so nothing is uploaded; see llmprune inspect {path}"
            )
        told.step()
        card = card_text(path, repository, revision)
        destination = upload.Destination(repository, revision, private, token)
        return upload.upload(path, files, card, destination, source.check, told)


@checked()
def load(
    path: AnyPath, *, revision: str | None = None, trust_remote_code: bool = False, **options: Any
) -> Any:
    """A transformers model from a finished folder, weights in their stored dtype; `options` go to `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    located = locate(os.fspath(path), revision, trust_remote_code)
    source = Checkpoint(located.folder)  # refuses what is damaged or not safetensors
    chosen = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": trust_remote_code, **options}
    with libraries():
        model = AutoModelForCausalLM.from_pretrained(located.folder, **chosen)
    source.check()
    return model
