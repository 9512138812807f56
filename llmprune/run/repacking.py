"""A checkpoint in another format: dense, packed or in bitmasks, block by block, resumable like a run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune.checkpoint.bitmask import BITS, FORMATS, WEIGHT
from llmprune.checkpoint.bitmask_packing import BitmaskPacking
from llmprune.checkpoint.contents import CONFIG, INDEX, MASKS, RECORD
from llmprune.checkpoint.journal import Identity
from llmprune.checkpoint.masks import Masks, pack, where_bytes
from llmprune.checkpoint.packed import Packed
from llmprune.checkpoint.packing import Packing
from llmprune.checkpoint.placement import check_space
from llmprune.checkpoint.reader import Checkpoint, read_ahead, read_json, read_record
from llmprune.checkpoint.shard import Packer, Shard
from llmprune.checkpoint.stored_masks import recorded_matrices
from llmprune.checkpoint.writer import CheckpointWriter
from llmprune.common.version import __version__
from llmprune.contracts import VALUES
from llmprune.evaluation.audit import recount
from llmprune.model.masking import Masking
from llmprune.model.opening import Model
from llmprune.model.target import Target, bits_of
from llmprune.model.targets import all_targets, packed_layouts, targets_of
from llmprune.numerics.counts import zeros_of
from llmprune.record import record as records
from llmprune.record import report
from llmprune.record.figures import Record
from llmprune.run.reporter import RunReporter


@dataclass(frozen=True)
class Conversion:
    """A conversion of an opened checkpoint.

    Attributes:
        model: the checkpoint.
        to: `dense`, `packed` or `sparse-bitmask`.
        values: how kept values are packed: `same`, `int8` or `int4`.
        code: whether Python files of the checkpoint are copied.
    """

    model: Model
    to: str
    values: str = "same"
    code: bool = False

    def write(self, writer: CheckpointWriter, reporter: RunReporter) -> Record:
        """Write the converted checkpoint; returns its record, and leaves the writer to be completed."""
        model, started = self.model, time.monotonic()
        skeleton, files = model.skeleton, model.files
        assert files is not None and model.folder is not None
        targets = all_targets(skeleton)
        given = self._masks(targets)
        shapes = self._shapes(targets, given)
        if isinstance(packer := self._packer(targets), BitmaskPacking):
            self._check_sparse(packer)
        check_space(writer.output, sum(t.bytes for t in model.source.tensors.values()))
        shards = len(skeleton.blocks) + 1
        writer.begin(
            self._identity(), shards, shapes, files.companions(self.code), packing=self._packer(targets)
        )
        done = len(writer.finished)
        reporter.stage(f"writing blocks, {self.to}", shards)
        for _ in range(done):
            reporter.step()
        groups = skeleton.block_tensors()[done:]
        for number, tensors in enumerate(read_ahead(model.source, groups), start=done):
            block = list(skeleton.blocks)[number]
            found = dict(self._rows(block, tensors, given))
            # Packed, also what was not pruned may become smaller.
            masks = {n: bits for n, (bits, _) in found.items() if self.to == "packed" or n in shapes}
            own = {name: tensor for name, tensor in tensors.items() if name not in skeleton.shared}
            writer.block(number + 1, Shard(own, masks, [row for _, row in found.values()]), {})
            reporter.step()
        writer.rest(model.source, self._inside())
        writer.copy_companions(files, self.code)
        model.check()
        writer.index()
        reporter.step()
        self._tell_signs(writer, reporter)
        record = self._record(writer, self._stored(writer), time.monotonic() - started)
        self._write_pages(writer, record)
        writer.finish()
        return record

    def _packer(self, targets: list[Target]) -> Packer | None:
        """What packs the tensors; None for a dense result."""
        if self.to == "packed":
            return Packing(packed_layouts(self.model.skeleton), VALUES[self.values])
        names = (t.tensor for t in targets if t.index is None and t.tensor.endswith(WEIGHT))
        return BitmaskPacking(names) if self.to == FORMATS[0] else None

    def _check_sparse(self, packer: BitmaskPacking) -> None:
        """Raise `ValueError` where not one matrix becomes smaller; most often the first one does."""
        load = self.model.source.load
        if not any(name not in packer.parts({name: load(name)}, {}, {}) for name in packer.names):
            raise ValueError(
                f"no matrix of {self.model.label} would be smaller in {FORMATS[0]}, since it is not sparse; "
                "prune it first: llmprune prune"
            )

    def _masks(self, targets: list[Target]) -> Masking | None:
        """The keep masks beside a dense checkpoint; None where it has none.

        Raises:
            ValueError: they are of other matrices.
        """
        assert self.model.folder is not None
        path = self.model.folder / MASKS
        if not isinstance(self.model.source, Checkpoint) or not path.is_file():
            return None
        return Masking(Masks(path), targets, self.model.label)

    def _shapes(self, targets: list[Target], given: Masking | None) -> dict[str, tuple[int, int]]:
        """The matrices that have a mask in a dense result: those of the masks or the record of the source.

        Without both it is every matrix.
        """
        assert self.model.folder is not None
        named = {t.key for t in targets if given is None or t.name in given}
        if given is None and (recorded := recorded_matrices(self.model.folder)) is not None:
            named = set(recorded)
        return {t.key: t.shape for t in targets if t.key in named}

    def _rows(
        self, block: str, tensors: Mapping[str, Tensor], given: Masking | None
    ) -> Iterator[tuple[str, tuple[Tensor, Record]]]:
        """For each matrix of a block its mask as bits, uint8 [R, ceil(C / 8)], and its row of the record."""
        source = self.model.source
        for target in targets_of(self.model.skeleton, block):
            weight = target.oriented(target.part(tensors[target.tensor])).contiguous()
            rows, columns = weight.shape
            if isinstance(source, Packed) and target.tensor in source.layouts:
                bits = bits_of(source, target)
            else:
                # A weight that is kept may be zero, and one that is pruned may have been filled since.
                # Without masks the bytes count.
                known = given is not None and target.name in given
                keep = given.keep(target.name) | (weight != 0) if given and known else self._found(weight)
                bits = pack(keep)
            zeros = zeros_of(weight)
            row = {
                "name": target.key,
                "shape": [rows, columns],
                "sparsity": zeros / weight.numel(),
                "zeros": zeros,
            }
            if self.to == FORMATS[0]:
                row["signs"] = int((where_bytes(weight) & (weight == 0)).sum())
            yield target.key, (bits, row)

    def _found(self, weight: Tensor) -> Tensor:
        """What is kept where no mask says it, bool [R, C]: what is not zero; all where that is smaller."""
        keep, bits = where_bytes(weight), VALUES[self.values]
        if self.to == "packed" and bits < 16 and bits * int((~keep).sum()) <= keep.numel():
            return torch.ones_like(keep)  # a zero costs as much as any value, a mask one bit per weight
        return keep

    @staticmethod
    def _tell_signs(writer: CheckpointWriter, reporter: RunReporter) -> None:
        """Tell the user how many weights have lost the sign of their zero, which the bitmasks do not keep."""
        written = read_json(writer.folder / INDEX)["weight_map"]
        rows = (row for row in writer.rows if row["name"].removesuffix(WEIGHT) + BITS in written)
        if lost := sum(row.get("signs", 0) for row in rows):
            reporter.note(f"{lost:,} weights were -0.0 and are 0.0 now: {FORMATS[0]} keeps no sign of zeros")

    def _inside(self) -> set[str]:
        """The names of the tensors that are written with a block."""
        skeleton = self.model.skeleton
        return {name for group in skeleton.block_tensors() for name in group} - skeleton.shared

    def _identity(self) -> Identity:
        """What two conversions must have in common to be continued by one another."""
        folder = self.model.folder
        assert folder is not None
        files = {path.name: path.stat() for path in sorted(folder.glob("*.safetensors"))}
        return {
            "convert": [self.to, self.values],
            "files": {name: [found.st_size, found.st_mtime_ns] for name, found in files.items()},
            "version": __version__,
        }

    def _stored(self, writer: CheckpointWriter) -> list[Record]:
        """The rows of the record: where values were rounded, with the zeros that this has made."""
        rows = writer.rows
        if self.values == "same":
            return rows
        source = Packed(Checkpoint(writer.folder), read_json(writer.folder / CONFIG)["quantization_config"])
        counts = {count.name: count for count in recount(source, all_targets(self.model.skeleton))}
        return [
            {**row, "sparsity": counts[row["name"]].sparsity, "zeros": counts[row["name"]].zeros}
            for row in rows
        ]

    def _record(self, writer: CheckpointWriter, rows: list[Record], seconds: float) -> Record:
        """The record of the source in its new format; a short one where the source has none."""
        folder = self.model.folder
        assert folder is not None
        known = read_record(folder) if (folder / RECORD).is_file() else None
        forms = {"packed": records.packed_form(self.values), "dense": {}}
        form = forms.get(self.to, {"format": {"name": self.to}})
        record = records.converted(known, self.model, writer, form, seconds)
        return records.with_rows(record, rows) if self.values != "same" else record

    @staticmethod
    def _write_pages(writer: CheckpointWriter, record: Record) -> None:
        if "recipe" in record:
            report.write(writer.folder, record, writer.output.name)
        else:
            report.write_record(writer.folder, record)
