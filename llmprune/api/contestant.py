"""A model that is measured in a process of its own, so that its memory and its loading are its own.

The two processes speak in lines of JSON: what to do on the child's stdin, what came of it on its stdout.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from llmprune.machine import device as devices

_CODE = "import sys; sys.path[:] = {path!r}; from llmprune.api.contestant import main; main()"


class Contestant:
    """A model that another process has loaded; `close` ends it.

    Args:
        name: what messages call it. folder: of the model.
        limit: tokens that it takes; None for any number.
        trust_remote_code: run Python code of the checkpoint.

    Raises:
        ValueError: the process ended before the model was loaded.
    """

    def __init__(self, name: str, folder: Path, limit: int | None, trust_remote_code: bool) -> None:
        import torch

        self._name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (`close` closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the other
            text=True,
        )
        try:
            self.loaded = self._ask(
                {
                    "folder": str(folder),
                    "limit": limit,
                    "trust": trust_remote_code,
                    "threads": torch.get_num_threads(),
                }
            )
        except BaseException:
            self.close()
            raise

    def seconds(self, tokens: int) -> float:
        """Seconds for so many tokens, see `runtime.speed.seconds_for`."""
        return float(self._ask({"tokens": tokens})["seconds"])

    def peak_memory(self) -> int:
        """The peak of its resident memory so far, in bytes."""
        return int(self._ask({"memory": True})["peak"])

    def close(self) -> None:
        """End the process."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        line = ""
        try:
            self._process.stdin.write(json.dumps(what) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            pass
        if not line:
            raise ValueError(f"the {self._name} model cannot be measured: {self._reason()}")
        found: dict[str, Any] = json.loads(line)
        return found

    def _reason(self) -> str:
        """Why the process has ended, in words."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "its process was killed, as happens where memory runs out; --products-only needs less"
        self._said.seek(0)
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:300] if lines else f"its process ended with status {code}"


def main() -> None:
    """The process of a contestant: loads the model it is told, and measures until stdin ends."""
    import torch

    from llmprune.api.checkpoints import load
    from llmprune.machine.state import libraries
    from llmprune.model.classes import class_of
    from llmprune.model.config import read_config
    from llmprune.runtime.speed import seconds_for

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand among the answers
    what = json.loads(sys.stdin.readline())
    torch.set_num_threads(what["threads"])
    limit, folder, trust = what["limit"], what["folder"], what["trust"]
    class_of(read_config(Path(folder), trust), trust)  # imports what loading would
    before, started = _peak(), time.perf_counter()
    model = load(folder, trust_remote_code=trust).eval()
    with libraries():
        seconds_for(model, 2, limit)  # weights that are mapped are read only now
    answer: dict[str, Any] = {"seconds": time.perf_counter() - started, "before": before}
    while True:
        print(json.dumps(answer), file=answers, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        what = json.loads(line)
        if "memory" in what:
            answer = {"peak": _peak()}
        else:
            answer = {"seconds": seconds_for(model, what["tokens"], limit)}


def _peak() -> int:
    """The peak of this process's resident memory, in bytes."""
    try:  # what getrusage says begins with the memory of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return devices.peak_memory()
