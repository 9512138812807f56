"""How the native library is found and made, and that nothing but speed is lost where it cannot be."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from packed_matrices import Case, error, pattern, rows_of_x

from llmprune.common.folders import cache_folder
from llmprune.kernels import build, library, packing, products

COMPILER = pytest.mark.skipif(not library.available(), reason="no C compiler here")
ROOT = Path(__file__).resolve().parent.parent
MADE = cache_folder() / "kernels" / build.library_name()  # which the line above has built


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty cache, and a library not yet looked for."""
    monkeypatch.setenv("LLMPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_kept", [])
    return tmp_path


@pytest.fixture
def quick(fresh, monkeypatch):
    """A compiler that takes no time."""
    monkeypatch.setattr(build, "_compilers", lambda: [["cc"]])
    monkeypatch.setattr(build, "_run", lambda command: bool(shutil.copy(MADE, command[-3])) and "")
    return fresh


def only_compiler(folder, monkeypatch, script):
    """A machine whose one C compiler is a shell script, or that has none."""
    programs = folder / "bin"
    programs.mkdir()
    if script is not None:
        (programs / "cc").write_text(f"#!/bin/sh\n{script}\n")
        (programs / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)


def works_without_native_code(reason):
    """Products and packing are right, and the screen's words stand first."""
    assert not library.available() and library.paths() == []
    assert library.status().startswith("no native kernel here: no speed-up (")
    assert re.search(reason, library.status()) and "\n" not in library.status()
    case = Case((5, 130), "int4", pattern((5, 130), "some"))
    x = rows_of_x(2, 130, torch.float32)
    assert error(products.packed_linear(x, *case.checked()), case.product(x)) < 3e-6
    assert torch.equal(packing.expand(*case.parts[:2], (5, 130), torch.int8), case.dense * case.keep)
    assert not list(cache_folder().rglob("packed-*"))


def test_without_a_compiler(fresh, monkeypatch):
    only_compiler(fresh, monkeypatch, None)
    works_without_native_code("no C compiler: neither cc, gcc, clang nor the package ziglang is installed")


@pytest.mark.parametrize(
    "script,reason",
    [
        ("echo 'packed.c:7: error: no such thing' >&2; exit 1", "failed: packed.c:7: error: no such thing"),
        ("exit 3", "failed: exit status 3"),
        ("exit 0", "failed: it wrote nothing"),
        ("kill -9 $$", "failed: exit status -9"),
        ("exec /nowhere/cc1", "failed: .*"),
    ],
)
def test_a_broken_compiler_is_a_reason(script, reason, fresh, monkeypatch):
    only_compiler(fresh, monkeypatch, script)
    works_without_native_code(reason)


def test_a_compiler_that_hangs_ends_with_all_it_started(fresh, monkeypatch):
    only_compiler(fresh, monkeypatch, f"/bin/sleep 60 & echo $! > {fresh}/child; wait")
    monkeypatch.setattr(build, "SECONDS", 0.5)
    begun = time.monotonic()
    works_without_native_code("it took more than 0.5 s")
    assert time.monotonic() - begun < 20
    child = int((fresh / "child").read_text())
    for _ in range(100):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the compiler's child lives on")


def test_a_compiler_that_writes_no_library(fresh, monkeypatch):
    only_compiler(fresh, monkeypatch, 'while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"')
    assert not library.available() and "no speed-up" in library.status()


@COMPILER
def test_the_next_compiler_is_tried(fresh, monkeypatch):
    real = shutil.which("cc") or shutil.which("gcc")
    monkeypatch.setattr(build, "_compilers", lambda: [["/nowhere/cc"], ["false"], [real]])
    assert build.build().is_file()


@COMPILER
def test_it_is_built_once_into_a_private_folder(fresh, monkeypatch):
    assert library.available()
    (made,) = (fresh / "cache" / "kernels").iterdir()
    assert made.name == build.library_name() and made.parent.stat().st_mode & 0o777 == 0o700
    assert "thread" in library.status() and "no speed-up" not in library.status()
    library.forget()
    monkeypatch.setattr(build, "_compile", lambda *args: pytest.fail("built again"))
    assert library.available()


@COMPILER
def test_a_library_beside_the_source_comes_first(quick, monkeypatch):
    source = quick / "shipped" / "packed.c"
    source.parent.mkdir()
    source.write_bytes(build.SOURCE.read_bytes())
    beside = source.with_name(build.library_name())
    shutil.copy(build.build(), beside)
    monkeypatch.setattr(build, "SOURCE", source)
    assert build.candidates()[0] == beside
    beside.write_bytes(b"from another machine")  # cannot be loaded: the one in the cache is
    assert library.available()
    source.write_text("another source")
    assert build.candidates() == []  # both are of another source


@COMPILER
def test_a_library_is_shipped_beside_the_source(quick, monkeypatch):
    monkeypatch.setattr(build, "SOURCE", Path(shutil.copy(build.SOURCE, quick)))
    assert build.candidates() == []
    shipped = build.ship(["cc"])
    assert build.candidates() == [shipped]
    monkeypatch.setattr(build, "_run", lambda command: "no such target")
    with pytest.raises(ValueError, match="the compiler zig cc failed: no such target"):
        build.ship(["zig", "cc"])


@COMPILER
def test_a_damaged_library_is_built_again(quick):
    made = build.build()
    made.write_bytes(b"\x7fELF rubbish")
    library.forget()
    assert library.available() and made.stat().st_size > 10_000


@COMPILER
@pytest.mark.parametrize("how", ["open", "link", "everybody's"])
def test_a_folder_that_others_could_write_to_is_not_used(how, quick):
    made = build.build()
    if how == "open":
        made.parent.chmod(0o770)
    elif how == "link":
        made.parent.rename(quick / "elsewhere")
        made.parent.symlink_to(quick / "elsewhere")
    else:
        made.parent.parent.chmod(0o777)
    assert build.candidates() == []
    assert not library.available()
    assert re.search(r"not this user's alone|written to by everybody", library.status())


@COMPILER
def test_a_library_that_others_could_write_to_is_built_again(quick, monkeypatch):
    made = build.build()
    made.chmod(0o777)
    assert build.candidates() == []
    assert build.build().stat().st_mode & 0o022 == 0 and len(build.candidates()) == 1
    if os.geteuid() == 0:
        os.chown(made, 12345, 12345)
        assert build.candidates() == []


@COMPILER
def test_a_cache_that_cannot_be_written(fresh, monkeypatch):
    (fresh / "file").write_text("x")
    monkeypatch.setenv("LLMPRUNE_CACHE", str(fresh / "file"))
    assert not library.available() and "cannot be kept in the cache" in library.status()


@COMPILER
def test_processes_build_at_once(fresh):
    code = "from llmprune.kernels import build; print(build.build())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    said = {process.communicate(timeout=300)[0].strip() for process in both}
    assert said == {str(fresh / "cache" / "kernels" / build.library_name())}
    assert [path.name for path in (fresh / "cache" / "kernels").iterdir()] == [build.library_name()]
    assert library.available()


@COMPILER
def test_one_thread_where_torch_lends_none(quick, monkeypatch):
    """As with torch before 2.10."""
    monkeypatch.setattr(library, "_parallel_for", lambda: (None, "torch 2.9 lends no threads, 2.10 does"))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert library.available() and "1 thread (torch 2.9 lends no threads" in library.status()
        case = Case((5, 130), torch.bfloat16, pattern((5, 130), "some"))
        x = rows_of_x(1, 130, torch.float32)
        assert error(products.packed_linear(x, *case.checked()), case.product(x)) < 3e-6
    finally:
        torch.set_num_threads(before)


def test_another_byte_order_has_no_native_code(fresh, monkeypatch):
    monkeypatch.setattr(sys, "byteorder", "big")
    assert "little-endian" in library.status()
