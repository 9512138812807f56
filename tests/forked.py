"""The program in processes of its own, forked from one that has imported everything: to start an interpreter
and import torch and transformers takes seconds, a fork takes none. They are processes as any other: signals,
exit codes and pipes are real.

What is read when Python starts or when a library is imported (variables of the hub, threads) stays that of
the test session; tests of such things start an interpreter.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile

_NUMBER = struct.Struct("i")


class Parent:
    """The process that has imported everything; `start` asks it for a child, one after another."""

    def __init__(self):
        self._asked, theirs = socket.socketpair()
        command = [sys.executable, __file__, str(theirs.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # a process with one thread may be forked
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL
        )
        theirs.close()

    def start(self, args, cwd, env=None, stdout=None):
        """`llmprune args` in a folder; its stdout goes to a file descriptor where one is given."""
        return Child(self._asked, list(map(str, args)), cwd, {**os.environ, **(env or {})}, stdout)

    def end(self):
        self._asked.close()
        self._process.wait(timeout=30)


class Child:
    """A process that runs the program, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, asked, args, cwd, env, stdout):
        self.args, self.returncode = args, None
        self._out, self._err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115  read when it has ended
        self._told, status = os.pipe()
        request = json.dumps({"args": args, "cwd": str(cwd), "env": env}).encode() + b"\n"
        out = self._out.fileno() if stdout is None else stdout
        sent = socket.send_fds(asked, [request], [out, self._err.fileno(), status])
        asked.sendall(request[sent:])
        os.close(status)
        self.pid = self._number(120)

    def _number(self, timeout):
        """The next number that the parent tells: the process id, then the exit code.

        None when it takes too long.
        """
        if not select.select([self._told], [], [], timeout)[0]:
            return None
        return _NUMBER.unpack(os.read(self._told, _NUMBER.size))[0]

    def poll(self):
        return self.wait(0)

    def wait(self, timeout=None):
        if self.returncode is None:
            self.returncode = self._number(timeout)
            if self.returncode is not None:
                os.close(self._told)
        return self.returncode

    def communicate(self, timeout=180):
        """(stdout, stderr) when it has ended; a child that takes too long is killed."""
        if self.wait(timeout) is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        for file in (self._out, self._err):
            file.seek(0)
        return self._out.read(), self._err.read()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def _serve(asked):
    """Fork a child for every request until nobody can ask any more; in the child, the request."""
    _import_everything()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that watch the children
    buffer, handed = b"", []
    while True:
        data, given, _, _ = socket.recv_fds(asked, 1 << 16, 3)
        if not data:
            os._exit(0)
        buffer, handed = buffer + data, handed + given
        if not buffer.endswith(b"\n"):
            continue
        if not os.fork():
            request = _watched(json.loads(buffer), *handed)
            asked.close()
            return request
        for descriptor in handed:
            os.close(descriptor)
        buffer, handed = b"", []


def _import_everything():
    import tokenizers  # noqa: F401
    import torch.distributed
    import transformers
    from matplotlib.backends import backend_agg  # noqa: F401
    from matplotlib.figure import Figure
    from transformers.models.llama import modeling_llama  # noqa: F401
    from typer.testing import CliRunner  # noqa: F401

    from llmprune.api import checkpoints, pruning  # noqa: F401
    from llmprune.cli import commands  # noqa: F401
    from llmprune.planning import estimate
    from llmprune.run import production  # noqa: F401

    transformers.AutoModelForCausalLM, transformers.AutoTokenizer  # noqa: B018  they are imported when named
    Figure().subplots()
    for dtype in (torch.float32, torch.float64):  # how fast this machine is
        estimate.rates_of(torch.device("cpu"), dtype)
    gc.freeze()  # what is here stays: no child looks through it


def _watched(request, out, err, status):
    """In the child: the request. The process between tells the child's id and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        os.close(out)
        os.close(err)
        os.write(status, _NUMBER.pack(child))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(status, _NUMBER.pack(code))
        os._exit(0)
    os.close(status)
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    return request


def _run(request):
    """The program as its own entry would start it; its exit is the interpreter's."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.argv = ["llmprune", *request["args"]]
    from llmprune.__main__ import main

    main()


if __name__ == "__main__":
    _run(_serve(socket.socket(fileno=int(sys.argv[1]))))
