"""What Triton's compiler makes of the GPU kernels for packed matrices, without a GPU: instructions of a warp
in the inner loop for 32 columns of an output, with one row of x, with several, and for dense rows.

`gpu_instructions.py [--machines 80,89,90] [--shapes 16x4]`; needs Triton. It measures no time: the slower the
memory of a GPU is for its processors, the more instructions it hides.
"""

import argparse
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

VALUES = (("bf16", 16), ("fp16", 16), ("i8", 8), ("u8", 4))


def built(function, machine, types, constants, warps):
    """A kernel compiled for sm_`machine`, with sizes and addresses that are multiples of 16."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, aligned = {}, {}
    for number, name in enumerate(function.arg_names):
        signature[name] = "constexpr" if name in constants else types.get(name, "i32")
        if signature[name].startswith("*") or name in "RC":
            aligned[(number,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature=signature, constexprs=constants, attrs=aligned)
    return compile(source, target=GPUTarget("cuda", machine, 32), options={"num_warps": warps})


def arguments_of(values, bits):
    types = {
        "values": f"*{values}",
        "mask": "*u32",
        "starts": "*u16",
        "bases": "*u32",
        "scale": "*bf16",
    }
    x = values if bits == 16 else "bf16"
    constants = {"SCALED": bits < 16, "FOUR": bits == 4, "NATIVE": True}
    return types | {name: f"*{x}" for name in ("x", "y", "out")}, constants | (
        {"scale": None} if bits == 16 else {}
    )


def product(decode, machine, values, shape, one):
    """The fused kernel. `values`: type and bits; `shape`: outputs, warps; `one`: for one row of x."""
    types, constants = arguments_of(*values)
    return built(decode._product, machine, types, constants | {"OUTPUTS": shape[0], "ONE": one}, shape[1])


def dense(decode, machine, values, shape):
    """The kernel that unpacks dense rows."""
    types, constants = arguments_of(*values)
    return built(decode._dense, machine, types, constants | {"OUTPUTS": shape[0]}, shape[1])


def loop_length(kernel):
    """Instructions of its longest loop."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        done = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True)
    lines, labels, longest = done.stdout.splitlines(), {}, 0
    for number, line in enumerate(lines):
        if label := re.match(r"^(\.L_x_\d+):", line.strip()):
            labels[label[1]] = number
        jump = re.search(r"BRA.*`\((\.L_x_\d+)\)", line)
        if jump and jump[1] in labels:
            body = lines[labels[jump[1]] : number + 1]
            longest = max(longest, sum(bool(re.search(r"/\*[0-9a-f]{4,}\*/", one)) for one in body))
    return longest


def line(decode, machine, values, shape):
    """A row of the table."""
    pieces = shape[0] * 4 / shape[1]  # of 32 columns, that a warp takes in a step
    kernels = [product(decode, machine, values, shape, True)]
    kernels.append(product(decode, machine, values, shape, False) if shape[0] >= 16 else None)
    kernels.append(dense(decode, machine, values, shape))
    counts = [f"{loop_length(kernel) / pieces:.1f}" if kernel else "" for kernel in kernels]
    words = [f"sm_{machine}", f"{values[0]}, {values[1]} bits", "x".join(map(str, shape)), *counts]
    return f"| {' | '.join(words)} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machines", default="80,89,90", help="compute capabilities, 90 for 9.0")
    parser.add_argument("--shapes", help="outputs x warps of a program, with commas between; all by default")
    arguments = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        sys.exit("gpu_instructions.py needs Triton, which is not installed: pip install triton")
    os.environ.pop("TRITON_INTERPRET", None)
    from llmprune.kernels import decode, ways

    shapes = ways.SHAPES
    if arguments.shapes:
        shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    print("| machine | values | outputs x warps | one row of x | 2 to 16 rows | dense rows |")
    print("|---|---|---|---|---|---|")
    for machine, values, shape in itertools.product(arguments.machines.split(","), VALUES, shapes):
        print(line(decode, int(machine), values, shape), flush=True)


if __name__ == "__main__":
    main()
