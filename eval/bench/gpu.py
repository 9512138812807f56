"""Products with packed and 2:4 weights on an NVIDIA GPU against torch's dense bf16 product.

`gpu.py [--shapes 4096x4096,4096x11008,4096x14336] [--sparsities 0.5,0.7,0.8,2:4] [--rows 1,16]
[--many 256,4096] [--json FILE]` prints a table per shape and number of rows of x. Each contestant is captured
in a CUDA graph that goes over several matrices, which fill the GPU's cache more than twice; the graphs are
replayed in turn, and times are medians. The last line applies a rule that was set before any measurement:
the fused kernel counts as a speed-up only from 1.5 times dense on, at 70 %, 4096 x 11008, one row of x.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys

import torch
from kernels import ERROR_ROWS, packed, size_of, sparse

from llmprune.kernels import gpu, ways
from llmprune.kernels.layout import Packed
from llmprune.runtime import semi_structured

RULE = 1.5  # times dense
RULED = ((4096, 11008), "0.7", 1)


def clocks():
    """Name, clocks and power limit of the GPU, in words."""
    fields = "name,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    if done.returncode:
        return f"{torch.cuda.get_device_name()}, clocks unknown"
    return "{}, SM at {} of {}, memory at {}, limit {}".format(*done.stdout.splitlines()[0].split(", "))


def rotation(size):
    """How many copies of a matrix fill the cache more than twice."""
    cache = torch.cuda.get_device_properties("cuda").L2_cache_size
    return max(4, 1 + 2 * cache // max(1, size))


class Graph:
    """A product over copies of its matrix, as one CUDA graph; `y` is the last result."""

    def __init__(self, call, copies):
        self.copies, self.y = copies, call(*copies[0])
        side = torch.cuda.Stream()  # a graph is captured after a warm-up on a stream of its own
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for copy in copies:
                call(*copy)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for copy in copies:
                self.y = call(*copy)

    def seconds(self):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000 / len(self.copies)


def captured(call, parts):
    """A graph, or why there is none, in one line."""
    try:
        copies = [
            tuple(p.clone() if isinstance(p, torch.Tensor) else p for p in parts)
            for _ in range(rotation(size_of(parts)))
        ]
        with torch.no_grad():
            return Graph(call, copies)
    except Exception as error:  # of Triton's compiler and torch's backends, of many kinds
        return (str(error).strip() or type(error).__name__).splitlines()[0]


def multiplied(x, way, *parts):
    return ways.multiply(x, Packed(*parts[:6]), parts[6:], way)


def packed_contestants(weight, keep, amount, x):
    """name, graph or reason, dense rows in float64."""
    for bits in (16, 8, 4):
        made, dense = packed(weight.cpu(), keep, bits)
        made = Packed(*(p.cuda() if isinstance(p, torch.Tensor) else p for p in made))
        beside = gpu.prepared(made)
        for way in ways.candidates(made, len(x), x.dtype):
            call = functools.partial(multiplied, x, way)
            name = f"{amount}, {'bf16' if bits == 16 else f'int{bits}'}, {way.name}"
            yield name, captured(call, (*made, *beside)), dense


def two_of_four(weight, keep, x):
    weight = weight * keep.cuda()
    for backend in semi_structured.backends():
        try:
            made = semi_structured.converted(weight, backend)
        except (RuntimeError, NotImplementedError) as error:
            yield f"2:4, {backend}", str(error).splitlines()[0], None
            continue
        copies = [
            (semi_structured.converted(weight, backend),) for _ in range(rotation(weight.nbytes // 2) - 1)
        ]
        try:
            graph = Graph(functools.partial(torch.nn.functional.linear, x), [(made,), *copies])
        except Exception as error:
            graph = str(error).splitlines()[0]
        yield f"2:4, {backend}", graph, weight[:ERROR_ROWS].double().cpu()


def contestants(shape, n, arguments):
    torch.manual_seed(0)
    weight, x = torch.randn(shape).bfloat16().cuda(), torch.randn(n, shape[1]).bfloat16().cuda()
    yield (
        "dense bf16",
        captured(lambda w: torch.nn.functional.linear(x, w), (weight,)),
        weight[:ERROR_ROWS].double().cpu(),
        x,
    )
    for amount in arguments.sparsities.split(","):
        keep = sparse(weight.cpu(), amount)
        if n <= ways.MOST_FUSED:
            yield from ((*one, x) for one in packed_contestants(weight, keep, amount, x))
        if amount == "2:4":
            yield from ((*one, x) for one in two_of_four(weight, keep, x))


def table(shape, n, arguments):
    """Prints a table; seconds by name."""
    found = list(contestants(shape, n, arguments))
    graphs = {name: graph for name, graph, *_ in found if isinstance(graph, Graph)}
    times = {name: [] for name in graphs}
    before = clocks()
    for repeat in range(arguments.repeats + 3):
        for name, graph in graphs.items():
            seconds = graph.seconds()
            if repeat >= 3:
                times[name].append(seconds)
    median = {name: statistics.median(each) for name, each in times.items()}
    print(f"\n{shape[0]} x {shape[1]}, {n} row{'s' * (n > 1)} of x: {before}; afterwards {clocks()}\n")
    print("| | us | against dense bf16 | GB/s | relative error |\n|---|---|---|---|---|")
    for name, graph, dense, x in found:
        if not isinstance(graph, Graph):
            print(f"| {name} | | not measured: {graph} | | |")
            continue
        wanted = x.double().cpu() @ dense.t()
        error = float((graph.y[:, : len(dense)].double().cpu() - wanted).norm() / wanted.norm())
        read = size_of(graph.copies[0]) if "dense" in name or "2:4, cu" not in name else 0
        speed = f"{read / median[name] / 1e9:.0f}" if read else ""
        ratio = median["dense bf16"] / median[name]
        print(f"| {name} | {median[name] * 1e6:.1f} | {ratio:.2f} | {speed} | {error:.2g} |", flush=True)
    return median


def verdict(results):
    """What the rule says of the fused kernel."""
    shape, amount, n = RULED
    seconds = results.get((shape, n), {})
    fused = [s for name, s in seconds.items() if name.startswith(f"{amount}, bf16, fused")]
    if not fused:
        return f"the rule needs {amount} on {shape[0]} x {shape[1]} with {n} row of x, which was not measured"
    ratio = seconds["dense bf16"] / min(fused)
    if ratio >= RULE:
        return (
            f"the fused kernel is {ratio:.2f} times as fast as dense: from {RULE} on it counts as a speed-up"
        )
    return (
        f"the fused kernel is {ratio:.2f} times as fast as dense, below {RULE}: "
        "on this GPU packed weights save memory, and no speed-up is claimed"
    )


def numbers(text):
    return [int(number) for number in text.split(",") if number]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="4096x4096,4096x11008,4096x14336")
    parser.add_argument("--sparsities", default="0.5,0.7,0.8,2:4")
    parser.add_argument(
        "--rows", type=numbers, default="1,16", help="rows of x for packed weights, at most 16"
    )
    parser.add_argument("--many", type=numbers, default="256,4096", help="rows of x for 2:4 alone")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", help="a file for the seconds")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py measures on an NVIDIA GPU, and torch sees none here")
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    results = {
        (shape, n): table(shape, n, arguments) for shape in shapes for n in (*arguments.rows, *arguments.many)
    }
    print(f"\n{verdict(results)}")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(
                [{"shape": s, "rows": n, "seconds": r} for (s, n), r in results.items()], file, indent=1
            )


if __name__ == "__main__":
    main()
