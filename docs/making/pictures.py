"""Takes the pictures of docs/pictures.md: runs the commands of that page, then photographs what they made.

    .venv/bin/python docs/making/pictures.py [FOLDER]

Without a folder the commands run in a temporary one. In a folder that has the results already only the
pictures are taken. Pages need Chromium.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import chromium  # beside this script
from PIL import Image

DOCS = Path(__file__).resolve().parent.parent
# The name of a picture: what it is of, and of a page the size of the window and whether it is dark.
PICTURES = {
    "report": ("demo-0.7/report.html", 1280, 900, False),
    "report-phone": ("demo-0.7/report.html", 500, 1000, True),
    "report-matrices": ("demo-0.7/report-matrices.png",),
    "recovery": ("demo-recovered/report-training.png",),
    "compare": ("comparison/report.html", 1280, 900, False),
    "compare-by-sparsity": ("comparison/by-sparsity.png",),
    "bench": ("big-0.7-bench.png",),
}
WIDEST = 1280  # pixels
COLOURS = 64  # of the palette, which makes a picture of a page four times as small
LARGEST = 150_000  # bytes


def commands() -> list[str]:
    """The commands of the page, in their order."""
    blocks = re.findall(r"^```\n(.*?)^```$", (DOCS / "pictures.md").read_text(), re.M | re.S)
    return [line for block in blocks for line in block.splitlines()]


def carry_out(command: str, folder: Path) -> None:
    """Run a command of the page in a folder; scripts of the repository are found from there."""
    program, *words = shlex.split(command)
    words = ["-m", "llmprune", *words] if program == "llmprune" else [str(DOCS.parent / words[0]), *words[1:]]
    subprocess.run([sys.executable, *words], cwd=folder, check=True)


def photograph(page: Path, width: int, height: int, dark: bool, to: Path) -> None:
    """The first screen of a page in a window so large, light or dark."""
    program = chromium.program()
    if program is None:
        raise SystemExit(f"no browser: none of {', '.join(chromium.BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as home:
        command = chromium.command(program, home, (width, height), dark)
        command += [f"--screenshot={to}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def take(name: str, folder: Path) -> int:
    """Take one picture into `docs/pictures/`; returns its bytes."""
    source, *window = PICTURES[name]
    to = DOCS / "pictures" / f"{name}.png"
    to.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        raw = folder / source
        if window:
            photograph(folder / source, *window, raw := Path(place) / "page.png")
        picture = Image.open(raw).convert("RGB")
    picture.thumbnail((WIDEST, picture.height), Image.Resampling.LANCZOS)
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(to, optimize=True)
    return to.stat().st_size


def main() -> None:
    """Run what has not run yet, then take every picture."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if sys.argv[1:] else temporary)
        if not any(folder.glob("*")):
            for command in commands():
                carry_out(command, folder)
        for name in PICTURES:
            size = take(name, folder)
            print(f"{name}.png  {size:,} bytes{'' if size <= LARGEST else ', too large'}")


if __name__ == "__main__":
    main()
