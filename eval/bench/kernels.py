"""The native products with packed weights against torch's dense ones: bf16, int8 and int4.

`kernels.py [--shapes 4096x11008] [--sparsities 0.5,0.7,0.8,2:4] [--rows 1]` prints a table per shape and
number of rows of x; sparsity 0 is a full matrix without a mask. Ours are called as a layer of a loaded model
calls them, torch's by their operator. All are measured in turns of changing order in one run, each over at
least four matrices that fill CACHE bytes more than twice: what a call reads was last read several turns of
all contestants ago. Times are medians. A copy is measured on its own, since it leaves caches full of what is
still to be written; its bandwidth counts what it reads and what it writes.
"""

import argparse
import itertools
import json
import random
import statistics
import time

import torch

from llmprune.kernels import library, packing, products

CACHE = 32 << 20  # bytes of the last-level cache
ERROR_ROWS = 256  # compared with float64
COPY = "copy"


def sparse(weight, amount):
    """bool: what is kept, by chance, of every row, or 2 of 4."""
    noise = torch.rand(weight.shape)
    if amount == "2:4":
        order = noise.view(len(noise), -1, 4).argsort(dim=-1)
        return (order < 2).view(weight.shape)
    return noise >= float(amount)


def quantised(weight, bits):
    """q int8 and its scale per 128 columns, symmetric."""
    most = 2 ** (bits - 1) - 1
    groups = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % 128)).unflatten(1, (-1, 128))
    scale = (groups.abs().amax(-1) / most).clamp(min=1e-8).bfloat16()
    q = (groups / scale.float()[..., None]).round().clamp(-most - 1, most).to(torch.int8)
    return q.flatten(1)[:, : weight.shape[1]].contiguous(), scale


def packed(weight, keep, bits):
    """A packed matrix and the dense one that it stands for, in float64, of its first rows."""
    mask, shape = packing.bits_of(keep), tuple(weight.shape)
    rows = packing.row_sums(mask, shape[1])
    if bits == 16:
        made = products.checked(packing.compress(weight, mask), mask, rows, None, shape, bits)
        return made, (weight * keep)[:ERROR_ROWS].double()
    q, scale = quantised(weight * keep, bits)
    values = packing.compress(q, mask)
    values = packing.pack_nibbles(values, mask, shape[1]) if bits == 4 else values
    dense = (q * keep)[:ERROR_ROWS].double()
    dense *= scale[:ERROR_ROWS].double().repeat_interleave(128, 1)[:, : shape[1]]
    if keep.all():
        mask = rows = None
    return products.checked(values, mask, rows, scale, shape, bits), dense


def size_of(parts):
    return sum(p.numel() * p.element_size() for p in parts if isinstance(p, torch.Tensor))


def rotated(make_call, parts):
    """A function that calls over copies of `parts`, filling the cache more than twice, and its bytes."""
    size = size_of(parts)
    copies = [
        tuple(p.clone() if isinstance(p, torch.Tensor) else p for p in parts) for _ in range(copies_of(size))
    ]
    turn = itertools.cycle(copies)
    return lambda: make_call(*next(turn)), size


def copies_of(size):
    return max(4, 1 + 2 * CACHE // max(1, size))


def rotated_packed(x, made, exact):
    """The same of a packed matrix, called as a layer calls it; the exact way by its operator."""
    if exact:
        return rotated(lambda *p: products.packed_linear(x, *p, exact=True), made)
    copies, size = [], size_of(made)
    for _ in range(copies_of(size)):
        parts = [p.clone() if isinstance(p, torch.Tensor) else p for p in made]
        copies.append(products.Prepared([products.Packed(*parts)]))
    turn = itertools.cycle(copies)
    return lambda: next(turn)(x)[0], size


def dense_opponents(weight, x):
    """torch's own dense products, by name."""
    yield "torch bf16", rotated(lambda w: torch.nn.functional.linear(x, w), (weight,))
    q, _ = quantised(weight, 8)
    row_scale = (weight.float().abs().amax(1) / 127).bfloat16()
    yield "torch int8", rotated(lambda w, s: torch._weight_int8pack_mm(x, w, s), (q, row_scale))
    q, scale = quantised(weight, 4)
    if weight.shape[1] % 128 == 0 and weight.shape[0] % 64 == 0:
        nibbles = torch.ops.aten._convert_weight_to_int4pack_for_cpu((q + 8).int(), 2)
        zeros = torch.stack((scale.t(), torch.zeros_like(scale.t())), dim=-1).contiguous()
        call = torch.ops.aten._weight_int4pack_mm_for_cpu
        yield "torch int4", rotated(lambda w, s: call(x, w, 128, s), (nibbles, zeros))
    source, target = torch.ones(64 << 20, dtype=torch.int32), torch.empty(64 << 20, dtype=torch.int32)
    yield COPY, (lambda: target.copy_(source), 2 * size_of((source,)))


def contestants(weight, x, arguments):
    """name -> (function, bytes it reads), and name -> relative error against float64."""
    named, errors = dict(dense_opponents(weight, x)), {}
    for amount in arguments.sparsities.split(","):
        keep = sparse(weight, amount)
        for bits in (16, 8, 4) if not keep.all() else (8, 4):
            made, dense = packed(weight, keep, bits)
            for exact in (False, True) if bits < 16 and arguments.exact else (False,):
                name = f"{amount}, {'bf16' if bits == 16 else f'int{bits}'}{', exact' if exact else ''}"
                named[name] = rotated_packed(x, made, exact)
                y, wanted = named[name][0]()[:, :ERROR_ROWS].double(), x.double() @ dense.t()
                errors[name] = float((y - wanted).norm() / wanted.norm())
    return named, errors


def medians(named, repeats, clock):
    """Seconds of each, measured in turns of changing order, the copy on its own."""
    times = {name: [] for name in named}
    order = [name for name in named if name != COPY]
    for names in ([COPY], order):
        for name in names * 2:
            named[name][0]()
        for _ in range(repeats):
            random.shuffle(names)
            for name in names:
                start = clock()
                named[name][0]()
                times[name].append(clock() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def table(shape, n, arguments):
    torch.manual_seed(0)
    weight, x = torch.randn(shape).bfloat16(), torch.randn(n, shape[1]).bfloat16()
    named, errors = contestants(weight, x, arguments)
    seconds = medians(
        named, arguments.repeats, time.thread_time if arguments.one_thread else time.perf_counter
    )
    copy = named[COPY][1] / seconds[COPY]
    print(
        f"\n{shape[0]} x {shape[1]}, {n} row{'s' * (n > 1)} of x: {library.status()};"
        f" a copy {copy / 1e9:.1f} GB/s\n"
    )
    print("| | ms | against torch bf16 | against torch's own | GB/s | of a copy | relative error |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for name, (_, count) in named.items():
        own = next(
            (f"torch {k}" for k in ("int8", "int4") if k in name and f"torch {k}" in named), "torch bf16"
        )
        speed = count / seconds[name]
        results[name] = {
            "ms": seconds[name] * 1e3,
            "against_bf16": seconds["torch bf16"] / seconds[name],
            "against_own": seconds[own] / seconds[name],
            "bytes_per_second": speed,
            "of_a_copy": speed / copy,
            "relative_error": errors.get(name),
        }
        error = f"{errors[name]:.2g}" if name in errors else ""
        print(
            f"| {name} | {seconds[name] * 1e3:.3f} | {results[name]['against_bf16']:.2f} |"
            f" {results[name]['against_own']:.2f} | {speed / 1e9:.1f} | {speed / copy:.0%} | {error} |",
            flush=True,
        )
    return {"shape": shape, "rows": n, "status": library.status(), "results": results}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x11008")
    parser.add_argument("--sparsities", default="0.5,0.7,0.8,2:4")
    parser.add_argument("--rows", default="1", help="rows of x, with commas between")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--exact", action="store_true", help="int8 and int4 also without rounding x to bytes")
    parser.add_argument("--json", help="a file for the figures")
    parser.add_argument("--one-thread", action="store_true")
    arguments = parser.parse_args()
    if arguments.one_thread:
        torch.set_num_threads(1)
    shapes = [tuple(int(n) for n in shape.split("x")) for shape in arguments.shapes.split(",")]
    done = [table(shape, int(n), arguments) for shape in shapes for n in arguments.rows.split(",")]
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(done, file, indent=1)


if __name__ == "__main__":
    main()
