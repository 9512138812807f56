"""What the record of a run says of size and speed: measured on the weights it has written."""

from __future__ import annotations

import time
from pathlib import Path

from llmprune.checkpoint.contents import MASKS
from llmprune.checkpoint.masks import Masks
from llmprune.machine.processor import cache_bytes, processor_name
from llmprune.model.opening import read_folder
from llmprune.model.skeleton import Skeleton
from llmprune.model.targets import packed_layouts
from llmprune.record import record as records
from llmprune.record.figures import Record
from llmprune.run.reporter import RunReporter
from llmprune.runtime import glance
from llmprune.runtime.bench import Matrices


def measured(record: Record, folder: Path, skeleton: Skeleton, reporter: RunReporter) -> Record:
    """The record with the size that the weights have packed, and the speed of products with them.

    Args:
        record: of a run whose weights and masks are written.
        folder: where they are.
        skeleton: of the model.
    """
    started, totals = time.monotonic(), record["totals"]
    _, source = read_folder(folder)
    if "format" in record:
        packed = totals["bytes"]["written"]
    else:
        packed = glance.packed_bytes(source, packed_layouts(skeleton), Masks(folder / MASKS))
    matrices = Matrices(skeleton, source)
    small = glance.too_small(matrices)
    if small:
        speed: Record = {"small": small}
    else:
        reporter.stage("measuring products", 1)
        # Far below what pruning took, so that the peak of the memory stays that of pruning.
        speed = glance.speed(matrices, cache_bytes(), totals["peak_memory_bytes"] // 4)
        reporter.step()
    totals = totals | {"bytes": totals["bytes"] | {"packed": packed}}
    if not speed.get("tokens"):
        return record | {"totals": totals} | ({"speed": speed} if speed else {})
    seconds, taken = totals["seconds"], round(time.monotonic() - started, 3)
    totals["seconds"] = seconds | {"measure": taken, "total": round(seconds["total"] + taken, 3)}
    about = {"processor": processor_name(), "values": records.values_of(record)}
    return record | {"totals": totals, "speed": about | speed}
