"""What waiting threads cost: the demo's tuned run alone and beside a program with two threads, for three ways
of waiting.

`competitor.py [--runs 3]` prints the seconds of the whole command, the median of the runs, in one table.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

# torch is imported first here: this program spins, as most do.
COMPETITOR = "import torch; torch.set_num_threads(2); a = torch.ones(512, 512)\nwhile True: a @ a"
WAITING = {
    "asleep soon (as llmprune sets it)": {},
    "asleep at once": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spinning": {"OMP_WAIT_POLICY": "ACTIVE"},
}
JOB = ("prune", "demo", "--recipe", "best", "--set", "update.steps=20", "--samples", "32", "--quiet")
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def seconds(environment, limit):
    """Wall seconds of the whole command; `limit` where it takes longer."""
    inherited = {name: value for name, value in os.environ.items() if name not in CHOICES}
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        command = [sys.executable, "-m", "llmprune", *JOB, "--output", f"{folder}/out"]
        try:
            subprocess.run(command, env={**inherited, **environment}, check=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return limit
        return time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--limit", type=float, default=240, help="seconds after which a run is ended")
    arguments = parser.parse_args()
    print("| threads that wait are | alone | beside a program with two threads |\n|---|---|---|", flush=True)
    for label, environment in WAITING.items():
        row = []
        for beside in (False, True):
            other = subprocess.Popen([sys.executable, "-c", COMPETITOR]) if beside else None
            try:
                taken = statistics.median(
                    seconds(environment, arguments.limit) for _ in range(arguments.runs)
                )
            finally:
                if other:
                    other.kill()
                    other.wait()
            row.append(f"over {taken:.0f} s" if taken >= arguments.limit else f"{taken:.1f} s")
        print(f"| {label} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
