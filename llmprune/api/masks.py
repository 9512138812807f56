"""The Python functions on keep masks as files: `mask_diff`, `mask_apply` and `mask_check`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llmprune.api.arguments import AnyPath, checked
from llmprune.api.reporting import remark_to, reporting
from llmprune.api.result import Result
from llmprune.checkpoint.contents import MASKS
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.replacement import MODEL, input_files
from llmprune.checkpoint.stored_masks import holds_masks, masks_at
from llmprune.evaluation import audit
from llmprune.hub.download import locate
from llmprune.machine import processes
from llmprune.model.config import check_folder
from llmprune.model.masking import Masking
from llmprune.model.opening import Model, OpenOptions, counting_skeleton, open_model
from llmprune.model.targets import all_targets
from llmprune.run.application import Application
from llmprune.run.preparation import Options
from llmprune.run.reporter import RunReporter


@checked()
def mask_diff(a: AnyPath, b: AnyPath) -> dict[str, Any]:
    """Compare the keep masks of two folders or files, matrix by matrix.

    Args:
        a: an output folder of `prune` or `run_model`, dense or packed, or a file of masks.
        b: the other one.

    Returns:
        A dict with `a` and `b`, `matrices` (per matrix that both have: `name`, `shape`, and the figures that
        follow), and the same over all of them: `weights`, `pruned_a`, `pruned_b`, `both` (pruned in both),
        `agree` (the share of entries that are the same), `overlap` (`both` over the smaller of the pruned
        sets) and `jaccard` (`both` over what is pruned in either). `only_a` and `only_b` name the matrices
        that only one side has.

    Raises:
        ValueError: no masks there, or damaged ones; no matrix in common; one of another shape.
    """
    one, other = (masks_at(Path(path).expanduser()) for path in (a, b))
    return {"a": os.fspath(a), "b": os.fspath(b), **audit.compare_masks(one, other)}


@checked()
def mask_apply(
    path: AnyPath,
    masks: AnyPath,
    output: AnyPath,
    *,
    overwrite: bool = False,
    resume: bool = False,
    restart: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
    dequantize: bool = False,
    reporter: RunReporter | None = None,
    progress: bool | None = None,
) -> Result:
    """Put keep masks onto a checkpoint: weights that they prune become zero, all else stays as it is.

    The checkpoint may be dense, of another dtype than the one the masks were made of, or a fine-tune of it.
    A matrix without a mask stays dense. Onto a packed folder they give a packed one, in which a matrix
    without a mask stays as it is.

    Args:
        path: `demo`, an alias, a hub id or a folder.
        masks: a file of masks, or an output folder, dense or packed.
        output: the folder to write.
        overwrite: replace an output of llmprune in that folder, once the new one is complete.
        resume: continue where an earlier call into this folder stopped.
        restart: throw away what an unfinished call left in this folder.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint.
        blocks: the list of the model's blocks by name; None as for `evaluate`.
        dequantize: read a quantised checkpoint (fp8 or mxfp4) as bfloat16, which is what is saved.
        reporter: an object with `plan`, `stage`, `step` and `note` that is told the progress.
        progress: draw the progress on stderr or in the notebook's cell; None: only in a notebook.

    Returns:
        A `Result` with `output` and `record`, as `prune` does.

    Raises:
        ValueError: masks that do not fit the model, before anything is written.
    """
    given, target = masks_at(Path(masks).expanduser()), Path(output).expanduser()
    with reporting(reporter, progress, processes.ALONE) as report:
        how = OpenOptions(
            revision=revision,
            device="cpu",
            dtype="float32",
            trust_remote_code=trust_remote_code,
            blocks=blocks,
            dequantize=dequantize,
        )
        model = open_model(path, how)
        _check_exact(model, path)
        masking = Masking(given, all_targets(model.skeleton), model.label)
        if masking.dense:
            more = f" and {len(masking.dense) - 3} more" if len(masking.dense) > 3 else ""
            remark_to(report, f"without a mask, so dense as before: {', '.join(masking.dense[:3])}{more}")
        options = Options(
            output=target,
            inputs=input_files([(MODEL, model.folder), ("the masks", given.path)]),
            overwrite=overwrite,
            resume=resume,
            restart=restart,
            packed=isinstance(model.source, Packed),
            trust_remote_code=trust_remote_code,
        )
        application = Application(model, masking, options, report)
        try:
            record = application.apply()
        except BaseException as error:
            application.close(error)
            raise
        application.close(None)
        return Result(target, record)


def _check_exact(model: Model, path: AnyPath) -> None:
    """Raise `ValueError` for rounded values: with fewer of them, they would be rounded anew."""
    if isinstance(model.source, Packed) and model.source.values != "same":
        raise ValueError(
            f"{path} holds values rounded to {model.source.values}, which would be rounded once more; "
            f"make it dense first: llmprune convert {path} --to dense --output DIR"
        )


@checked()
def mask_check(
    path: AnyPath,
    masks: AnyPath | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    blocks: str | None = None,
) -> dict[str, Any]:
    """Count the weights of a checkpoint that masks prune and that are not zero.

    Args:
        path: `demo`, an alias, a hub id or a folder.
        masks: a file of masks, or an output folder, dense or packed; None for the checkpoint's own.
        revision: branch, tag or commit of a model of the hub; None for its default branch.
        trust_remote_code: run Python code of the checkpoint.
        blocks: the list of the model's blocks by name; None as for `evaluate`.

    Returns:
        A dict with `model`, `matrices` (`name`, `shape`, `pruned`, `filled`), `pruned` and `filled` over all
        of them, and `dense`, the names of matrices without a mask.

    Raises:
        ValueError: no masks, or masks that do not fit the model.
    """
    located = locate(os.fspath(path), revision, trust_remote_code, check_folder)
    if masks is None and not holds_masks(located.folder):
        raise ValueError(
            f"{located.label} has no {MASKS} beside its weights; name the masks with --masks FILE"
        )
    given = masks_at(located.folder if masks is None else Path(masks).expanduser())
    skeleton = counting_skeleton(located.folder, trust_remote_code, blocks)
    masking = Masking(given, all_targets(skeleton), located.label)
    counts = audit.filled(skeleton.source, masking)
    skeleton.source.check()
    return {
        "model": located.label,
        "matrices": counts,
        "pruned": sum(count["pruned"] for count in counts),
        "filled": sum(count["filled"] for count in counts),
        "dense": masking.dense,
    }
