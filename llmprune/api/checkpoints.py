"""The Python functions for finished checkpoints: `evaluate`, `inspect`, `push` and `load`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.api import arguments
from llmprune.api.arguments import AnyPath, checked
from llmprune.api.reporting import remark_to, reporting
from llmprune.checkpoint.contents import CONFIG, RECORD
from llmprune.checkpoint.packed_entry import packing_entry
from llmprune.checkpoint.reader import Checkpoint, read_json, read_record
from llmprune.evaluation import audit
from llmprune.evaluation.scores import score
from llmprune.hub import upload
from llmprune.hub.download import locate
from llmprune.machine import device as devices
from llmprune.machine import processes
from llmprune.machine.state import libraries
from llmprune.model.classes import CAUSAL, class_of
from llmprune.model.config import check_folder, read_config
from llmprune.model.opening import Model, OpenOptions, counting_skeleton, open_model
from llmprune.model.quantised import check_loaded
from llmprune.model.targets import all_targets
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
    blocks: str | None = None,
    dequantize: bool = False,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Score a checkpoint, pruned or not, on texts (perplexity) and zero-shot tasks.

    Without `perplexity`, `tasks` and `suite`, the model's default suite is used: `quick` for a model of the
    hub, else `demo`, which needs no network.

    Args:
        path: `demo`, an alias, a hub id, a folder, or a transformers model in memory.
        perplexity: one text, or several: `builtin`, `wikitext2`, `c4`, a hub dataset `owner/name:column`, or
            a `.txt`, `.jsonl` or `.parquet` file.
        tasks: lm-eval tasks: a list of names, or one string with names separated by commas.
        suite: a suite of texts and tasks (`demo`, `quick`, `paper`) or a YAML file, added to the above.
        eval_seqlen: tokens per evaluation window; None for 2048, or the model's limit if that is shorter.
        include_tasks: a folder with lm-eval task files of your own.
        task_data: a folder with the files of the tasks `rte_local` and `blimp_local`.
        limit: at most so many windows per text and documents per task; None for all.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:N` or a torch.device.
        dtype: of the forward passes: `auto`, `float32`, `bfloat16`, `float16` or a torch.dtype. `auto` is the
            checkpoint's own on a GPU; on a CPU bfloat16 if the checkpoint has it and the CPU multiplies it
            fast, else float32.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        tokenizer: a transformers tokenizer; needed for a model in memory, else the checkpoint's own.
        trust_remote_code: run Python code of the checkpoint or of task files.
        blocks: the list of the model's blocks by name, such as `model.layers`; None to find it, or to take
            the one that the run named which made the folder.
        dequantize: read a quantised checkpoint (fp8 or mxfp4) as bfloat16.
        reporter: an object with `plan`, `stage`, `step` and `note` that is told the progress.
        progress: draw the progress on stderr or in the notebook's cell; None: only in a notebook.

    Returns:
        A dict with `model`, `perplexity` (`{TEXT: {"value", "protocol"}}`), `tasks`
        (`{TASK: {METRIC: {"value", "stderr"}, "protocol": ...}}`), `seconds`, `peak_memory_bytes`,
        `peak_private_memory_bytes` and `environment`.

    Raises:
        ValueError: bad input, with one line that says what was received.
    """
    spec = arguments.evaluation(
        perplexity, tasks, suite, eval_seqlen, include_tasks, task_data, limit, trust_remote_code
    )
    team = processes.current()

    def opening() -> Model:
        how = OpenOptions(
            tokenizer=tokenizer,
            revision=revision,
            device=str(device),
            dtype=str(dtype),
            trust_remote_code=trust_remote_code,
            blocks=blocks,
            dequantize=dequantize,
        )
        return open_model(path, how)

    with reporting(reporter, progress, team) as report, devices.PrivateMemory() as memory:
        opened = team.in_turn(opening)
        prepared = team.in_turn(lambda: spec.prepare(opened))
        for remark in advice.on_texts(opened, calibrated=False, evaluation=spec):
            remark_to(report, remark)
        scores = score(opened, prepared, "scoring", report, team)
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
def inspect(
    path: AnyPath,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
) -> dict[str, Any]:
    """Count the zeros and N:M groups in the stored weights, relying on neither the record nor the masks.

    Args:
        path: `demo`, an alias, a hub id or a folder.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint.
        blocks: the list of the model's blocks by name; None as for `evaluate`.

    Returns:
        A dict with `model`, `matrices` (per matrix `name`, `shape`, `zeros`, `sparsity`, `patterns`), the
        totals `weights`, `zeros`, `sparsity` and `patterns`, `bytes`, and `record_agrees`: whether the record
        beside the weights agrees, None where there is none.

    Raises:
        ValueError: no such model, a damaged checkpoint, or a record that is not of this program.
    """
    located = locate(os.fspath(path), revision, trust_remote_code, check_folder)
    skeleton = counting_skeleton(located.folder, trust_remote_code, blocks)
    source = skeleton.source
    counts = audit.recount(source, all_targets(skeleton))
    source.check()
    weights, zeros = sum(count.weights for count in counts), sum(count.zeros for count in counts)
    recorded = (located.folder / RECORD).is_file()
    return {
        "model": located.label,
        "matrices": [_as_dict(count) for count in counts],
        "weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "patterns": audit.patterns(counts),
        "bytes": sum(t.bytes for t in source.tensors.values()),
        "record_agrees": _agrees(read_record(located.folder), counts) if recorded else None,
    }


def _as_dict(count: audit.Count) -> dict[str, Any]:
    return {
        "name": count.name,
        "shape": list(count.shape),
        "zeros": count.zeros,
        "sparsity": count.sparsity,
        "patterns": audit.patterns([count]),
    }


def _agrees(record: dict[str, Any], counts: list[audit.Count]) -> bool:
    """Whether a record names these matrices and the same number of zeros, in each of them and in total."""
    try:
        claimed = {m["name"]: m["sparsity"] for m in record["matrices"]}
        totals = record["totals"]["zeros"], record["totals"]["weights"]
        pruned = [c for c in counts if c.name in claimed]
        counted = sum(c.zeros for c in pruned), sum(c.weights for c in pruned)
        if len(pruned) < len(claimed) or totals != counted:
            return False
        # Shares of zeros that differ by less than half a weight are the same up to rounding.
        return all(abs(claimed.get(c.name, c.sparsity) - c.sparsity) < 0.5 / c.weights for c in counts)
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
    """Upload a finished output folder to the Hugging Face Hub with its model card, in one commit.

    A push that broke off can be repeated: files that the hub already has are not sent again.

    Args:
        folder: the output folder of `prune` or `run_model`.
        repository: `owner/name`; made where it does not exist.
        private: make a new repository private. An existing repository keeps its visibility, and a public one
            is written only with `private=False`.
        revision: the branch to write, made where it does not exist; None for `main`.
        token: a token with write access; None for that of `hf auth login` or `HF_TOKEN`.
        trust_remote_code: run Python code that comes with the folder, which the recount may need.
        reporter: an object with `plan`, `stage`, `step` and `note` that is told the progress.
        progress: draw the progress on stderr or in the notebook's cell; None: only in a notebook.

    Returns:
        A dict with `repository`, `url`, `revision`, `commit`, `created`, `private`, `files` (`name` and
        `bytes` of each), `bytes`, `removed` and `auto_class`, the class of transformers that loads it.

    Raises:
        ValueError: the folder is unfinished, or its recount disagrees with its record (nothing is uploaded),
            or the hub refuses the upload.
    """
    path = Path(folder).expanduser()
    token = upload.check_destination(repository, token)
    files, source = upload.belonging_files(path), Checkpoint(path)
    check_loaded(read_json(path / CONFIG), str(path))
    with reporting(reporter, progress, processes.ALONE) as report:
        report.stage("recounting zeros", 1)
        # Resolved, since a relative path such as "demo" would be taken for the name of a model.
        counts = inspect(path.resolve(), trust_remote_code=trust_remote_code)
        if not counts["record_agrees"]:
            raise ValueError(
                f"llmprune.json in {path} does not fit its weights, so nothing is uploaded; see llmprune "
                f"inspect {path}"
            )
        report.step()
        card = card_text(path, repository, revision)
        destination = upload.Destination(repository, revision, private, token)
        pushed = upload.upload(path, files, card, destination, source.check, report)
    return {**pushed, "auto_class": read_record(path)["model"].get("auto_class", CAUSAL)}


@checked()
def load(
    path: AnyPath,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dequantize: bool = False,
    **options: Any,
) -> Any:
    """Load a checkpoint, dense or packed, as a transformers model, with the weights in their stored dtype.

    Args:
        path: `demo`, an alias, a hub id or a folder.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint.
        dequantize: give a packed folder ordinary layers with dense weights.
        options: passed on to the `from_pretrained` of transformers, such as `device_map` or `dtype`.

    Raises:
        ValueError: no such model, a damaged checkpoint, or one without safetensors.
    """
    import transformers

    located = locate(os.fspath(path), revision, trust_remote_code)
    name, _ = class_of(read_config(located.folder, trust_remote_code), trust_remote_code)
    check_loaded(read_json(located.folder / CONFIG), os.fspath(path))
    source = Checkpoint(located.folder)  # raises for damaged files, and for other formats than safetensors
    chosen = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": trust_remote_code, **options}
    if packing_entry(read_json(located.folder / CONFIG)) is not None:
        from llmprune.runtime.plugin import PackedConfig

        if dequantize:
            chosen["quantization_config"] = PackedConfig(dequantize=True)
    elif dequantize:
        raise ValueError(f"{path} is not packed, so there is nothing to dequantize; leave dequantize out")
    with libraries():
        model = getattr(transformers, name).from_pretrained(located.folder, **chosen)
    source.check()
    return model
