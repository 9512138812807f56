"""Shared fixtures: tiny checkpoints, surroundings without network, the program in this process and others."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# A shell starts background jobs with Ctrl-C ignored, and children inherit it; some tests send it to them.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
NOWHERE = "http://127.0.0.1:9"  # a closed port: hub calls fail at once and never leave this machine
ENVIRONMENT = {
    "HF_ENDPOINT": NOWHERE,
    "LLMPRUNE_TIME_LIMIT": "0",  # without a recipe: dsnot, as the recipe best takes its time
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_XET": "1",
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
    "TOKENIZERS_PARALLELISM": "false",
}
UNSET = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_HUB_CACHE",
    "HF_DATASETS_CACHE",
    "HF_TOKEN_PATH",
    "COLUMNS",  # which pytest-xdist sets
)
# Files that begin first, and files that one worker does alone: what their fixtures make is made once.
LONGEST = (
    "test_demo",
    "test_run_reference",
    "test_machine_processes",
    "test_record",
    "test_hub_download",
    "test_run_resume",
)
TOGETHER = (
    "test_record",
    "test_hub_download",
    "test_hub_upload",
    "test_machine_processes",
    "test_machine_state",
    "test_checkpoint_hostile",
)

# huggingface_hub reads its variables when it is imported, so they are set before any test module is.
_HOME = Path(tempfile.mkdtemp(prefix="llmprune-tests-"))
_NUMBERS = itertools.count()
os.environ.update(ENVIRONMENT, HF_HOME=str(_HOME / "hf"), LLMPRUNE_CACHE=str(_HOME / "cache"))
for _name in UNSET:
    os.environ.pop(_name, None)
# Test processes run side by side, and the models are tiny: one thread each, unless the user has chosen.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import llmprune  # noqa: E402, I001  before torch: threads that wait then sleep
import pytest  # noqa: E402
import torch  # noqa: E402
from llmprune.machine import threads  # noqa: E402


def pytest_sessionfinish(session, exitstatus):
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """`-n auto`: as many as there are processors to use, and no more than memory is likely to bear."""
    return min(threads.usable_processors(), 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """`--dist loadscope`: every test by itself, but a file of TOGETHER as a whole."""
    from xdist.scheduler import LoadScopeScheduling

    class ByTest(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if Path(file).stem in TOGETHER else nodeid

    return ByTest(config, log) if config.getoption("dist") == "loadscope" else None


def pytest_collection_modifyitems(items):
    """What takes longest begins first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def own_caches(monkeypatch):
    """Every test has empty caches of its own and cannot reach the network through the hub."""
    home = _HOME / str(next(_NUMBERS))
    home.mkdir()
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for name in UNSET:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LLMPRUNE_CACHE", str(home / "cache"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    return home


@pytest.fixture(autouse=True)
def own_log():
    """The package's log at its usual level, whatever --quiet has made of it before."""
    logging.getLogger("llmprune").setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def no_plot():
    """Runs of tests draw no plot and write no texts unless they ask for them: both take longer than all the
    rest of a run this small.

    Models that several tests read have them.
    """
    from llmprune.record import report
    from llmprune.run import samples

    real = report.draw, samples.DEFAULT
    report.draw, samples.DEFAULT = lambda folder, record: None, 0
    yield
    report.draw, samples.DEFAULT = real


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory):
    """A factory of tiny random Llama checkpoints that speak the demo tokenizer's vocabulary.

    Treat the folders as read-only.
    """
    made: dict[tuple[object, ...], Path] = {}

    def make(
        *, dtype=torch.float32, tied=False, sharded=False, layers=2, tokenizer=True, seed=0, **config
    ) -> Path:
        key = (dtype, tied, sharded, layers, tokenizer, seed, *sorted(config.items()))
        if key not in made:
            folder = made[key] = tmp_path_factory.mktemp("models") / "tiny-llama"
            _save_llama(folder, dtype, tied, sharded, layers, seed, config)
            if tokenizer:
                for file in (ROOT / "llmprune" / "demo" / "model").glob("tokenizer*"):
                    shutil.copyfile(file, folder / file.name)
        return made[key]

    return make


def _save_llama(folder, dtype, tied, sharded, layers, seed, config):
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {
        "vocab_size": 2048,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{**values, **config})).to(dtype)
    torch.set_rng_state(state)
    model.save_pretrained(folder, max_shard_size="120KB" if sharded else "1GB")


@pytest.fixture(scope="session")
def tiny_llama(make_llama):
    """A tiny random Llama checkpoint: float32, one file, untied, two blocks."""
    return make_llama()


@pytest.fixture
def llama_copy(tiny_llama, tmp_path):
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "damaged"))


@pytest.fixture
def sharded_copy(make_llama, tmp_path):
    """A copy of a sharded tiny Llama that a test may damage."""
    return Path(shutil.copytree(make_llama(sharded=True), tmp_path / "sharded"))


@pytest.fixture(scope="session")
def calibration_tokens():
    """Calibration rows int64 [8, 32]."""
    return torch.randint(0, 2048, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def shared():
    """The folder of reference models, masks and data beside the checkout."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: the reference models and masks are not here")
    return folder


@pytest.fixture(scope="session")
def finished(tiny_llama, tmp_path_factory):
    """A tiny model pruned and scored. Treat as read-only."""
    output = tmp_path_factory.mktemp("finished") / "my-model"
    options = {"recipe": "wanda", "sparsity": 0.6, "calibration": "builtin", "samples": 4, "seqlen": 32}
    scored = {"perplexity": "builtin", "tasks": "demo_continuation", "limit": 4}
    return llmprune.run_model(tiny_llama, output=output, **options, **scored)


@pytest.fixture(scope="session")
def recovered(finished, tiny_llama, tmp_path_factory):
    """That model trained with its masks kept, and scored. Treat as read-only."""
    output = tmp_path_factory.mktemp("recovered") / "my-model"
    options = {"teacher": tiny_llama, "text": "builtin", "tokens": 2000, "seqlen": 32, "dtype": "float32"}
    scored = {"perplexity": "builtin", "tasks": "demo_continuation", "limit": 4}
    return llmprune.recover(finished.output, output=output, **options, **scored)


@pytest.fixture
def own_hub(tmp_path, monkeypatch):
    """A hub of the test's own that this process talks to, logged in, with an empty cache; `slept` is what was
    waited for.
    """
    from hub_server import TOKEN, serving
    from huggingface_hub import constants

    with serving(tmp_path / "hub") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", hub.slept.append)
        yield hub


@pytest.fixture(scope="session")
def forked():
    """`forked.start(args, cwd)`: the program in a process forked from one that has imported everything; see
    `forked.py`.
    """
    from forked import Parent

    parent = Parent()
    yield parent
    parent.end()


@pytest.fixture
def cli(tmp_path, forked):
    """The program in a process of its own in the test's own folder."""

    def call(*args, env=None, timeout=180) -> subprocess.CompletedProcess[str]:
        child = forked.start(args, tmp_path, env)
        out, err = child.communicate(timeout)
        return subprocess.CompletedProcess(args, child.returncode, out, err)

    return call


@pytest.fixture
def started(tmp_path):
    """The program in an interpreter of its own in the test's own folder, for what is decided when Python or a
    library starts.
    """

    def call(*args, env=None, timeout=180) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llmprune", *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return call


@pytest.fixture
def work(tmp_path, monkeypatch):
    """The current directory, which bad input must leave as it was."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def refused(tiny_llama, calibration_tokens, work):
    """`refused(pattern, ...)`: pruning so raises one line that matches, and `work` stays as it was."""
    from outputs import everything, one_line

    def check(said, model=None, call=None, **options):
        before = everything(work)
        values = {"calibration": calibration_tokens, "sparsity": 0.5, "output": "out", **options}
        given = {name: value for name, value in values.items() if value is not None}
        with pytest.raises(Exception, match=said) as caught:
            (call or llmprune.prune)(model or tiny_llama, **given)
        one_line(caught.value)
        assert everything(work) == before

    return check


@pytest.fixture
def typed(request, tmp_path, monkeypatch, capfd):
    """The program in this process, in `work` where the test has it and in `tmp_path` where not: (exit code,
    stdout, stderr).
    """
    from llmprune.__main__ import main

    monkeypatch.chdir(request.getfixturevalue("work") if "work" in request.fixturenames else tmp_path)

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["llmprune", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capfd.readouterr()
        return ended.value.code or 0, out, err

    return call
