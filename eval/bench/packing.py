"""How fast a matrix is packed and unpacked, in dense bytes per second, beside a copy: `packing.py`.

The figure of a copy is that of the same dense bytes, written to memory that exists.
"""

import argparse
import json
import statistics
import time

import torch

from llmprune.checkpoint.packed_tensor import Layout, pack, unpack
from llmprune.kernels.layout import bits_of
from llmprune.kernels.library import status


def seconds(work, repeats):
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=11008)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    shape, found = (arguments.rows, arguments.columns), []
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(shape, generator=generator).to(dtype)
        target = torch.empty_like(weight)
        copied = seconds(lambda: target.copy_(weight), arguments.repeats)  # noqa: B023
        for sparsity in arguments.sparsities:
            keep = torch.rand(shape, generator=generator) >= sparsity
            dense = weight * keep
            mask, layout = bits_of(keep), Layout(*shape, dtype)
            parts = pack(dense, mask, layout)
            assert torch.equal(unpack(parts, layout, "x"), dense)
            row = {"dtype": str(dtype).removeprefix("torch."), "sparsity": sparsity}
            row["bytes_per_weight"] = sum(t.nbytes for t in parts.values()) / weight.numel()
            for name, took in (
                ("pack", seconds(lambda: pack(dense, mask, layout), arguments.repeats)),  # noqa: B023
                ("unpack", seconds(lambda: unpack(parts, layout, "x"), arguments.repeats)),  # noqa: B023
                ("copy", copied),
            ):
                row[name] = dense.nbytes / took / 1e9
            found.append(row)
    if arguments.json:
        print(json.dumps(found))
        return
    print(f"{shape[0]} x {shape[1]}, {torch.get_num_threads()} threads, {status()}\n")
    print("| values | sparsity | bytes per weight | pack GB/s | unpack GB/s | copy GB/s |")
    print("|---|---|---|---|---|---|")
    for row in found:
        rates = " | ".join(f"{row[name]:.2f}" for name in ("pack", "unpack", "copy"))
        print(f"| {row['dtype']} | {row['sparsity']:.0%} | {row['bytes_per_weight']:.3f} | {rates} |")


if __name__ == "__main__":
    main()
