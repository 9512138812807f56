"""Short prompts that models go on with, so that a reader sees what pruning has done to their texts."""

from __future__ import annotations

# The demo model was trained on source code, others on text of all kinds. None ends with a space: tokens begin
# with one.
_CODE = (
    "def read_lines(path):",
    "class Counter:\n    def __init__(self",
    "import os\n\n\ndef list_files(folder):",
    "    if value is None:\n        raise",
    "for name, value in items",
    "    with open(path,",
    "try:\n    import json\nexcept",
    "def test_sum():\n    assert",
)
_PLAIN = (
    "The capital of France is",
    "To bake a loaf of bread, you need",
    "The sun rises in the east because",
    "Once there was a fisherman who",
    "Water boils at",
    "The most important thing about learning a language is",
    "In the year 1969,",
    "Dear Sir or Madam, I am writing to",
)
MOST = min(len(_CODE), len(_PLAIN))


def prompts(model: str, count: int) -> tuple[str, ...]:
    """The first `count` prompts for a model of this name, at most `MOST`."""
    return (_CODE if model == "demo" else _PLAIN)[:count]
