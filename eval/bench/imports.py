"""Seconds from the start of the process to the first block of `llmprune prune`, and what was imported until
then (`python -X importtime`, whose own work is counted too): `imports.py [MODEL] [--runs N]`.
"""

import argparse
import re
import subprocess
import sys
import tempfile

SHOWN = (
    "torch",
    "transformers",
    "transformers.activations",
    "transformers.modeling_layers",
    "torch._dynamo",
    "torch.distributed.tensor",
    "scipy.optimize",
)
FIRST_BLOCK = """
import sys, time
started = time.perf_counter()
from llmprune.run import corridor  # with all that `prune` imports

def first_block(*arguments):
    print(f"{time.perf_counter() - started:.2f}")
    raise SystemExit

corridor.prune_blocks = first_block
from llmprune.__main__ import main
sys.argv = ["llmprune", "prune", sys.argv[1], "--recipe", "magnitude", "--output", sys.argv[2], "--quiet"]
main()
"""


def started(model, *options):
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *options, "-c", FIRST_BLOCK, model, f"{folder}/out"]
        return subprocess.run(command, capture_output=True, text=True, check=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    seconds = sorted(float(started(arguments.model).stdout) for _ in range(arguments.runs))
    print(f"to the first block: {' '.join(f'{s:.2f}' for s in seconds)} s")
    lines = re.findall(
        r"import time: +(\d+) \| +(\d+) \| +(\S+)", started(arguments.model, "-X", "importtime").stderr
    )
    print(f"{sum(int(own) for own, _, _ in lines) / 1e6:5.2f} s  all imports")
    for _, together, name in lines:
        if name in SHOWN:
            print(f"{int(together) / 1e6:5.2f} s  {name}, with what it imports first")


if __name__ == "__main__":
    main()
