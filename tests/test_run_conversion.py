"""Conversions that are killed: nothing half done stands in their place, and they go on to the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("faults.py")
SOME = "dense-to-packed,bitmask-to-dense"


@pytest.mark.parametrize(
    ("only", "kills"), [(SOME, 3), pytest.param("", 12, marks=pytest.mark.exhaustive, id="all")]
)
def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path, only, kills):
    command = [sys.executable, FAULTS, "--conversions", "--evenly", str(kills), "--only", only]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "every file as in an undisturbed run" in ended.stdout
