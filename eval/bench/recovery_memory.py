"""The memory of a recovery on the shape of a large model: `recovery_memory.py MODEL RECIPE [--blocks 32]`.

MODEL is a pruned folder with few blocks of that shape (`make_model.py FOLDER --blocks 2`, then `llmprune
prune`). A few steps are done on random tokens in a process of its own; printed are the private memory at its
peak beside what the plan says, and both for a model of `--blocks` blocks: what grows with the blocks is
counted so often.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

STEPS = """
import json, sys, torch, llmprune
model, recipe, output, tokens, length, sequences = sys.argv[1:7]
text = torch.randint(0, 1000, (int(sequences), int(length)), generator=torch.Generator().manual_seed(0))
settings = {"batch": 1, "held_out": 0.2, **({} if recipe == "ebft" else {"recompute": "on"})}
options = dict(text=text, tokens=int(tokens), output=output, recipe=recipe, settings=settings, score=False,
               teacher=sys.argv[7] or None, overwrite=True, restart=True)
plan = llmprune.recover(model, dry_run=True, **options).plan
record = llmprune.recover(model, **options).record
totals = record["totals"]
print(json.dumps({"parts": plan.parts, "weights": plan.weights, "peak": totals["peak_private_memory_bytes"],
                  "seconds": totals["seconds"]}))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("--teacher", default="")
    parser.add_argument("--output", type=Path, default=Path("/tmp/recovery-memory"))
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sequences", type=int, default=5)
    parser.add_argument("--blocks", type=int, default=32)
    a = parser.parse_args()
    arguments = [a.model, a.recipe, a.output, a.steps * a.length, a.length, a.sequences, a.teacher]
    done = subprocess.run([sys.executable, "-c", STEPS, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    parts, planned = found["parts"], sum(found["parts"].values())
    config = json.loads((a.model / "config.json").read_text())
    times = a.blocks / config["num_hidden_layers"]
    print(f"{a.recipe}: peak {found['peak'] / 1e9:.2f} GB private, planned {planned / 1e9:.2f} GB")
    for name, count in parts.items():
        print(f"  {name:<14} {count / 1e9:.3f} GB")
    if "block inputs" not in parts:  # weights and what is trained grow with the blocks
        ends = 2 * config["vocab_size"] * config["hidden_size"] * 2
        grows = parts["trained"] + found["weights"] // 8 + parts["weights"] - ends + parts.get("teacher", 0)
        whole = found["peak"] + (times - 1) * grows
        print(
            f"  of {a.blocks} blocks: {whole / 1e9:.2f} GB; the bf16 weights alone are "
            f"{(times * found['weights'] * 2 + ends) / 1e9:.2f} GB"
        )
    print(f"  seconds {found['seconds']}")


if __name__ == "__main__":
    main()
