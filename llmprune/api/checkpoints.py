"""The Python functions for finished checkpoints: `evaluate`, `inspect`, `push` and `load`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmprune.api import arguments
from llmprune.api.arguments import AnyPath, checked
from llmprune.api.reporting import remark_to, reporting
from llmprune.checkpoint.contents import CONFIG, RECORD
from llmprune.checkpoint.packed import VALUES, Packed
from llmprune.checkpoint.reader import Checkpoint, read_json, read_record
from llmprune.checkpoint.replacement import input_files
from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.common.messages import shown
from llmprune.evaluation import audit
from llmprune.evaluation.scores import score
from llmprune.hub import upload
from llmprune.hub.download import locate
from llmprune.machine import device as devices
from llmprune.machine import processes
from llmprune.machine.state import libraries
from llmprune.model.classes import CAUSAL, class_of
from llmprune.model.config import check_folder, read_config
from llmprune.model.opening import Model, OpenOptions, open_model, read_folder, recorded_blocks
from llmprune.model.quantised import packing_entry
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import all_targets
from llmprune.model.tokenizer import read_tokenizer
from llmprune.planning import advice
from llmprune.record.card import card_text
from llmprune.record.record import environment
from llmprune.run.repacking import Conversion
from llmprune.run.reporter import RunReporter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = ("dense", "packed")


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
    config = read_config(located.folder, trust_remote_code)
    _, source = read_folder(located.folder)
    named = blocks or recorded_blocks(located.folder)
    skeleton = Skeleton(config, source, torch.float32, torch.device("cpu"), trust_remote_code, named)
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
def convert(
    path: AnyPath,
    *,
    to: str,
    output: AnyPath,
    values: str = "same",
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """Write a checkpoint in another format, block by block, and but for `values` without any loss.

    A conversion that broke off goes on with `resume`.

    Args:
        path: `demo`, an alias, a hub id or a folder: dense or packed, of llmprune or not.
        to: `packed` (of each sparse matrix the kept values and a bit per weight; a matrix that would not
            become smaller stays as it is) or `dense` (what every program loads).
        output: the folder to write.
        values: how kept values are packed: `same` (as they are), or rounded to `int8` or `int4` with a scale
            for every 128 columns of a row.
        overwrite: replace an output of llmprune in that folder, once the new one is complete.
        resume: continue where an earlier conversion into this folder stopped.
        restart: throw away what an unfinished one left in this folder.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint.
        blocks: the list of the model's blocks by name; None as for `evaluate`.
        reporter: an object with `plan`, `stage`, `step` and `note` that is told the progress.
        progress: draw the progress on stderr or in the notebook's cell; None: only in a notebook.

    Returns:
        A dict with `output`, `format`, `bytes` (`dense` and `written`), `matrices` (how many are packed),
        `dense` (the names of those that are not) and `seconds`.

    Raises:
        ValueError: bad input, before any long work; one line says what was received and what to do.
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {shown(to)}")
    if values not in VALUES:
        raise ValueError(f"values must be one of {', '.join(VALUES)}, got {shown(values)}")
    if to == "dense" and values != "same":
        raise ValueError(f"values {values} are for packed folders; leave them out with --to dense")
    how = OpenOptions(
        device="cpu", revision=revision, trust_remote_code=trust_remote_code, blocks=blocks, dtype="float32"
    )
    opened, started = open_model(path, how), time.monotonic()
    if to == "dense" and not isinstance(opened.source, Packed):
        raise ValueError(f"{path} is dense already")
    if to == "packed" and isinstance(opened.source, Packed) and values == opened.source.values:
        raise ValueError(f"{path} is packed with these values already")
    inputs = input_files([("the model", opened.folder)])
    target = Path(output).expanduser()
    writer = CheckpointWriter(target, overwrite=overwrite, resume=resume, restart=restart, inputs=inputs)
    try:
        with reporting(reporter, progress, processes.ALONE) as report:
            record = Conversion(opened, to, values, trust_remote_code).write(writer, report)
        writer.complete()
    finally:
        writer.close()
    return _conversion(target, to, record, time.monotonic() - started)


def _conversion(output: Path, to: str, record: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What `convert` returns of the folder it has written."""
    entry = packing_entry(read_json(output / CONFIG)) or {"matrices": {}}
    names = {row["name"] for row in record["matrices"]}
    stacks = entry.get("stacks", {})
    packed = {n for n in names if n in entry["matrices"] or n.rpartition(".")[0] in stacks}
    return {
        "output": str(output),
        "format": to,
        "bytes": record["totals"]["bytes"],
        "matrices": len(packed),
        "dense": sorted(names - packed),
        "seconds": round(seconds, 3),
    }


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


@checked()
def generate(
    path: AnyPath,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Let a model go on with a text, to try a dense or packed checkpoint out.

    Args:
        path: `demo`, an alias, a hub id or a folder, dense or packed.
        prompt: the text.
        max_new_tokens: at most so many tokens.
        temperature: of sampling; 0 takes the likeliest token each time.
        seed: of sampling.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint.
        stream: called with the text piece by piece, as it comes.

    Returns:
        A dict with `text`, `prompt_tokens`, `tokens`, `first_token_seconds`, `tokens_per_second` (after the
        first token), `load_seconds`, `format`, `kernels` (of packed weights; None for dense ones) and
        `peak_memory_bytes`.

    Raises:
        ValueError: no such model, no tokenizer, or values out of range.
    """
    from llmprune.kernels.library import status
    from llmprune.runtime.generation import Sampling
    from llmprune.runtime.generation import generate as go_on

    sampling = Sampling(tokens=max_new_tokens, temperature=temperature, seed=seed)
    sampling.check()
    located = locate(os.fspath(path), revision, trust_remote_code)
    tokenizer = read_tokenizer(located.folder, trust_remote_code)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer, which text needs; put its files into the folder")
    packed = packing_entry(read_json(located.folder / CONFIG)) is not None
    started = time.monotonic()
    model = load(path, revision=revision, trust_remote_code=trust_remote_code).eval()
    loaded = time.monotonic() - started
    return {
        **go_on(model, tokenizer, prompt, sampling, stream or (lambda text: None)),
        "load_seconds": round(loaded, 3),
        "format": "packed" if packed else "dense",
        "kernels": status() if packed else None,
        "peak_memory_bytes": devices.peak_memory(),
    }
