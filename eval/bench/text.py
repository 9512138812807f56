"""Peak memory of reading text files, as calibration (the plan of `llmprune prune demo`) and for perplexity
(`llmprune eval demo --limit 4`), and how soon SIGTERM ends the reading. A process that takes more than --most
GB is stopped.
"""

import argparse
import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SENTENCE = "The quick brown fox jumps over the lazy dog, and number {} of its {} cousins does as well. "
MB = 1_000_000


def write_files(folder):
    """(name, path) of every file: English-like text of 2 and 8 MB, and 200 MB of one byte, compressed."""
    text = "".join(SENTENCE.format(n, n * n % 97) + "\n" * (n % 7 == 0) for n in range(100_000))
    for size in (2, 8):
        path = Path(folder) / f"words-{size}.txt"
        path.write_text(text[: size * MB])
        yield f"{size} MB of text", path
    for name, byte in (("zeros", b"\0"), ("spaces", b" "), ("newlines", b"\n"), ("letters a", b"a")):
        path = Path(folder) / f"{name.replace(' ', '-')}.txt.gz"
        with gzip.open(path, "wb", compresslevel=9) as file:
            for _ in range(200):
                file.write(byte * MB)
        yield f"200 MB of {name}, .gz", path


def measured(command, most, stop_after=None):
    """(peak resident bytes, seconds, exit code or why it was stopped, stdout, last line of stderr) of a
    command.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.monotonic()
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True)
        peak, why, told = 0, None, None
        while process.poll() is None:
            status = (
                Path(f"/proc/{process.pid}/status").read_text()
                if os.path.exists(f"/proc/{process.pid}")
                else ""
            )
            peak = max(
                [
                    peak,
                    *(
                        int(line.split()[1]) * 1024
                        for line in status.splitlines()
                        if line.startswith("VmHWM")
                    ),
                ]
            )
            if peak > most:
                why = f"stopped at {most / 1e9:.0f} GB"
                process.kill()
            if stop_after and told is None and time.monotonic() - started > stop_after:
                told = time.monotonic()
                process.send_signal(signal.SIGTERM)
            if told and time.monotonic() - told > 60:
                why = "ignored SIGTERM for 60 s"
                process.kill()
            time.sleep(0.02)
        seconds = time.monotonic() - (told or started)
        out.seek(0), err.seek(0)
        return (
            peak,
            seconds,
            why or process.returncode,
            out.read(),
            (err.read().strip().splitlines() or [""])[-1],
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=float, default=4, help="GB at which a process is stopped")
    parser.add_argument("--only", default="", help="part of the names of the files to read")
    arguments = parser.parse_args()
    most = arguments.most * 1e9
    program = [sys.executable, "-m", "llmprune"]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LLMPRUNE_CACHE"] = f"{folder}/cache"
        for name, path in write_files(folder):
            if arguments.only not in name:
                continue
            prune = [
                *program,
                "prune",
                "demo",
                "--recipe",
                "magnitude",
                "--calibration",
                str(path),
                "--output",
                f"{folder}/out",
            ]
            score = [*program, "eval", "demo", "--perplexity", str(path), "--json"]
            for what, command, stop in (
                ("calibration", [*prune, "--dry-run", "--json"], None),
                ("perplexity", [*score, "--limit", "4"], None),
                ("perplexity of all, SIGTERM after 12 s", score, 12),
            ):
                peak, seconds, code, out, said = measured(command, most, stop)
                planned = (
                    f", planned {json.loads(out)['memory_bytes'] / 1e9:.2f} GB"
                    if what == "calibration" and code == 0
                    else ""
                )
                print(
                    f"{name:<26} {what:<38} {peak / 1e9:5.2f} GB{planned} in {seconds:5.1f} s, exit "
                    f"{code} {said[:150]}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
