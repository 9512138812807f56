"""Threads: how many torch gets and how they wait, for this process and for those it starts."""

import json
import os
import subprocess
import sys

import pytest

from llmprune.machine import threads

ASKED = """
import json, os, sys
import llmprune, torch
names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
print(json.dumps([{name: os.environ.get(name) for name in names}, torch.get_num_threads()]))
"""


def started(code=ASKED, **environment):
    names = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("cpu_", "cpu.")).write_text(text)
    return folder


def test_threads_that_wait_sleep_soon_unless_the_user_chose():
    chosen, count = started()
    assert chosen["GOMP_SPINCOUNT"] == "20000" and count == threads.usable_processors()
    assert started(OMP_WAIT_POLICY="ACTIVE")[0] == {
        "OMP_WAIT_POLICY": "ACTIVE",
        "OMP_NUM_THREADS": None,
        "GOMP_SPINCOUNT": None,
    }
    assert started(GOMP_SPINCOUNT="7")[0] == {
        "OMP_WAIT_POLICY": None,
        "OMP_NUM_THREADS": None,
        "GOMP_SPINCOUNT": "7",
    }
    assert started(OMP_NUM_THREADS="1")[1] == 1


def test_the_affinity_mask_is_what_can_be_seen():
    one = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    assert started(one + ASKED)[1] == 1


def test_what_the_process_starts_waits_the_same_way():
    code = f"import llmprune, subprocess, sys; subprocess.run([sys.executable, '-c', {ASKED!r}])"
    assert started(code)[0]["GOMP_SPINCOUNT"] == "20000"


@pytest.mark.parametrize(
    ("files", "own", "wanted"),
    [
        ({"cpu_max": "150000 100000"}, "0::/\n", 2),
        ({"cpu_max": "100000 100000"}, "0::/\n", 1),
        ({"cpu_max": "5000 100000"}, "0::/\n", 1),
        ({"cpu_max": "max 100000"}, "0::/\n", 1 << 30),
        ({"cpu_max": "nonsense"}, "0::/\n", 1 << 30),
        ({}, "0::/\n", 1 << 30),
    ],
)
def test_quotas_of_the_second_version(tmp_path, files, own, wanted):
    group(tmp_path / "groups", **files)
    (tmp_path / "own").write_text(own)
    assert threads.granted_processors(tmp_path / "groups", tmp_path / "own") == wanted


def test_the_tightest_quota_above_the_group_counts(tmp_path):
    group(tmp_path / "groups" / "a" / "b", cpu_max="max 100000")
    group(tmp_path / "groups" / "a", cpu_max="300000 100000")
    (tmp_path / "own").write_text("0::/a/b\n")
    assert threads.granted_processors(tmp_path / "groups", tmp_path / "own") == 3


def test_quotas_of_the_first_version(tmp_path):
    group(tmp_path / "groups" / "cpu" / "box", cpu_cfs_quota_us="250000", cpu_cfs_period_us="100000")
    group(tmp_path / "groups" / "cpu", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    (tmp_path / "own").write_text("4:memory:/box\n1:cpu,cpuacct:/box\n0::/\n")
    assert threads.granted_processors(tmp_path / "groups", tmp_path / "own") == 3


def test_a_quota_below_what_can_be_seen_sets_the_number_of_threads(monkeypatch):
    monkeypatch.setattr(threads, "visible_processors", lambda: 64)
    monkeypatch.setattr(threads, "granted_processors", lambda: 3)
    environment = {}
    threads.settle(environment)
    assert environment == {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1", "OMP_NUM_THREADS": "3"}
    assert threads.usable_processors() == 3
    environment = {"OMP_NUM_THREADS": "8", "KMP_BLOCKTIME": "0"}
    threads.settle(environment)
    assert environment == {"OMP_NUM_THREADS": "8", "KMP_BLOCKTIME": "0"}
