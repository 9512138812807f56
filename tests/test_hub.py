"""Models and datasets from the hub, over a server of its protocol on loopback."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import load_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`repositories`: ("models" | "datasets", "owner/name") -> folder.

    `refused`: the same and the action ("" for every one) -> (status, X-Error-Code).
    `once`: repositories whose revision is told once, then the hub is down for them.
    """

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Path] = {}
        self.refused: dict[tuple[str, str, str], tuple[int, str]] = {}
        self.once: set[tuple[str, str]] = set()
        self.requests: list[str] = []
        self.tokens: set[str] = set()
        self.url = ""

    def answer(self, path: str, query: dict[str, list[str]]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        kind, repository, rest = self._split(path)
        key = (kind, repository)
        action, _, rest = rest.partition("/")
        refusal = self.refused.get((*key, "")) or self.refused.get((*key, action))
        if refusal:
            return refusal[0], {"X-Error-Code": refusal[1], "X-Error-Message": f"refused: {refusal[1]}"}, b"{}"
        if key not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b"{}"
        revision, _, name = rest.partition("/")
        if action and revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}, b"{}"
        folder = self.repositories[key]
        if key in self.once and action == "revision":
            self.refused[(*key, "revision")] = (500, "")
        if action in ("", "revision"):
            return self._json(self._info(repository, folder))
        if action == "tree" and not (folder / name).is_dir():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b"{}"
        if action == "tree":
            return self._json(self._tree(folder, name, query.get("recursive") == ["true"]))
        if action == "paths-info":
            return self._json([entry for entry in self._tree(folder, "", True) if entry["path"] in query.get("paths", [])])
        return self._file(folder / name)

    def _split(self, path: str) -> tuple[str, str, str]:
        api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path)
        if api:
            return api[1], api[2], api[3] or ""
        plain = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/(resolve/.*)", path)
        return ("datasets" if plain[1] else "models", plain[2], plain[3]) if plain else ("", "", "")

    @staticmethod
    def _json(value: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()

    @staticmethod
    def _info(repository: str, folder: Path) -> dict[str, object]:
        files = [{"rfilename": str(p.relative_to(folder))} for p in sorted(folder.rglob("*")) if p.is_file()]
        flags = {"private": False, "gated": False, "disabled": False, "downloads": 0, "likes": 0, "tags": []}
        return {"_id": "0" * 24, "id": repository, "sha": COMMIT, "siblings": files, "lastModified": "2024-01-01T00:00:00.000Z", **flags}

    @staticmethod
    def _tree(folder: Path, below: str, recursive: bool) -> list[dict[str, object]]:
        found = sorted((folder / below).rglob("*") if recursive else (folder / below).iterdir())
        return [
            {
                "type": "file" if p.is_file() else "directory",
                "oid": _oid(p),
                "size": p.stat().st_size if p.is_file() else 0,
                "path": str(p.relative_to(folder)),
            }
            for p in found
        ]

    @staticmethod
    def _file(path: Path) -> tuple[int, dict[str, str], bytes]:
        if not path.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}, b""
        return 200, {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, path.read_bytes()


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes() if path.is_file() else path.name.encode()).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _serve(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            query = parse_qs(url.query)
            if body:
                is_json = "json" in (self.headers.get("Content-Type") or "")
                query |= {
                    k: v if isinstance(v, list) else [v] for k, v in (json.loads(body) if is_json else parse_qs(body.decode())).items()
                }
            hub.requests.append(f"{self.command} {self.path}")
            if self.headers.get("Authorization"):
                hub.tokens.add(self.headers["Authorization"])
            status, headers, content = hub.answer(unquote(url.path), query)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if status == 200 and wanted:
                start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
                status, headers["Content-Range"] = 206, f"bytes {start}-{end}/{len(content)}"
                content = content[start : end + 1]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = _serve

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub on a free loopback port, until the `with` ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


TOKEN = "hf_aVeryPrivateToken"
TEXT = "the quick brown fox jumps over the lazy dog and runs into the green hills beyond the river "
# Every call in one process: importing torch and transformers costs seconds.
CALLS = """
import json, time
import llmprune
from llmprune import text
from llmprune.hub import locate
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
attempt("commit", lambda: locate("owner/tiny", COMMIT).revision)
attempt("first", lambda: str(locate("owner/once").folder))
attempt("cached", lambda: str(locate("owner/once").folder))
attempt("inspect", lambda: llmprune.inspect("owner/tiny")["zeros"])
attempt("evaluate", lambda: llmprune.evaluate("owner/tiny", perplexity=["wikitext2"], limit=2)["perplexity"])
attempt("wikitext2", lambda: head(text.calibration_text("wikitext2", 0)[0]()))
attempt("c4 once", lambda: head(text.calibration_text("c4", 0)[0]()))
attempt("c4 again", lambda: head(text.calibration_text("c4", 0)[0]()))
attempt("c4 other seed", lambda: head(text.calibration_text("c4", 1)[0]()))
attempt("c4 evaluation", lambda: text.evaluation_text("c4"))
attempt("own dataset", lambda: head(text.calibration_text("owner/notes:body", 0)[0]()))
attempt("no such column", lambda: head(text.calibration_text("owner/notes:title", 0)[0]()))
attempt("no such dataset", lambda: head(text.calibration_text("owner/nothing:text", 0)[0]()))
for name in ("missing", "gated", "gated-files", "bad-token", "down", "pickle"):
    attempt(name, lambda: llmprune.prune(f"owner/{name}", output="unwritten", calibration="builtin", **small).record)
attempt("no such revision", lambda: llmprune.prune("owner/tiny", revision="v9", output="unwritten", calibration="builtin", **small).record)
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
            pyarrow.parquet.write_table(pyarrow.table(rows), wikitext / config / f"{split}-00000-of-00001.parquet")
        files = "".join(f"  - split: {split}\n    path: {config}/{split}-*\n" for split in ("test", "train"))
        configs.append(f"- config_name: {config}\n  data_files:\n{files}")
    (wikitext / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
    notes.mkdir()
    (notes / "train.jsonl").write_text("".join(json.dumps({"body": f"note {i}"}) + "\n" for i in range(20)))
    return {"allenai/c4": c4.parent, "Salesforce/wikitext": wikitext, "owner/notes": notes}


@pytest.fixture(scope="module")
def hub(make_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    pickled = folder / "pickle"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((make_llama() / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"never opened")
    with serving() as server:
        server.repositories |= {("datasets", name): path for name, path in dataset_folders(folder).items()}
        server.repositories |= {("models", f"owner/{name}"): make_llama() for name in ("tiny", "gated", "gated-files", "down", "once")}
        server.repositories["models", "owner/pickle"] = pickled
        server.once = {("models", "owner/once")}
        server.refused = {
            ("models", "owner/gated", ""): (403, "GatedRepo"),
            ("models", "owner/gated-files", "resolve"): (401, "GatedRepo"),
            ("models", "owner/bad-token", ""): (401, ""),
            ("models", "owner/down", ""): (500, ""),
        }
        yield server


def environment(hub, home):
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home / "hf"), "LLMPRUNE_CACHE": str(home / "cache"), "HF_TOKEN": TOKEN}


@pytest.fixture(scope="module")
def called(hub, tmp_path_factory):
    """(what every call gave, the folder they ran in)."""
    home = tmp_path_factory.mktemp("called")
    code = CALLS.replace("COMMIT", repr(COMMIT))
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=environment(hub, home), capture_output=True, text=True, timeout=170)
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


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("no such column", r"title.*it has: body"),
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


def test_quiet_is_quiet_while_downloading(hub, cli, tmp_path):
    options = ("--calibration", "builtin", "--samples", 4, "--seqlen", 32, "--quiet")
    done = cli("prune", "owner/tiny", "--output", "out", *options, env=environment(hub, tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "out" / "llmprune.json").is_file()


def test_a_refused_model_is_one_line_and_exit_code_1(hub, cli, tmp_path):
    done = cli("prune", "owner/gated", "--output", "out", env=environment(hub, tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "owner/gated is gated" in done.stderr
    assert list(tmp_path.glob("out*")) == []
