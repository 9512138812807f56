"""When sparsity pays: perplexity over bytes per weight, dense and rounded against sparse and rounded.

`bytes.py MODEL TEXT --calibration SOURCE --json FILE [--plot FILE]` prunes MODEL with one recipe to several
amounts, and rounds kept values to 8 and 4 bits; the dense model is rounded to 8, 4, 3 and 2 bits by the same
recipe at a sparsity of 0. 8 bits are rounded plainly (`convert`), fewer bits in the run. Bytes per weight are
those of the matrices alone, scales, masks and row starts included; of 3 and 2 bits, which no file here holds,
they follow from the formula. Cells that FILE has already are not measured again, so that a run that broke off
goes on.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path

import llmprune
from llmprune.checkpoint.packed_tensor import PARTS
from llmprune.checkpoint.reader import Checkpoint
from llmprune.model.opening import OpenOptions, open_model
from llmprune.model.targets import all_targets

NAMES = {16: "bf16", 8: "int8", 4: "int4", 3: "int3", 2: "int2"}
GROUP = 128


def matrices(folder):
    """The pruned matrices [R, C] of a folder, by the name of their tensor."""
    opened = open_model(folder, OpenOptions(device="cpu", dtype="float32"))
    return {t.tensor: t.shape for t in all_targets(opened.skeleton)}


def bytes_per_weight(folder, shapes):
    """Of the matrices as they lie in the files of a packed folder, each with all its parts."""
    stored = Checkpoint(Path(folder)).tensors
    size = sum(stored[name + part].bytes for name in shapes for part in PARTS if name + part in stored)
    return size / sum(rows * columns for rows, columns in shapes.values())


def dense_bytes(bits, shapes):
    """Of dense matrices with so many bits a weight and, below 16, a bfloat16 scale for each 128 columns."""
    scales = sum(2 * r * math.ceil(c / GROUP) for r, c in shapes.values()) if bits < 16 else 0
    weights = sum(r * c for r, c in shapes.values())
    return bits / 8 + scales / weights


def perplexity(folder, arguments):
    found = llmprune.evaluate(
        folder,
        perplexity=[arguments.text],
        eval_seqlen=arguments.seqlen,
        limit=arguments.limit,
        dtype="float32",
    )
    return next(iter(found["perplexity"].values()))["value"]


def prune(amount, bits, arguments, output, **more):
    """One run of the recipe; `bits` of the kept values."""
    amounts = {"pattern": amount} if ":" in amount else {"sparsity": float(amount)}
    settings = {}
    if bits < 16:  # as `--values int4` does; here for 3 and 2 bits, too
        # What the recipe's case for int4 sets; a case does not know the bits of an update.
        steps = {"name": "block-tune", "steps": arguments.steps, "rates": [0.012, 0.004]}
        settings["update"] = [{"name": "rounding", "bits": bits}, steps]
    llmprune.prune(
        arguments.model,
        recipe=arguments.recipe,
        calibration=arguments.calibration,
        dtype="float32",
        output=output,
        settings=settings,
        **amounts,
        **more,
    )
    return output


def dense_cell(bits, arguments, folder):
    shapes = matrices(arguments.model)
    if bits == 16:
        return dense_bytes(16, shapes), perplexity(arguments.model, arguments)
    made = f"{folder}/dense"
    if bits == 8:
        llmprune.convert(arguments.model, to="packed", values="int8", output=made)
    else:
        prune("0", bits, arguments, made)
    return dense_bytes(bits, shapes), perplexity(made, arguments)


def sparse_cells(amount, wanted, arguments, folder):
    """The cells of one amount: bits -> bytes per weight and perplexity."""
    shapes, found = matrices(arguments.model), {}
    if 16 in wanted or 8 in wanted:
        made = prune(amount, 16, arguments, f"{folder}/bf16", format="packed")
        found[16] = bytes_per_weight(made, shapes), perplexity(made, arguments)
        rounded = f"{folder}/int8"
        llmprune.convert(made, to="packed", values="int8", output=rounded)
        found[8] = bytes_per_weight(rounded, shapes), perplexity(rounded, arguments)
    if 4 in wanted:
        made = prune(amount, 4, arguments, f"{folder}/int4", format="packed")
        found[4] = bytes_per_weight(made, shapes), perplexity(made, arguments)
    return found


def measure(arguments, cells):
    """Measure the cells that are missing, and write all after each."""

    def keep(amount, bits, result):
        cells[f"{amount} {NAMES[bits]}"] = {
            "sparsity": amount,
            "values": NAMES[bits],
            "bytes_per_weight": result[0],
            "perplexity": result[1],
        }
        arguments.json.write_text(json.dumps(cells, indent=1))
        print(f"{amount} {NAMES[bits]}: {result[0]:.3f} bytes per weight, {result[1]:.2f}", flush=True)

    for bits in arguments.dense_bits:
        if f"dense {NAMES[bits]}" not in cells:
            with tempfile.TemporaryDirectory() as folder:
                keep("dense", bits, dense_cell(bits, arguments, folder))
    for amount in arguments.amounts:
        wanted = {bits for bits in (16, 8, 4) if f"{amount} {NAMES[bits]}" not in cells}
        with tempfile.TemporaryDirectory() as folder:
            for bits, result in sparse_cells(amount, wanted, arguments, folder).items() if wanted else ():
                keep(amount, bits, result)


def table(cells):
    """Rows amounts, columns values; and which cell is best at its size."""
    rows = list(dict.fromkeys(cell["sparsity"] for cell in cells.values()))
    print("\n| | " + " | ".join(NAMES.values()) + " |\n" + "|---" * (len(NAMES) + 1) + "|")
    for amount in rows:
        found = {c["values"]: c for c in cells.values() if c["sparsity"] == amount}
        texts = [
            f"{found[v]['perplexity']:.2f} ({found[v]['bytes_per_weight']:.3f})" if v in found else ""
            for v in NAMES.values()
        ]
        print(f"| {amount} | {' | '.join(texts)} |")
    print("\nBest at their size (nothing smaller is as good), from small to large:\n")
    best = math.inf
    for name, cell in sorted(cells.items(), key=lambda item: item[1]["bytes_per_weight"]):
        if cell["perplexity"] < best:
            best = cell["perplexity"]
            print(f"- {name}: {cell['bytes_per_weight']:.3f} bytes per weight, {best:.2f}")


def draw(cells, path, title):
    """Perplexity over bytes per weight: one line for the dense model, one for each kind of kept values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    lines = {"dense, rounded": [c for c in cells.values() if c["sparsity"] == "dense"]}
    for values in ("bf16", "int8", "int4"):
        lines[f"sparse, {values} values"] = [
            c for c in cells.values() if c["values"] == values and c["sparsity"] not in ("dense", "2:4")
        ]
    marks = {"dense, rounded": "s", "sparse, bf16 values": "o", "sparse, int8 values": "^"}
    for (label, points), colour in zip(
        lines.items(), ("#444444", "#d1782a", "#3a9a5b", "#2b6cb0"), strict=True
    ):
        points = sorted(points, key=lambda c: c["bytes_per_weight"])
        x, y = [c["bytes_per_weight"] for c in points], [c["perplexity"] for c in points]
        axes.plot(x, y, marker=marks.get(label, "D"), label=label, color=colour)
        for cell in points:
            own = label.startswith("dense")
            text = cell["values"] if own else f"{float(cell['sparsity']):.0%}"
            axes.annotate(
                text,
                (cell["bytes_per_weight"], cell["perplexity"]),
                textcoords="offset points",
                xytext=(5, 6 if own else -12),
                fontsize=8,
                color=colour,
            )
    pairs = [c for c in cells.values() if c["sparsity"] == "2:4"]
    if pairs:
        axes.scatter(
            [c["bytes_per_weight"] for c in pairs],
            [c["perplexity"] for c in pairs],
            marker="x",
            color="#8a2be2",
            label="2:4 (bf16, int8, int4)",
            zorder=3,
        )
    usual = [c["perplexity"] for c in cells.values() if c["values"] != "int2"]
    axes.set(xlabel="bytes per weight of the pruned matrices", ylabel="perplexity", title=title, xscale="log")
    axes.set_ylim(min(usual) - 0.05 * (max(usual) - min(usual)), max(usual) * 1.01)
    ticks = [0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--recipe", default="best")
    parser.add_argument("--amounts", nargs="*", default=["0.5", "0.6", "0.7", "0.8", "2:4"])
    parser.add_argument("--dense-bits", nargs="*", type=int, default=[16, 8, 4, 3, 2])
    parser.add_argument("--steps", type=int, default=280, help="of block tuning, where values are rounded")
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--json", type=Path, required=True, help="where cells are kept, and read again")
    parser.add_argument("--plot", type=Path, help="a PNG")
    parser.add_argument("--title", default="Perplexity at equal bytes")
    arguments = parser.parse_args()
    cells = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    measure(arguments, cells)
    table(cells)
    if arguments.plot:
        draw(cells, arguments.plot, arguments.title)


if __name__ == "__main__":
    main()
