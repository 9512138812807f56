"""Models and datasets from the hub, over a server of its protocol on loopback."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import COMMIT, TOKEN, Fault, serving
from safetensors.torch import load_file

from llmprune.hub.download import locate
from llmprune.model.opening import open_model

TEXT = "the quick brown fox jumps over the lazy dog and runs into the green hills beyond the river "
# Every call in one process: importing torch and transformers costs seconds.
CALLS = """
import json, time
import llmprune
time.sleep = lambda seconds: None  # what is waited for between attempts
from llmprune.text import sources as text
from llmprune.calibration.chat import Chats
from llmprune.hub.download import locate
from llmprune.model.opening import open_model
done = {}
def attempt(name, work):
    start = time.monotonic()
    try:
        done[name] = {"value": work()}
    except ValueError as error:
        done[name] = {"error": str(error)}
    done[name]["seconds"] = time.monotonic() - start
def head(documents): return [next(documents) for _ in range(3)]
small = {"samples": 4, "seqlen": 32}
attempt("prune", lambda: llmprune.prune("owner/tiny", output="pruned", **small).record)
attempt("push", lambda: llmprune.push("pruned", "owner/pushed"))
attempt("pushed", lambda: llmprune.inspect("owner/pushed"))
attempt("commit", lambda: locate("owner/tiny", COMMIT).revision)
attempt("first", lambda: str(locate("owner/once").folder))
attempt("cached", lambda: str(locate("owner/once").folder))
attempt("inspect", lambda: llmprune.inspect("owner/tiny")["zeros"])
attempt("evaluate", lambda: llmprune.evaluate("owner/tiny", perplexity=["wikitext2"], limit=2)["perplexity"])
attempt("wikitext2", lambda: head(text.calibration_text("wikitext2", 0)[0]()))
attempt("c4 once", lambda: head(text.calibration_text("c4", 0)[0]()))
attempt("c4 again", lambda: head(text.calibration_text("c4", 0)[0]()))
attempt("c4 other seed", lambda: head(text.calibration_text("c4", 1)[0]()))
attempt("c4 evaluation", lambda: "".join(text.evaluation_text("c4")))
attempt("own dataset", lambda: head(text.calibration_text("owner/notes:body", 0)[0]()))
attempt("chats", lambda: head(text.calibration_text("owner/chats", 0, Chats(None))[0]()))
attempt("bad chat", lambda: head(text.calibration_text("owner/chats:bad", 3, Chats(None))[0]()))
attempt("no such column", lambda: head(text.calibration_text("owner/notes:title", 0)[0]()))
attempt("no such dataset", lambda: head(text.calibration_text("owner/nothing:text", 0)[0]()))
small |= {"output": "unwritten", "calibration": "builtin"}
for name in ("missing", "gated", "gated-files", "bad-token", "down", "pickle"):
    attempt(name, lambda: llmprune.prune(f"owner/{name}", **small).record)
attempt("no such revision", lambda: llmprune.prune("owner/tiny", revision="v9", **small).record)
print(json.dumps(done))
"""


def dataset_folders(folder):
    c4, wikitext, notes = folder / "c4" / "en", folder / "wikitext", folder / "notes"
    c4.mkdir(parents=True)
    for name in ("c4-train.00000-of-01024", "c4-validation.00000-of-00008"):
        with gzip.open(c4 / f"{name}.json.gz", "wt") as handle:
            handle.writelines(json.dumps({"text": f"{name} {i} {TEXT * 5}"}) + "\n" for i in range(1200))
    configs = []
    for config in ("wikitext-103-raw-v1", "wikitext-2-raw-v1"):
        (wikitext / config).mkdir(parents=True)
        for split in ("test", "train"):
            rows = {"text": [f"{config} {split} {i} {TEXT * 3}" for i in range(60)]}
            pyarrow.parquet.write_table(
                pyarrow.table(rows), wikitext / config / f"{split}-00000-of-00001.parquet"
            )
        files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("test", "train"))
        configs.append(f"- config_name: {config}\n  data_files:\n{files}")
    (wikitext / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    notes.mkdir()
    (notes / "train.jsonl").write_text("".join(json.dumps({"body": f"note {i}"}) + "\n" for i in range(20)))
    chats = folder / "chats"
    chats.mkdir()
    turns = [
        [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": "an answer"}]
        for i in range(20)
    ]
    bad = [{"role": "user", "content": None}]
    (chats / "train.jsonl").write_text(
        "".join(json.dumps({"messages": chat, "bad": bad}) + "\n" for chat in turns)
    )
    return {
        "allenai/c4": c4.parent,
        "Salesforce/wikitext": wikitext,
        "owner/notes": notes,
        "owner/chats": chats,
    }


@pytest.fixture(scope="module")
def hub(make_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    pickled = folder / "pickle"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((make_llama() / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"never opened")
    with serving(folder / "pushed") as server:
        for name, path in dataset_folders(folder).items():
            server.add(name, path, "datasets")
        for name in ("tiny", "gated", "gated-files", "down"):
            server.add(f"owner/{name}", make_llama())
        server.add("owner/once", make_llama(), once=True)
        server.add("owner/pickle", pickled)
        server.faults = [Fault("GET /api/datasets/allenai/c4$", status=500)]
        server.refused = {
            ("models", "owner/gated", ""): (403, "GatedRepo"),
            ("models", "owner/gated-files", "resolve"): (401, "GatedRepo"),
            ("models", "owner/bad-token", ""): (401, ""),
            ("models", "owner/down", ""): (500, ""),
        }
        yield server


def environment(hub, home):
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "LLMPRUNE_CACHE": str(home / "cache"),
        "HF_TOKEN": TOKEN,
    }


@pytest.fixture(scope="module")
def called(hub, tmp_path_factory):
    """(what every call gave, the folder they ran in)."""
    home = tmp_path_factory.mktemp("called")
    code = CALLS.replace("COMMIT", repr(COMMIT))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=home,
        env=environment(hub, home),
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), home


def value(called, name):
    assert "value" in called[0][name], called[0][name].get("error")
    return called[0][name]["value"]


def error(called, name):
    """The error of a call: one line, soon."""
    answer = called[0][name]
    assert "error" in answer, answer
    assert "\n" not in answer["error"]
    assert answer["seconds"] < 10
    return answer["error"]


def test_a_hub_model_is_downloaded_and_pruned(called):
    record = value(called, "prune")
    assert record["model"]["source"] == "owner/tiny"
    assert record["model"]["revision"] == COMMIT
    assert record["totals"]["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert json.loads((called[1] / "pruned" / "llmprune.json").read_text())["model"]["revision"] == COMMIT


def test_a_hub_model_is_calibrated_on_c4_by_default(called, hub):
    assert value(called, "prune")["calibration"]["source"] == "c4"
    assert any("c4-train.00000-of-01024.json.gz" in request for request in hub.requests)
    assert hub.faults[0].times == 0, "a hub that is busy for a moment is asked again"


def test_what_was_pruned_is_pushed_and_found_again(called, hub):
    pushed, counts = value(called, "push"), value(called, "pushed")
    assert pushed["url"] == f"{hub.url}/owner/pushed" and hub.repositories["models", "owner/pushed"].private
    assert (counts["record_agrees"], counts["zeros"]) == (True, value(called, "prune")["totals"]["zeros"])


def test_the_pruned_hub_model_differs_from_the_source_only_where_masked(called, make_llama):
    from llmprune.checkpoint.masks import read_masks

    pruned = {}
    for shard in (called[1] / "pruned").glob("model-*.safetensors"):
        pruned |= load_file(shard)
    masks = read_masks(called[1] / "pruned" / "masks.safetensors")
    for name, dense in load_file(make_llama() / "model.safetensors").items():
        assert pruned[name].equal(dense * masks[name] if name in masks else dense), name


def test_no_file_of_the_output_holds_the_token(called, hub):
    assert f"Bearer {TOKEN}" in hub.tokens, "the token never reached the hub: the test shows nothing"
    for path in (called[1] / "pruned").iterdir():
        assert TOKEN.encode() not in path.read_bytes(), path.name


def test_only_wanted_files_are_downloaded(called, hub):
    assert value(called, "prune")
    assert not any("pytorch_model.bin" in request for request in hub.requests)


def test_a_commit_is_a_revision(called):
    assert value(called, "commit") == COMMIT


def test_inspect_takes_a_hub_id(called):
    assert value(called, "inspect") == 0


def test_evaluate_takes_a_hub_id_and_a_hub_text(called):
    scores = value(called, "evaluate")
    assert scores["wikitext2"]["value"] > 1
    assert scores["wikitext2"]["protocol"]["window"] == 64
    assert scores["wikitext2"]["protocol"]["windows"] == 2


def test_wikitext2_is_its_raw_training_text(called):
    assert all(document.startswith("wikitext-2-raw-v1 train") for document in value(called, "wikitext2"))


def test_c4_documents_follow_the_seed(called):
    first, again, other = (value(called, name) for name in ("c4 once", "c4 again", "c4 other seed"))
    assert all(document.startswith("c4-train") for document in first)
    assert first == again != other


def test_c4_evaluation_joins_the_first_1100_validation_documents(called):
    text = value(called, "c4 evaluation")
    assert text.count("c4-validation.00000-of-00008") == 1100
    assert text.startswith("c4-validation.00000-of-00008 0 ")


def test_a_column_of_any_hub_dataset(called):
    assert all(re.fullmatch(r"note \d+", document) for document in value(called, "own dataset"))


def test_chats_of_a_hub_dataset(called):
    assert all(
        re.fullmatch(r"user: question \d+\nassistant: an answer", document)
        for document in value(called, "chats")
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("no such column", r"title.*it has: body"),
        ("bad chat", r"dataset owner/chats, shuffled by seed 3, row 1, message 1 is no"),
        ("no such dataset", r"owner/nothing.*builtin.*\.txt"),
        ("missing", r"owner/missing.*hf auth login"),
        ("gated", r"owner/gated is gated.*licence.*HF_TOKEN"),
        ("gated-files", r"owner/gated-files is gated.*licence.*HF_TOKEN"),
        ("bad-token", r"owner/bad-token.*(hf auth login|HF_TOKEN)"),
        ("down", r"owner/down.*500.*local folder or demo"),
        ("no such revision", r"owner/tiny.*'v9'"),
        ("pickle", r"owner/pickle.*safetensors.*pickle.*convert"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_line(called, call, said):
    assert re.search(said, error(called, call)), error(called, call)
    assert not (called[1] / "unwritten").exists()


def test_a_downloaded_model_is_found_in_the_cache_when_the_hub_is_down(called):
    assert value(called, "cached") == value(called, "first")


def test_quiet_is_quiet_while_downloading(hub, started, tmp_path):
    options = ("--calibration", "builtin", "--samples", 4, "--seqlen", 32, "--quiet")
    done = started("prune", "owner/tiny", "--output", "out", *options, env=environment(hub, tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "llmprune.json").is_file()


def test_a_refused_model_is_one_line_and_exit_code_1(own_hub, make_llama, typed, tmp_path):
    own_hub.add("owner/gated", make_llama())
    own_hub.refused[("models", "owner/gated", "")] = (403, "GatedRepo")
    code, out, err = typed("prune", "owner/gated", "--output", "out")
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "owner/gated is gated" in err
    assert list(tmp_path.glob("out*")) == []


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def refusal(*names, **options):
    """The one line that `locate` answers with."""
    with pytest.raises(ValueError) as refused:
        locate(*names, **options)
    assert "\n" not in str(refused.value)
    assert TOKEN not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def tiny(own_hub, make_llama):
    """A hub with one model, `owner/tiny`."""
    own_hub.add("owner/tiny", make_llama())
    return own_hub


def test_a_file_cut_in_the_middle_goes_on_where_it_stopped(tiny, make_llama, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 4096)
    tiny.faults = [
        Fault(r"GET .*/model\.safetensors", cut=200_000),
        Fault(r"GET .*/model\.safetensors", cut=100_000),
    ]
    assert weights(locate("owner/tiny").folder) == weights(make_llama())
    first, second = (int(re.search(r"bytes=(\d+)-", request)[1]) for request in tiny.ranges)
    assert 190_000 < first <= 200_000 and 290_000 < second <= 300_000, "nothing that arrived is fetched again"


def test_a_connection_reset_in_the_middle_is_tried_again_and_told(tiny, make_llama, caplog):
    caplog.set_level("WARNING", "llmprune")  # a test that types --quiet may have come before
    tiny.faults = [Fault(r"GET .*/model\.safetensors", cut=100_000, reset=True)]
    assert weights(locate("owner/tiny").folder) == weights(make_llama())
    assert tiny.count("GET .*/config.json") == 1, "a file that is whole is not fetched again"
    assert re.search(r"downloading owner/tiny: .*reset by peer; trying again in 1 s", caplog.text)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(
    "request_",
    [
        "GET /api/models/owner/tiny/revision",
        "GET .*/tree/",
        "HEAD .*/config.json",
        r"GET .*/model\.safetensors",
    ],
)
def test_a_hub_that_is_busy_for_a_moment_is_asked_again(tiny, make_llama, request_, status):
    tiny.faults = [Fault(request_, times=2, status=status)]
    assert weights(locate("owner/tiny").folder) == weights(make_llama())
    assert tiny.faults[0].times == 0 and 1 <= len(tiny.slept) <= 4


@pytest.mark.parametrize("headers", [{"Retry-After": "77"}, {"RateLimit": '"api";r=0;t=77'}])
def test_the_wait_the_hub_asks_for_is_kept(tiny, headers):
    tiny.faults = [Fault("GET /api/models/owner/tiny/revision", status=429, headers=headers)]
    locate("owner/tiny")
    assert tiny.slept == [77]


def test_a_wait_beyond_reason_is_not(tiny):
    tiny.faults = [Fault("GET /api/models/owner/tiny/revision", status=429, headers={"Retry-After": "86400"})]
    locate("owner/tiny")
    assert tiny.slept == [300]


@pytest.mark.parametrize(
    ("status", "said"), [(429, r"429.*owner/tiny.*wait"), (500, r"owner/tiny.*500.*local folder or demo")]
)
def test_a_hub_that_stays_busy_is_given_up(tiny, status, said):
    tiny.faults = [Fault("GET /api/", times=10**6, status=status)]
    assert re.search(said, refusal("owner/tiny"))
    assert (tiny.count("GET /api/"), sum(tiny.slept)) == (4, 7)


@pytest.mark.parametrize("times", [1, 10**6])
def test_a_file_that_is_too_short_is_never_taken(tiny, make_llama, times):
    tiny.faults = [Fault(r"GET .*/model\.safetensors", times=times, short=1000)]
    if times == 1:
        assert weights(locate("owner/tiny").folder) == weights(make_llama())
    else:
        assert re.search(r"owner/tiny.*size \d+ but has size 1000", refusal("owner/tiny"))


def test_a_cached_model_is_not_downloaded_again(tiny):
    folder = locate("owner/tiny").folder
    tiny.requests.clear()
    assert locate("owner/tiny").folder == folder
    assert not tiny.count("/resolve/"), tiny.requests
    tiny.requests.clear()
    assert locate("owner/tiny", COMMIT).folder == folder
    assert tiny.requests == [], "a commit never changes"


def test_offline_mode_uses_the_cache_and_names_itself(tiny, monkeypatch):
    folder = locate("owner/tiny").folder
    tiny.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate("owner/tiny").folder == folder
    assert re.search(r"owner/other is not wholly in the cache.*HF_HUB_OFFLINE", refusal("owner/other"))
    assert re.search(r"owner/tiny at v2 .*HF_HUB_OFFLINE", refusal("owner/tiny", "v2"))
    (folder / "model.safetensors").unlink()
    assert re.search(r"owner/tiny is not wholly in the cache.*HF_HUB_OFFLINE", refusal("owner/tiny"))
    assert tiny.requests == []


@pytest.mark.parametrize("offline", [True, False])
def test_a_cache_that_lacks_only_the_licence_is_good_without_the_hub(
    own_hub, llama_copy, monkeypatch, offline
):
    (llama_copy / "README.md").write_text("---\nlicense: mit\n---\n")
    own_hub.add("owner/carded", llama_copy)
    folder = locate("owner/carded").folder
    (folder / "README.md").unlink()  # as an earlier version of the program, or another, left it
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    own_hub.faults = [Fault("GET /api/", times=10**6, status=500)]
    assert locate("owner/carded").folder == folder


def test_a_wrong_token_is_said_without_the_token(tiny, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_expiredLongAgo")
    said = refusal("owner/tiny")
    assert (
        re.search(r"refuses the token for owner/tiny.*hf auth login.*HF_TOKEN", said)
        and "expired" not in said
    )


def test_what_the_hub_says_is_told_without_the_token(tiny):
    tiny.faults = [Fault("GET .*/tree/", status=403, headers={"X-Error-Message": f"what is {TOKEN}?"})]
    assert re.search(r"the hub refuses owner/tiny \(403 .*what is \*\*\*", refusal("owner/tiny"))


def test_a_cache_that_cannot_be_written_is_said(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert re.search(
        r"cannot store owner/tiny in the hub's cache \(.*Not a directory.*HF_HOME", refusal("owner/tiny")
    )


def test_a_private_model_needs_a_token(own_hub, make_llama, monkeypatch):
    own_hub.add("owner/hidden", make_llama(), private=True)
    assert locate("owner/hidden").revision == COMMIT
    shutil.rmtree(own_hub.root.parent / "cache")
    monkeypatch.delenv("HF_TOKEN")
    assert re.search(r"owner/hidden.*private.*hf auth login", refusal("owner/hidden"))


@pytest.mark.parametrize("quiet", [False, True])
def test_a_download_shows_its_progress_on_a_terminal(tiny, typed, monkeypatch, quiet):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", screen := Terminal())
    tiny.faults = [Fault("GET .*/tree/", status=500)]
    code, _, _ = typed("inspect", "owner/tiny", *(["--quiet"] if quiet else []))
    assert code == 0
    shown = screen.getvalue()
    assert shown == "" if quiet else "downloading owner/tiny: 100%" in shown, shown
    monkeypatch.setattr("sys.stderr", again := Terminal())
    assert typed("inspect", "owner/tiny")[0] == 0
    assert again.getvalue() == "", "what is in the cache is not downloaded"


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("config.json", {"quantization_config": {"quant_method": "fp8"}}, r"quantised .*: fp8\)"),
        ("config.json", {"model_type": "llama17"}, r"is of model type 'llama17'"),
        ("adapter_config.json", {}, r"is a PEFT adapter"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_its_weights_are_downloaded(
    own_hub, make_llama, tmp_path, file, changes, said
):
    folder = shutil.copytree(make_llama(), tmp_path / "refused")
    held = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(held | changes))
    own_hub.add("owner/refused", folder)
    with pytest.raises(ValueError, match=rf"^owner/refused .*{said}"):
        open_model("owner/refused")
    assert own_hub.count("GET .*/config.json") == 1 and own_hub.count("safetensors") == 0
