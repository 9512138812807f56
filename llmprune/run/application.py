"""Puts given masks onto a checkpoint as they are: no calibration, no forward pass, a block at a time."""

from __future__ import annotations

import time

import torch

from llmprune.checkpoint.masks import pack
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.placement import check_space
from llmprune.checkpoint.reader import read_ahead
from llmprune.checkpoint.shard import Shard
from llmprune.contracts import CalibrationSet
from llmprune.machine import device as devices
from llmprune.machine.processes import ALONE
from llmprune.model.masking import Masking
from llmprune.model.opening import Model
from llmprune.model.target import Target, bits_of
from llmprune.model.targets import targets_of
from llmprune.numerics.counts import zeros_of
from llmprune.patterns import exact_pattern
from llmprune.planning.disk import predict_disk
from llmprune.planning.plan import check_stored_dtype
from llmprune.recipe.given import NAME
from llmprune.recipe.types import AlgorithmSpec, CalibrationSpec, Recipe
from llmprune.record import record as records
from llmprune.record.figures import Record
from llmprune.run.block import Tensors
from llmprune.run.clock import Clock
from llmprune.run.matrix import Row
from llmprune.run.preparation import Options
from llmprune.run.production import Production
from llmprune.run.reporter import RunReporter

_NO_ROWS = CalibrationSet(torch.zeros(0, 0, dtype=torch.int64), "none", 0, "")
_NO_CALIBRATION = CalibrationSpec(source="none", samples=0, sequence_length=0)


class Application(Production):
    """One folder written: a checkpoint with the masks of a file on it."""

    def __init__(self, model: Model, masking: Masking, options: Options, reporter: RunReporter) -> None:
        for target in masking.targets:
            check_stored_dtype(target, model.skeleton)
        self._masking = masking
        super().__init__(model, options, ALONE, reporter)
        self._left = "written"

    def apply(self) -> Record:
        """Write the folder; returns its record."""
        model, masking = self.model, self._masking
        check_space(self.options.output, predict_disk(model, masking.targets))
        before = records.origin(masking.masks)
        before["masks"] |= {"dense": masking.dense} if masking.dense else {}
        recipe = self._recipe()
        before |= records.opening(model, recipe, _NO_ROWS, self._digest(), 1)
        self._packing = self._packer(recipe)
        before |= records.packed_form() if self._packing else {}
        record = self._made_before(before)
        if record is None:
            self._begin(before, masking)
            record = self._write(before)
        self._left = "finished"
        self._complete()
        return record

    def _recipe(self) -> Recipe:
        """What stands in the record for a recipe: the masks in the place of a pruner, and nothing else."""
        masks = self._masking.masks
        held = {str(exact_pattern(self._masking.keep(t.name))) for t in self._masking.targets}
        return Recipe(
            name=NAME,
            description="Given masks, applied as they are.",
            pattern=next(iter(held)) if len(held) == 1 and held != {"None"} else "unstructured",
            sparsity=round(masks.sparsity, 6),
            pruner=AlgorithmSpec(name=NAME),
            calibration=_NO_CALIBRATION,
            masks=masks.digest,
        )

    def _write(self, before: Record) -> Record:
        assert self.writer is not None
        writer, skeleton = self.writer, self.model.skeleton
        done, names = len(writer.finished), list(skeleton.blocks)
        clock = Clock(skeleton.device)
        if done:
            clock.seconds |= writer.journal.blocks[-1]["seconds"]
        self.reporter.stage("masking blocks", len(names))
        for _ in range(done):
            self.reporter.step()
        with devices.PrivateMemory() as memory:
            for number, tensors in enumerate(
                read_ahead(self.model.source, skeleton.block_tensors()[done:]), done
            ):
                clock.lap("read")
                targets = [t for t in targets_of(skeleton, names[number]) if t.name in self._masking]
                masks: Tensors = {}
                rows = [self._masked(target, tensors, masks) for target in targets]
                masks |= self._own(names[number])
                clock.lap("prune")
                shard = {name: t for name, t in tensors.items() if name not in skeleton.shared}
                writer.block(number + 1, Shard(shard, masks, rows), clock.seconds)
                clock.lap("write")
                self.reporter.step()
                del tensors, shard
            return self._finish(before, clock, memory)

    def _own(self, block: str) -> Tensors:
        """The masks of the matrices of a block that are packed and get no other: they stay packed."""
        source = self.model.source
        if not isinstance(source, Packed):
            return {}
        left = (
            target for target in targets_of(self.model.skeleton, block) if target.name not in self._masking
        )
        return {t.key: bits_of(source, t) for t in left if t.tensor in source.layouts}

    def _masked(self, target: Target, tensors: Tensors, masks: Tensors) -> Row:
        """Zero the pruned weights of a matrix in place, and keep its mask; returns its row of the record."""
        started = time.monotonic()
        keep = self._masking.keep(target.name)
        weight = target.oriented(target.part(tensors[target.tensor]))
        weight.masked_fill_(~keep, 0)
        masks[target.key] = pack(keep)
        zeros, size = zeros_of(weight), keep.numel()
        return {
            "name": target.key,
            "shape": list(target.shape),
            "pattern": str(exact_pattern(keep) or "unstructured"),
            "target_sparsity": 1 - int(keep.sum()) / size,
            "sparsity": zeros / size,
            "zeros": zeros,
            "relative_error": None,
            "pruner": NAME,
            "steps": [],
            "seconds": round(time.monotonic() - started, 4),
        }
