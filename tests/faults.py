"""Kills and breaks small runs, and conversions of their outputs, at seeded random moments, resumes them, and
compares every byte with an undisturbed one.

`python tests/faults.py --kills 500 --errors 200` by hand, with `--conversions` for those; the suite runs both
with fewer. Each run is a forked child of this process, which has imported everything and never runs more than
one thread, so that a fork is safe.
"""

from __future__ import annotations

import argparse
import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["LLMPRUNE_CACHE"] = tempfile.mkdtemp(prefix="llmprune-faults-")

import torch

torch.set_num_threads(1)

from outputs import contents, old_output  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import llmprune  # noqa: E402
from llmprune.record import report  # noqa: E402
from llmprune.run import samples  # noqa: E402

REPORT = report.html_report
OLD_CARD = b"years of work"  # of `old_output`


def _plain():
    """Without plots and texts, which are most of the time of a run this small, and the same every time."""
    report.draw, samples.DEFAULT = lambda folder, record: None, 0


class Faulty:
    """Counts file operations of this process and does something at the chosen one."""

    def __init__(self, at, strike):
        self.at, self.strike, self.count = at, strike, 0

    def step(self):
        self.count += 1
        return self.count == self.at

    def install(self):
        for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "mkdir")):
            setattr(module, name, self.wrapped(getattr(module, name)))
        real = Path.open

        def opened(path, mode="r", *args, **kwargs):
            file = real(path, mode, *args, **kwargs)
            return _Torn(file, self) if set(mode) & set("wa+") else file

        Path.open = opened

    def wrapped(self, real):
        def call(*args, **kwargs):
            if self.step():
                self.strike()
            return real(*args, **kwargs)

        return call


class _Torn:
    """A file whose chosen write is half done when the fault strikes."""

    def __init__(self, file, faulty):
        self._file, self._faulty = file, faulty

    def write(self, data):
        if self._faulty.step():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            self._faulty.strike()
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(code):
    def strike():
        raise OSError(code, os.strerror(code))

    return strike


def prune(model, tokens, recipe, form="dense"):
    """A run, as a function of output and resume."""

    def job(output, resume=False):
        options = {"recipe": recipe, "sparsity": 0.6, "calibration": tokens, "format": form}
        llmprune.prune(model, output=output, resume=resume, overwrite=True, **options)

    return job


def convert(folder, to, values="same"):
    """A conversion, as a function of output and resume."""

    def job(output, resume=False):
        llmprune.convert(folder, to=to, values=values, output=output, resume=resume, overwrite=True)

    return job


def child(job, output, resume=False, faulty=None, quiet=True):
    """Fork a run; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _plain()
        if faulty:
            faulty.install()
        job(output, resume)
        code = 0
    except OSError:
        code = 3
    except BaseException as error:
        code = (
            3 if "cannot be moved" in str(error) else 4
        )  # the one failure that says where the whole checkpoint lies
        if code == 4:
            print(f"unexpected {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def ended(pid):
    """How a child ended: its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Campaign:
    """Runs on one small model, or conversions of it, disturbed until so many faults have struck."""

    def __init__(self, root, seed, conversions=False, only=""):
        self.random, self.root = random.Random(seed), root
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        model, tokens = root / "model", torch.randint(0, 512, (8, 32))
        LlamaForCausalLM(config).save_pretrained(model)
        self.jobs = {recipe: prune(model, tokens, recipe) for recipe in ("dsnot", "sparsegpt")}
        self.jobs["packed"] = prune(model, tokens, "sparsegpt", "packed")
        if conversions:
            self.jobs = self._conversions(root / "inputs")
        self.jobs = {name: job for name, job in self.jobs.items() if not only or name in only.split(",")}
        self.wanted, self.seconds, self.operations = {}, {}, {}
        for name, job in self.jobs.items():
            output, started = root / f"wanted-{name}", time.monotonic()
            assert ended(child(job, output, quiet=False)) == 0
            self.seconds[name], self.wanted[name] = time.monotonic() - started, contents(output)
            self.operations[name] = self.count(job)

    def _conversions(self, inputs):
        """Conversions from every format into every other, of the output of a run."""
        jobs = {}
        for name, job in (
            ("dense", self.jobs["sparsegpt"]),
            ("packed", convert(inputs / "dense", "packed")),
            ("bitmask", convert(inputs / "dense", "sparse-bitmask")),
        ):
            assert ended(child(job, inputs / name, quiet=False)) == 0
        for source in ("dense", "packed", "bitmask"):
            for to in ("dense", "packed", "sparse-bitmask"):
                if source != to.removeprefix("sparse-"):
                    jobs[f"{source}-to-{to}"] = convert(inputs / source, to)
        return jobs | {"rounding": convert(inputs / "dense", "packed", "int4")}

    def count(self, job):
        """File operations of an undisturbed run."""
        reading, writing = os.pipe()
        faulty = Faulty(-1, kill)
        if not os.fork():
            _plain()
            faulty.install()
            job(self.root / "counted")
            os.write(writing, str(faulty.count).encode())
            os._exit(0)
        os.wait()
        shutil.rmtree(self.root / "counted")
        return int(os.read(reading, 20))

    def run(self, strike=None):
        """One run, disturbed and resumed until it ends by itself; returns how many faults struck."""
        name, struck, resume = self.random.choice(sorted(self.jobs)), 0, False
        job, output = self.jobs[name], self.root / "out"
        before = old_output(output) if self.random.random() < 0.5 else None  # something to replace
        while True:
            if strike or self.random.random() < 0.5:
                at = self.random.randint(1, int(self.operations[name] * 1.3))
                code = ended(child(job, output, resume, Faulty(at, strike or kill)))
            else:
                pid = child(job, output, resume)
                time.sleep(self.random.uniform(0, self.seconds[name] * 1.1))
                os.kill(pid, signal.SIGKILL)
                code = ended(pid)
            assert code in (0, 3, -signal.SIGKILL), f"a run ended with {code}"
            if code == 0:
                break
            self._whole(output, name, before)
            struck, resume = struck + 1, True
        self._finished(output, name)
        return struck

    def evenly(self, kills):
        """Kill every job at so many moments, evenly spread, and resume it; returns (kills, runs)."""
        output = self.root / "out"
        for name, job in self.jobs.items():
            for number in range(kills):
                at = 1 + number * self.operations[name] // kills
                assert ended(child(job, output, False, Faulty(at, kill))) == -signal.SIGKILL
                self._whole(output, name, None)
                assert ended(child(job, output, True)) == 0
                self._finished(output, name)
        return kills * len(self.jobs), kills * len(self.jobs)

    def _finished(self, output, name):
        """The output is as it should be, and nothing is left beside it; removes it."""
        self._whole(output, name, None)
        left = sorted(p.name for p in self.root.iterdir() if p.name.startswith(".out"))
        assert not left, f"{left} left behind"
        shutil.rmtree(output)

    def _whole(self, output, name, before):
        """What stands in the output's place is the old one, nothing, or the new one in every byte."""
        if before is not None and (not output.exists() or (output / "README.md").read_bytes() == OLD_CARD):
            return
        if before is None and not output.exists():
            return
        have, wanted = contents(output), self.wanted[name]
        have.pop("journal.jsonl", None)  # it goes last
        assert have.keys() == wanted.keys(), have.keys() ^ wanted.keys()
        differ = [file for file in have if have[file] != wanted[file]]
        assert not differ, f"{differ} differ"

    def until(self, faults, strike=None):
        """Runs until so many faults struck; returns (faults, runs)."""
        struck = runs = 0
        while struck < faults:
            struck += self.run(strike)
            runs += 1
        return struck, runs


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--errors", type=int, default=20, help="write errors, and as many full disks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--conversions", action="store_true", help="of conversions instead of runs")
    parser.add_argument("--only", default="", help="some jobs by name, with commas")
    parser.add_argument("--evenly", type=int, help="kill every job at so many moments, and nothing else")
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="llmprune-faults-"))
    started = time.monotonic()
    try:
        campaign = Campaign(root, arguments.seed, arguments.conversions, arguments.only)
        if arguments.evenly:
            counts = {"kills": campaign.evenly(arguments.evenly)}
        else:
            counts = {
                "kills": campaign.until(arguments.kills),
                "write errors": campaign.until(arguments.errors, fail(errno.EIO)),
                "full disks": campaign.until(arguments.errors, fail(errno.ENOSPC)),
            }
    finally:
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(os.environ["LLMPRUNE_CACHE"], ignore_errors=True)
    for what, (struck, runs) in counts.items():
        print(f"{struck} {what} in {runs} runs: every file as in an undisturbed run")
    print(f"{campaign.operations} file operations a run; {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
