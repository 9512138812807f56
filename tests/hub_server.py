"""A server of the hub's protocol on loopback: download, upload, and faults on request."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_aVeryPrivateToken"
READER = "hf_mayOnlyRead"
LICENCES = ("apache-2.0", "mit", "llama2", "other")
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Repository:
    """Branches and commits are folders. `once`: its revision is told once, then the hub is down for it."""

    branches: dict[str, str]
    commits: dict[str, Path]
    private: bool = False
    once: bool = False
    ignored: tuple[str, ...] = ()

    def folder(self, revision: str) -> Path | None:
        return self.commits.get(self.branches.get(revision, revision))


@dataclass
class Fault:
    """What happens to the next requests that match `METHOD PATH`: a status, or the connection is cut.

    `cut`: after so many bytes of the answer's body (of the request's body for PUT). `short`: the answer ends
    after so many bytes, as if that were all. `reset`: the cut comes without a goodbye. `after`: the request
    takes effect, only its answer is lost.
    """

    request: str
    times: int = 1
    skip: int = 0  # so many pass before
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    short: int | None = None
    reset: bool = False
    after: bool = False


@dataclass
class Hub:
    """`refused`: ("models" | "datasets", "owner/name", action or "" for all) -> (status, X-Error-Code)."""

    root: Path
    url: str = ""
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    refused: dict[tuple[str, str, str], tuple[int, str]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    received: dict[str, int] = field(default_factory=dict)  # bytes of request bodies, by path
    ranges: list[str] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, name: str, folder: Path, kind: str = "models", **options) -> Repository:
        made = self.repositories[kind, name] = Repository({"main": COMMIT}, {COMMIT: folder}, **options)
        return made

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)

    def fault(self, request: str) -> Fault | None:
        with self.lock:
            found = next((f for f in self.faults if f.times > 0 and re.search(f.request, request)), None)
            if found and found.skip:
                found.skip -= 1
            elif found:
                found.times -= 1
                return found
            return None

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: bytes, token: str) -> Answer:
        """Status, headers and body for a request."""
        writes = re.search(
            r"/api/repos/create|/preupload/|/commit/|/branch/|/objects/batch|^/lfs/verify", path
        )
        if token not in ("", TOKEN, READER):
            return _error(401, "", "Invalid credentials in Authorization header")
        if writes and token != TOKEN:
            return _error(403 if token else 401, "", "You don't have the rights to do this")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return _validated(json.loads(body)["content"])
        if path.startswith("/lfs/"):
            return self._object(method, path.removeprefix("/lfs/"), body)
        batch = re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
        if batch:
            return self._batch(json.loads(body))
        return self._in_repository(path, query, body, token)

    def _in_repository(self, path: str, query: dict[str, list[str]], body: bytes, token: str) -> Answer:
        kind, name, rest = _split(path)
        action, _, rest = rest.partition("/")
        refusal = self.refused.get((kind, name, "")) or self.refused.get((kind, name, action))
        if refusal:
            return _error(*refusal, f"refused: {refusal[1]}")
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and not token):
            return _error(404, "RepoNotFound", "Repository not found")
        revision, _, inner = rest.partition("/")
        if action == "branch":
            known = repository.branches.setdefault(revision, repository.branches["main"])
            return _json({"commit": known})
        folder = repository.folder(revision or "main")
        if folder is None:
            return _error(404, "RevisionNotFound", "Invalid rev id")
        if repository.once and action == "revision":
            self.refused[kind, name, "revision"] = (500, "")
        if action == "preupload":
            return _json({"files": [_mode(f, folder, repository.ignored) for f in json.loads(body)["files"]]})
        if action == "commit":
            return self._commit(name, repository, revision, body)
        commit = repository.branches.get(revision or "main", revision)
        return _reading(action, name, repository, commit, folder, inner, query)

    def _create(self, asked: dict[str, str]) -> Answer:
        owner, name = asked["organization"], f"{asked['organization']}/{asked['name']}"
        if owner not in ("owner", "me"):
            return _error(
                403, "", f"You don't have the rights to create a model under the namespace {owner!r}"
            )
        if ("models", name) in self.repositories:
            return _error(409, "", "You already created this model repo")
        empty = self.root / name / COMMIT
        empty.mkdir(parents=True)
        (empty / ".gitattributes").write_text("*.safetensors filter=lfs\n")
        self.add(name, empty, private=asked.get("visibility") == "private")
        return _json({"url": f"{self.url}/{name}"})

    def _batch(self, asked: dict[str, list[dict[str, object]]]) -> Answer:
        """Where to put each object; one that is here gets no action."""
        there = [
            {**o}
            if o["oid"] in self.objects
            else {**o, "actions": {k: {"href": f"{self.url}/lfs/{v}"} for k, v in _places(o).items()}}
            for o in asked["objects"]
        ]
        return _json({"transfer": "basic", "objects": there})

    def _object(self, method: str, name: str, body: bytes) -> Answer:
        if method == "POST":
            asked = json.loads(body)
            return (
                _json({})
                if len(self.objects.get(asked["oid"], b"")) == asked["size"]
                else _error(404, "", "no such object")
            )
        if hashlib.sha256(body).hexdigest() != name:
            return _error(400, "", "content does not match its hash")
        self.objects[name] = body
        return _json({})

    def _commit(self, name: str, repository: Repository, revision: str, body: bytes) -> Answer:
        head, *operations = (json.loads(line) for line in body.splitlines())
        assert head["key"] == "header" and head["value"]["summary"]
        before = repository.commits[repository.branches[revision]]
        files = {p.name: p.read_bytes() for p in before.iterdir() if p.is_file()}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.objects:
                    return _error(400, "", f"LFS object of {value['path']} was not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            else:
                assert operation["key"] == "deletedFile"
                del files[value["path"]]
        commit = hashlib.sha1(body + repository.branches[revision].encode()).hexdigest()
        after = self.root / name / commit
        after.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            (after / path).write_bytes(content)
        repository.commits[commit] = after
        repository.branches[revision] = commit
        return _json(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.url}/{name}/commit/{commit}"}
        )


def _split(path: str) -> tuple[str, str, str]:
    api = re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path)
    if api:
        return api[1], api[2], api[3] or ""
    plain = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/(resolve/.*)", path)
    return ("datasets" if plain[1] else "models", plain[2], plain[3]) if plain else ("", "", "")


def _reading(
    action: str,
    name: str,
    repository: Repository,
    commit: str,
    folder: Path,
    inner: str,
    query: dict[str, list[str]],
) -> Answer:
    if action in ("", "revision"):
        files = [{"rfilename": str(p.relative_to(folder))} for p in sorted(folder.rglob("*")) if p.is_file()]
        flags = {
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
        }
        told = {
            "_id": "0" * 24,
            "id": name,
            "sha": commit,
            "siblings": files,
            "lastModified": "2024-01-01T00:00:00.000Z",
        }
        return _json({**told, **flags})
    if action == "tree" and not (folder / inner).is_dir():
        return _error(404, "EntryNotFound", "Entry not found")
    if action == "tree":
        return _json(_tree(folder, inner, query.get("recursive") == ["true"]))
    if action == "paths-info":
        return _json([entry for entry in _tree(folder, "", True) if entry["path"] in query.get("paths", [])])
    path = folder / inner
    if not path.is_file():
        return _error(404, "EntryNotFound", "Entry not found")
    return (
        200,
        {"ETag": f'"{_oid(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"},
        path.read_bytes(),
    )


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


def _json(value: object) -> Answer:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _error(status: int, code: str, message: str) -> Answer:
    return status, {"X-Error-Code": code, "X-Error-Message": message}, b"{}"


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes() if path.is_file() else path.name.encode()).hexdigest()


def _places(item: dict[str, object]) -> dict[str, str]:
    return {"upload": str(item["oid"]), "verify": "verify"}


def _mode(file: dict[str, str], folder: Path, ignored: tuple[str, ...]) -> dict[str, object]:
    """How the hub wants a file, and the hash of the one it has."""
    large, there = file["path"].endswith(".safetensors"), folder / file["path"]
    oid = None
    if there.is_file():
        content = there.read_bytes()
        oid = (
            hashlib.sha256(content).hexdigest()
            if large
            else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        )
    mode = "lfs" if large else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in ignored, "oid": oid}


def _validated(card: str) -> Answer:
    front = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
    if front.get("license", "mit") in LICENCES:
        return _json({"errors": [], "warnings": []})
    errors = [{"message": f'"license" must be one of {", ".join(LICENCES)}'}]
    return 400, {"Content-Type": "application/json"}, json.dumps({"errors": errors, "warnings": []}).encode()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # head and body are two writes

        def _body(self) -> bytes:
            if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _hang_up(self, reset: bool) -> None:
            self.close_connection = True
            if reset:  # the system discards what is unsent and tells the other side so
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.rfile.close()
                self.connection.close()

        def _serve(self) -> None:
            url = urlsplit(self.path)
            request = f"{self.command} {self.path}"
            fault = hub.fault(request)
            hub.requests.append(request)
            if fault and fault.cut is not None and self.command == "PUT":
                self.rfile.read(fault.cut)
                return self._hang_up(fault.reset)
            body = self._body()
            hub.received[url.path] = hub.received.get(url.path, 0) + len(body)
            if self.headers.get("Authorization"):
                hub.tokens.add(self.headers["Authorization"])
            if fault and fault.status:
                return self._reply(
                    fault.status, {"X-Error-Message": f"fault {fault.status}", **fault.headers}, b"{}"
                )
            query = parse_qs(url.query)
            if "/paths-info/" in url.path:
                query |= json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, headers, content = hub.answer(self.command, unquote(url.path), query, body, token)
            if fault and fault.after:
                return self._hang_up(fault.reset)
            if fault and fault.short is not None:
                content = content[: fault.short]
            self._reply(*self._part(status, headers, content), fault)

        def _part(self, status: int, headers: dict[str, str], content: bytes) -> Answer:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
            if status != 200 or not wanted:
                return status, headers, content
            hub.ranges.append(f"{self.path} {self.headers['Range']}")
            start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
            return (
                206,
                {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"},
                content[start : end + 1],
            )

        def _reply(
            self, status: int, headers: dict[str, str], content: bytes, fault: Fault | None = None
        ) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if fault and fault.cut is not None:
                self.wfile.write(content[: fault.cut])
                return self._hang_up(fault.reset)
            self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = _serve

        def log_message(self, *args: object) -> None:
            pass

    return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no news."""


@contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """A hub on a free loopback port, until the `with` ends; what is pushed to it lies below `root`."""
    hub = Hub(root)
    server = _Server(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
