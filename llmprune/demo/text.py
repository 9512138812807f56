"""The text of the demo model: the standard library of the running Python, which every user already has.

It is split by module name, so that no held-out module is ever seen in training or calibration. The modules
below exist in every Python from 3.10 on. Their text differs a little between versions, and so do perplexities
measured on it; the record stores the Python version.
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

# Left out altogether, since they are no readable text (tables,
# bundled wheels) or tests, which differ between versions.
_SKIPPED = ("__phello__", "ensurepip", "encodings", "idlelib", "lib2to3", "site-packages", "test", "this")
_TABLE_FILES = ("_sysconfigdata", "topics.py", "entities.py", "_header_value_parser.py", "stringprep.py")
# C modules, which have no Python source: their docstrings are trained on.
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
    """The folder of the standard library. Raises `ValueError` if this Python has none with source files."""
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
    """The source of a module, or of each file of a package."""
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
    """Everything else, read one by one: sources of other modules, pydoc topics, docstrings of C modules."""
    root = _library()
    held_back = {*CALIBRATION_MODULES, *HELD_OUT_MODULES, *_SKIPPED}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if held_back.intersection(parts) or "tests" in parts or path.name.startswith(_TABLE_FILES):
            continue
        try:
            document = _read(path)
        except (SyntaxError, UnicodeDecodeError):  # a few files of the library are invalid on purpose
            continue
        if document:
            yield document
    yield from _topics()
    yield from _docstrings()


def _topics() -> list[str]:
    """The texts of Python's `help()`. All are used for training, since they quote each other at length."""
    from pydoc_data.topics import topics

    return [topics[name].strip() for name in sorted(topics)]


def _docstrings() -> list[str]:
    """The docstrings of the C modules, one document per module."""
    documents = []
    for name in _C_MODULES:
        module = __import__(name)
        document = io.StringIO()
        for attribute, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) else None
            if text:
                document.write(f"{name}.{attribute}\n{text}\n\n")
        documents.append(document.getvalue().strip())
    return [document for document in documents if document]
