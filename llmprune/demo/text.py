"""The demo model's text: what every user already has, the standard library of the running Python.

The split is by module, fixed by name, so that no held-out module is ever seen in training or calibration.
The modules below exist in every Python from 3.10 on; their text differs a little between versions, and so do
perplexities measured on it (the record stores the Python version).
"""

from __future__ import annotations

import inspect
import io
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

CALIBRATION_MODULES = (
    "bisect",
    "cmd",
    "contextlib",
    "copy",
    "difflib",
    "fnmatch",
    "getopt",
    "imaplib",
    "json",
    "optparse",
    "random",
    "selectors",
    "shelve",
    "subprocess",
    "timeit",
    "weakref",
)
HELD_OUT_MODULES = (
    "argparse",
    "calendar",
    "configparser",
    "csv",
    "fractions",
    "ftplib",
    "gettext",
    "graphlib",
    "heapq",
    "queue",
    "sched",
    "shutil",
    "smtplib",
    "statistics",
    "tempfile",
    "textwrap",
    "wave",
    "zipapp",
)

# Not text a reader would recognise (tables, vendored wheels, version-dependent tests): left out of every split.
_SKIPPED = ("__phello__", "ensurepip", "encodings", "idlelib", "lib2to3", "site-packages", "test", "this")
_TABLE_FILES = ("_sysconfigdata", "topics.py", "entities.py", "_header_value_parser.py", "stringprep.py")
# C modules whose docstrings are prose worth training on.
_C_MODULES = (
    "builtins",
    "array",
    "binascii",
    "cmath",
    "itertools",
    "math",
    "select",
    "sys",
    "time",
    "unicodedata",
    "zlib",
)


def _library() -> Path:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "argparse.py").is_file():
        raise ValueError(
            f"the demo text is the source of Python's standard library, but {sys.executable!r} ships none "
            "(no argparse.py in its library folder); use a full Python installation"
        )
    return root


def _read(path: Path) -> str:
    with tokenize.open(path) as handle:  # honours PEP 263 encoding cookies
        return handle.read().strip()


def _module_documents(name: str) -> list[str]:
    root = _library()
    if (root / f"{name}.py").is_file():
        return [_read(root / f"{name}.py")]
    files = sorted(p for p in (root / name).rglob("*.py") if "test" not in p.parts and "tests" not in p.parts)
    return [text for text in map(_read, files) if text]


def calibration_documents() -> list[str]:
    """Source text of the calibration modules, one document per file."""
    return [text for name in CALIBRATION_MODULES for text in _module_documents(name)]


def held_out_documents() -> list[str]:
    """Source text of the held-out modules, one document per file: for evaluation only."""
    return [text for name in HELD_OUT_MODULES for text in _module_documents(name)]


def training_documents() -> Iterator[str]:
    """Everything else: module sources, pydoc topics and the docstrings of C modules; read as they are asked for."""
    root = _library()
    held_back = {*CALIBRATION_MODULES, *HELD_OUT_MODULES, *_SKIPPED}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if held_back.intersection(parts) or "tests" in parts or path.name.startswith(_TABLE_FILES):
            continue
        try:
            document = _read(path)
        except (SyntaxError, UnicodeDecodeError):  # a few library files are broken on purpose
            continue
        if document:
            yield document
    yield from _topics()
    yield from _docstrings()


def _topics() -> list[str]:
    from pydoc_data.topics import topics

    # One module, so one side of the split: topics quote each other at length.
    return [topics[name].strip() for name in sorted(topics)]


def _docstrings() -> list[str]:
    documents = []
    for name in _C_MODULES:
        module = __import__(name)
        out = io.StringIO()
        for attribute, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) else None
            if text:
                out.write(f"{name}.{attribute}\n{text}\n\n")
        documents.append(out.getvalue().strip())
    return [d for d in documents if d]
