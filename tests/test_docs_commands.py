"""The commands and the Python of README.md and docs/*.md run as they stand there, in the order of their page.

A block is what a reader would copy: lines that begin with a command, or ```python. A block after the line
`NAME.yaml`: is written to that file. What a reader brings (a model, texts, a folder) is in STAND_INS; what
cannot run here is in NOT_RUN with the reason; what takes long is in SLOW and runs with the exhaustive tests.
A new block is in none of them: it runs, or a test fails.
"""

from __future__ import annotations

import gzip
import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import llmprune

ROOT = Path(__file__).resolve().parent.parent
PAGES = {page.name: page for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
FENCE = re.compile(r"([^\n]*)\n+^```(\w*)\n(.*?)^```$", re.M | re.S)
COMMAND = re.compile(r"(\$|llmprune|python|torchrun|accelerate|make|pip) ")
NAMED = re.compile(r"`([\w./-]+\.(?:yaml|jsonl))`:$")

HUB = "needs the hub"
COPIES = "a checkpoint of compressed-tensors, which test_checkpoint_bitmask.py makes and reads"
OWN_TEST = "its printed lines are compared as well, in"
SEVERAL = "several processes, which test_machine_processes.py starts"
SETS_UP = "makes an environment, and runs the tests"
NOT_RUN = {
    ("README.md", "make demo"): SETS_UP,
    ("README.md", "make test"): SETS_UP,
    ("README.md", "llmprune run llama-2-7b"): HUB,
    ("README.md", "llmprune convert OLD-BitM"): COPIES,
    ("README.md", "llmprune push OUTPUT_FOLDER"): HUB,
    (
        "adding-an-algorithm.md",
        '"""Fluctuation',
    ): "a file that the page has the reader write",
    ("adding-an-algorithm.md", "def fluctuation_score"): "a part of a test file",
    ("adding-an-algorithm.md", "@pytest.mark"): "a part of a test file",
    ("adding-an-algorithm.md", "$ python -m pytest"): "needs the files that the page has the reader write",
    ("adding-an-algorithm.md", "$ llmprune prune demo --pruner fluctuation"): "needs the file of the page",
    ("adding-an-algorithm.md", "$ llmprune prune demo --pruner fluctation"): "shows a refusal",
    ("bench.md", "python eval/bench/make_model.py"): "a model of 0.7 B parameters",
    ("bench.md", "llmprune prune big"): "a model of 0.7 B parameters",
    ("bench.md", "llmprune bench big70"): "a model of 0.7 B parameters",
    ("convert.md", "llmprune convert some-model"): COPIES,
    ("demo-model.md", "python -m llmprune.demo.train"): "half an hour of training",
    ("gpu.md", "python eval/bench/gpu.py"): "needs a GPU",
    ("gpu.md", "import llmprune"): "needs a GPU",
    ("large-models.md", "torchrun --nproc"): SEVERAL,
    ("large-models.md", "accelerate launch"): SEVERAL,
    ("large-models.md", "torchrun --nnodes"): SEVERAL,
    ("models.md", "llmprune run gpt-oss-20b"): HUB,
    ("pictures.md", "python eval/bench/make_model.py"): "a model of 0.1 B parameters",
    ("pictures.md", "llmprune prune big"): "a model of 0.1 B parameters",
    ("pictures.md", "llmprune bench big"): "a model of 0.1 B parameters",
    ("published.md", "import llmprune"): f"{OWN_TEST} test_literature.py",
    ("push.md", "llmprune push demo-0.7"): f"{HUB}; test_hub_upload.py has one of its own",
    ("recover.md", "torchrun --nproc"): SEVERAL,
    ("run.md", "llmprune run llama-2-7b"): HUB,
    ("train-it-yourself.md", "import difflib"): f"{OWN_TEST} test_keeping_page.py",
    ("train-it-yourself.md", "def train"): f"{OWN_TEST} test_keeping_page.py",
    ("train-it-yourself.md", "from transformers"): f"{OWN_TEST} test_keeping_page.py",
    ("train-it-yourself.md", "from peft"): f"{OWN_TEST} test_keeping_page.py",
}
SLOW = {
    ("README.md", "llmprune recover runs/demo-0.7"),
    ("README.md", "llmprune run demo --sparsity 0.8"),
    ("README.md", "llmprune run path/to/model --sparsity 0.5 --calibration"),
    ("README.md", "llmprune run path/to/model --pattern 2:4"),
    ("README.md", "llmprune prune path/to/model --sparsity 0.6"),
    ("README.md", "llmprune run path/to/model --sparsity 0.6 --format packed"),
    ("README.md", "llmprune sweep demo"),
    ("README.md", "llmprune bench OUTPUT_FOLDER"),
    ("README.md", "import llmprune"),
    ("bench.md", "llmprune bench out-0.7;"),
    ("bench.md", "llmprune bench out-0.7 --values"),
    ("pictures.md", "llmprune run demo --recipe sparsegpt --sparsity 0.7 --samples 32"),
    ("pictures.md", "llmprune recover demo-0.7"),
    ("pictures.md", "llmprune run demo --recipe wanda --sparsity 0.6"),
    ("pictures.md", "llmprune run demo --recipe wanda --sparsity 0.7"),
    ("pictures.md", "llmprune run demo --recipe sparsegpt --sparsity 0.5"),
    ("pictures.md", "llmprune run demo --recipe sparsegpt --sparsity 0.6"),
    ("pictures.md", "llmprune run demo --recipe sparsegpt --sparsity 0.7 --samples 16"),
    ("pictures.md", "llmprune compare"),
    ("calibration.md", "llmprune prune demo --recipe wanda --calibration self"),
    ("compare.md", "llmprune run demo --recipe sparsegpt"),
    ("compare.md", "llmprune compare"),
    ("calibration.md", "llmprune prune path/to/model --calibration path/to/valid.txt=0.7+self"),
    ("convert.md", "llmprune convert demo-packed"),
    ("convert.md", "llmprune convert demo-0.7 --to sparse-bitmask"),
    ("eval.md", "llmprune eval demo"),
    ("mask.md", "llmprune prune demo --recipe best-mask"),
    ("mask.md", "llmprune mask diff"),
    ("mask.md", "llmprune prune demo --masks wanda --recipe best "),
    ("mask.md", "llmprune prune demo --masks wanda --recipe dsnot"),
    ("mask.md", "llmprune prune demo --masks wanda --recipe wanda"),
    ("packed.md", "llmprune convert demo-dense"),
    ("python.md", "import llmprune"),
    ("recover.md", "llmprune prune demo"),
    ("recover.md", "llmprune recover demo-wanda"),
    ("recover.md", "llmprune recover demo --recipe gmp"),
    ("recover.md", "llmprune recover demo-pruned"),
    ("run.md", "llmprune run demo --sparsity 0.7"),
    ("sweep.md", "llmprune sweep demo"),
    ("sweep.md", "llmprune sweep path/to/model --recipe wanda,sparsegpt,best"),
    ("sweep.md", "import llmprune"),
}
ENDS_WITH = {("mask.md", "llmprune mask check tuned"): 1}  # it finds what the fine-tune has filled


@dataclass(frozen=True)
class Step:
    """What a reader does: run a command, run Python, or write a file."""

    page: str
    kind: str
    text: str
    name: str = ""

    def within(self, table):
        """The entry of a table that is of this step, or None."""
        return next((key for key in table if key[0] == self.page and self.is_called(key[1])), None)

    def is_called(self, begin):
        """Whether it begins so; a command with `;` after it is that whole command."""
        return self.text.partition("  #")[0].rstrip() + ";" == begin or self.text.startswith(begin)


def steps(page):
    """The steps of a page in their order."""
    found = []
    for before, kind, text in FENCE.findall(PAGES[page].read_text()):
        lines = [line for line in text.splitlines() if COMMAND.match(line)]
        named = NAMED.search(before)
        if named and (ROOT / named[1]).exists():
            continue  # a part of a file that ships
        if named:
            found.append(Step(page, "file", text, named[1]))
        elif kind == "python":
            found.append(Step(page, "python", text))
        elif lines and kind == "":
            assert COMMAND.match(text), f"{page}: commands stand apart from what they print: {lines[0]}"
            found += [Step(page, "command", line) for line in lines]
    return found


ALL = {page: steps(page) for page in PAGES}
RUN = {page: [step for step in found if not step.within(NOT_RUN)] for page, found in ALL.items()}
WITH_STEPS = [page for page, found in RUN.items() if any(step.kind != "file" for step in found)]


def test_the_tables_name_one_step_each():
    for table in (NOT_RUN, SLOW, ENDS_WITH):
        for key in table:
            of = [step for step in ALL[key[0]] if step.is_called(key[1])]
            assert len(of) == 1, f"{key} names {len(of)} steps of its page"
    assert not set(SLOW) & set(NOT_RUN)


def test_of_every_page_something_is_in_the_usual_tests():
    for page in WITH_STEPS:
        assert any(step.kind != "file" and not step.within(SLOW) for step in RUN[page]), page


# What a reader brings


def text(place, lines=2500):
    words = "Harbour towns along the coast grew rich on salt, cloth and herring, and lost it all again."
    place.write_text("\n \n".join(f"{number}. {words}" for number in range(lines)))


def rows(place):
    table = [
        {"body": f"Document {number} is about herring." * 40, "text": "All the same."}
        for number in range(200)
    ]
    if place.suffix == ".jsonl":
        place.write_text("".join(json.dumps(row) + "\n" for row in table))
    else:
        parquet.write_table(pyarrow.Table.from_pylist([{"text": row["body"]} for row in table]), place)


def questions(place):
    (place / "rte").mkdir(parents=True)
    (place / "blimp").mkdir()
    pairs = [
        {"premise": "It rained.", "hypothesis": "It was wet.", "label": number % 2} for number in range(8)
    ]
    (place / "rte/rte1_dev.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    pair = {"sentence_good": "They walk.", "sentence_bad": "They walks.", "UID": "agreement"}
    with gzip.open(place / "blimp/pairs.jsonl.gz", "wt") as file:
        file.write(8 * (json.dumps(pair) + "\n"))


def pruned(place, source):
    llmprune.prune(source, output=place, recipe="wanda", samples=4, seqlen=32, calibration="builtin")


def tuned(place):
    """The demo, pruned, and then trained by someone who knew nothing of masks."""
    pruned(place, "demo")
    shard = next(place.glob("model-00001*.safetensors"))
    weights = {name: torch.where(weight == 0, 0.01, weight) for name, weight in load_file(shard).items()}
    save_file({name: weight.to(torch.bfloat16) for name, weight in weights.items()}, shard)


def demo_of_make(place):
    """What `make demo` has written."""
    assert "llmprune run demo --sparsity 0.7 --output runs/demo-0.7" in (ROOT / "Makefile").read_text()
    llmprune.run_model("demo", sparsity=0.7, perplexity="builtin", limit=8, output=place)


STAND_INS = {
    "path/to/valid.txt": text,
    "path/to/test.txt": lambda place: text(place, 200),
    "path/to/data": questions,
    "docs.jsonl": rows,
    "docs.parquet": rows,
    "runs/demo-0.7": demo_of_make,
    "OUTPUT_FOLDER": lambda place: pruned(place, "path/to/model"),
    "OTHER_FOLDER": lambda place: pruned(place, "path/to/model"),
    "tuned": tuned,
    "out-0.5/masks": lambda place: pruned(place.parent, "path/to/model"),
}


def kernels():
    """The names that the example of kernels.md takes as given."""
    weight = torch.randn(8, 32, dtype=torch.bfloat16)
    keep = torch.rand(8, 32) < 0.5
    codes = torch.randint(-7, 8, (int(keep.sum()),), dtype=torch.int8)
    sizes = {"R": 8, "C": 32}
    return {"torch": torch, "weight": weight, "keep": keep, "q_values": codes, "x": weight[:3], **sizes}


# Running


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What a reader has in the cache after the first page: native code, calibration tokens."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def reader(tmp_path, monkeypatch, make_llama, cli, cache):
    """`reader(steps)`: does the steps in a folder of its own, with what a reader brings to them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMPRUNE_CACHE", str(cache))

    def call(wanted):
        said = "\n".join(step.text for step in wanted)
        (tmp_path / "path/to").mkdir(parents=True)
        shape = {"max_position_embeddings": 512, "vocab_size": 4096}
        shutil.copytree(make_llama(**shape), tmp_path / "path/to/model")
        for name, make in STAND_INS.items():
            if re.search(rf"(?<![\w/-]){re.escape(name)}\b", said):
                make(tmp_path / name)
        names = {"__name__": "page", **(kernels() if wanted[0].page == "kernels.md" else {})}
        for step in wanted:
            do(step, names, cli)

    return call


def do(step, names, cli):
    if step.kind == "file":
        Path(step.name).parent.mkdir(exist_ok=True)
        Path(step.name).write_text(step.text)
    elif step.kind == "python":
        exec(compile(step.text, step.page, "exec"), names)
    else:
        program, *words = shlex.split(step.text.removeprefix("$ "), comments=True)
        assert program == "llmprune", f"{step.page}: {step.text}: say in NOT_RUN why it is not run"
        done = cli(*words, timeout=1800)
        code = next((code for key, code in ENDS_WITH.items() if step.within([key])), 0)
        said = done.stdout[-1500:] + done.stderr[-1500:]
        assert done.returncode == code, f"{step.page}: {step.text}\n{said}"


@pytest.mark.parametrize("page", WITH_STEPS)
def test_what_is_quick_on_a_page(page, reader):
    reader([step for step in RUN[page] if not step.within(SLOW)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("page", [page for page in WITH_STEPS if any(s.within(SLOW) for s in RUN[page])])
def test_all_of_a_page(page, reader):
    reader(RUN[page])
