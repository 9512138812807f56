"""Kills and breaks small runs at seeded random moments, resumes them, and compares every byte with an
undisturbed run.

`python tests/faults.py --kills 500 --errors 200` by hand; the suite runs it with fewer. Each run is a forked
child of this process, which has imported everything and never runs more than one thread, so that a fork is
safe.
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

REPORT = report.html_report


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


def prune(model, tokens, output, recipe, resume):
    llmprune.prune(
        model, recipe=recipe, sparsity=0.6, calibration=tokens, output=output, resume=resume, overwrite=True
    )


def child(arguments, faulty=None, quiet=True):
    """Fork a run; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        report._plot = lambda matrices: (
            ""
        )  # the plot is most of the time of a run this small, and the same every time
        if faulty:
            faulty.install()
        prune(*arguments)
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
    """Runs of one small model, disturbed until so many faults have struck."""

    def __init__(self, root, seed):
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
        self.model, self.tokens = root / "model", torch.randint(0, 512, (8, 32))
        LlamaForCausalLM(config).save_pretrained(self.model)
        self.wanted, self.seconds, self.operations = {}, {}, {}
        for recipe in ("dsnot", "sparsegpt"):
            output = root / f"wanted-{recipe}"
            started = time.monotonic()
            assert ended(child((self.model, self.tokens, output, recipe, False), quiet=False)) == 0
            self.seconds[recipe], self.wanted[recipe] = time.monotonic() - started, contents(output)
            self.operations[recipe] = self.count(recipe)

    def count(self, recipe):
        """File operations of an undisturbed run."""
        reading, writing = os.pipe()
        faulty = Faulty(-1, kill)
        if not os.fork():
            report._plot = lambda matrices: ""
            faulty.install()
            prune(self.model, self.tokens, self.root / "counted", recipe, False)
            os.write(writing, str(faulty.count).encode())
            os._exit(0)
        os.wait()
        shutil.rmtree(self.root / "counted")
        return int(os.read(reading, 20))

    def run(self, strike=None):
        """One run, disturbed and resumed until it ends by itself; returns how many faults struck."""
        recipe, struck, resume = self.random.choice(("dsnot", "sparsegpt")), 0, False
        output = self.root / "out"
        if self.random.random() < 0.5:  # something to replace
            old_output(output)
        while True:
            arguments = (self.model, self.tokens, output, recipe, resume)
            if strike or self.random.random() < 0.5:
                code = ended(
                    child(
                        arguments,
                        Faulty(self.random.randint(1, int(self.operations[recipe] * 1.3)), strike or kill),
                    )
                )
            else:
                pid = child(arguments)
                time.sleep(self.random.uniform(0, self.seconds[recipe] * 1.1))
                os.kill(pid, signal.SIGKILL)
                code = ended(pid)
            assert code in (0, 3, -signal.SIGKILL), f"a run ended with {code}"
            if code == 0:
                break
            struck, resume = struck + 1, True
        have = contents(output)
        assert have.keys() == self.wanted[recipe].keys(), have.keys() ^ self.wanted[recipe].keys()
        differ = [name for name in have if have[name] != self.wanted[recipe][name]]
        assert not differ, f"{differ} differ after {struck} faults"
        left = sorted(p.name for p in self.root.iterdir() if p.name.startswith(".out"))
        assert not left, f"{left} left behind"
        shutil.rmtree(output)
        return struck

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
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="llmprune-faults-"))
    started = time.monotonic()
    try:
        campaign = Campaign(root, arguments.seed)
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
