"""Finds or makes the native library of `packed.c`: beside the source, in the user's cache, or compiled.

The file's name holds the hash of the source, so an old library is never taken for a new source. Nothing is
loaded from a folder that another user could write to.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from llmprune.common.folders import cache_folder
from llmprune.common.messages import first_line, shown

SOURCE = Path(__file__).with_name("packed.c")
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden")
SECONDS = 120  # for one compiler; it takes 3 to 10


def library_name() -> str:
    """The file name of the library of this source on this kind of machine."""
    hashed = hashlib.sha256(repr((SOURCE.read_bytes(), FLAGS)).encode()).hexdigest()[:16]
    return f"packed-{hashed}-{sys.platform}-{platform.machine()}.so"


def candidates() -> list[Path]:
    """Libraries that stand ready: one shipped beside the source, and one in the cache if it is safe."""
    beside = SOURCE.with_name(library_name())
    found = [beside] if beside.is_file() else []
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # RuntimeError: no home folder
        cached = cache_folder() / "kernels" / library_name()
        if cached.is_file():
            _check_private(cached.parent)
            _check_own(cached)
            found.append(cached)
    return found


def build() -> Path:
    """Compiles the library into the cache, where several processes may do so at once.

    Raises:
        ValueError: why there is no library, in one line.
    """
    compilers = _compilers()
    if not compilers:
        raise ValueError("no C compiler: neither cc, gcc, clang nor the package ziglang is installed")
    reason = ""
    try:
        folder = cache_folder() / "kernels"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        _check_private(folder)
        for compiler in compilers:
            reason = _compile(compiler, folder / library_name())
            if not reason:
                return folder / library_name()
    except (OSError, RuntimeError) as error:
        reason = f"the library cannot be kept in the cache ({first_line(error)})"
    raise ValueError(reason)


def ship(compiler: list[str]) -> Path:
    """Compiles the library beside the source, for a release wheel of this machine's kind."""
    path = SOURCE.with_name(library_name())
    if reason := _compile(compiler, path):
        raise ValueError(reason)
    path.chmod(0o755)
    return path


def _compilers() -> list[list[str]]:
    found = [[path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang") is not None:
        zig = [sys.executable, "-m", "ziglang", "cc"]  # on its own it would compile for this very processor
        found.append([*zig, "-mcpu=baseline"])
    return found


def _check_private(folder: Path) -> None:
    """Refuses a folder that another user owns or may write to, also by way of the folder above it."""
    own = folder.lstat()
    if not stat.S_ISDIR(own.st_mode) or own.st_uid != os.geteuid() or own.st_mode & 0o077:
        raise ValueError(
            f"{shown(str(folder))} is not this user's alone: make it so with chmod 700, or remove it"
        )
    above = folder.parent.stat()
    if above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX:
        raise ValueError(f"{shown(str(folder.parent))} can be written to by everybody: use chmod o-w")


def _check_own(path: Path) -> None:
    own = path.lstat()
    if not stat.S_ISREG(own.st_mode) or own.st_uid != os.geteuid() or own.st_mode & 0o022:
        raise ValueError(f"{shown(str(path))} is not a file of this user's alone")


def _compile(compiler: list[str], path: Path) -> str:
    """Compiles to `path`, which appears complete or not at all. Why not, in one line, or nothing."""
    handle, name = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        reason = _run([*compiler, *FLAGS, "-o", name, str(SOURCE), "-lm"])
        if not reason and os.path.getsize(name) == 0:
            reason = "it wrote nothing"
        if not reason:
            os.chmod(name, 0o700)
            os.replace(name, path)
        return reason and f"the compiler {' '.join(compiler)} failed: {reason}"
    finally:
        Path(name).unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    """Runs a compiler with all the processes it starts. What went wrong, in one line, or nothing."""
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        except OSError as error:
            return first_line(error)
        try:
            code = process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"it took more than {SECONDS} s"
        finally:  # also after Ctrl-C: what it started must not go on
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").splitlines()
    errors = [line for line in lines if "error" in line.lower()] or lines or [f"exit status {code}"]
    return "" if code == 0 else errors[0].strip()[:200]
