"""Finds the folder of a model: `demo`, an alias, a local folder, or a hub id, which is downloaded."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llmprune.common.messages import first_line, nearest
from llmprune.hub.aliases import ALIASES

_NEEDED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_SMALL = ["*.json"]  # what tells whether the model can be pruned
_WANTED = [*_NEEDED, "README.md", "LICENSE*", "NOTICE*"]  # the licence must accompany the weights
_UNWANTED = ["*/*", "consolidated*"]  # the same weights in other formats
_HUB_ID = r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*"
_PASSING = (408, 429, 500, 502, 503, 504)  # HTTP statuses that may be gone a moment later
_WAITS = (1.0, 2.0, 4.0)  # seconds before each further attempt
_LONGEST_WAIT = 300.0  # seconds; the hub limits requests per five minutes
_log = logging.getLogger(__name__)
T = TypeVar("T")
Check = Callable[[Path, str, bool], object]


@dataclass(frozen=True)
class Located:
    """A model on this machine.

    Attributes:
        folder: where its files are.
        label: its name in records; never a local path.
        revision: the commit, None for a local folder.
        remote: whether it came from the hub.
    """

    folder: Path
    label: str
    revision: str | None
    remote: bool


def demo_folder() -> Path:
    """The folder of the embedded demo model."""
    return Path(__file__).resolve().parent.parent / "demo" / "model"


def locate(
    model: str,
    revision: str | None = None,
    code: bool = False,
    check: Check | None = None,
) -> Located:
    """Find a model.

    From a hub id, download its safetensors and small files, and with `code` its Python files.

    Args:
        model: `demo`, an alias, a folder or a hub id.
        revision: branch, tag or commit on the hub.
        code: whether Python code of the checkpoint may run.
        check: called with the folder, the name and `code` before weights are downloaded; it may raise.

    Raises:
        ValueError: an unknown name, no such folder, or a failed download; the message says what to do.
    """
    path = Path(model).expanduser()
    if revision is not None and (model == "demo" or path.is_dir()):
        raise ValueError(
            f"{model} is not on the hub, so it has no revision {revision!r}; leave --revision out"
        )
    if model == "demo":
        return Located(demo_folder(), "demo", None, False)
    if path.is_dir():
        return Located(path, path.resolve().name, None, False)
    if path.is_file():
        raise ValueError(f"{model} is a file; name the checkpoint's folder")
    repository = ALIASES[model].repository if model in ALIASES else model
    if "/" not in repository:
        told = "demo, a name that llmprune models lists, a local folder, a hub id (owner/name)"
        raise nearest("model", model, ["demo", *ALIASES], told)
    if not re.fullmatch(_HUB_ID, repository, re.ASCII):
        raise ValueError(f"no such folder: {model} (and it is not a hub id of the form owner/name)")
    if check is not None:
        check(download(repository, revision, code, weights=False), repository, code)
    folder = download(repository, revision, code)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{repository} has no safetensors; if it has a pickle (.bin), which llmprune never opens, "
            "and you trust it, convert it: "
            "AutoModelForCausalLM.from_pretrained(ID).save_pretrained(NEW_FOLDER)"
        )
    return Located(folder, repository, folder.name, True)


def download(repository: str, revision: str | None, code: bool, weights: bool = True) -> Path:
    """Download a hub repository, or without `weights` its JSON files and its card, into the hub's own cache.

    Returns its folder there, which is named by the commit.

    Files in the cache are not downloaded again, and a file that was interrupted is continued.
    """
    try:
        if not weights:
            return _snapshot(repository, revision, [*_SMALL, "README.md"], _SMALL)
        extra = ["*.py"] if code else []
        return _snapshot(repository, revision, [*_WANTED, *extra], [*_NEEDED, *extra])
    except Exception as error:  # hub, network and transport errors share no base class
        raise ValueError(_not_downloaded(error, repository, revision)) from error


def _snapshot(repository: str, revision: str | None, wanted: list[str], needed: list[str]) -> Path:
    """The folder with the wanted files; without network those that are needed, from the cache, will do."""
    from huggingface_hub import snapshot_download

    bar = _bar(f"downloading {repository}")

    def fetch(patterns: list[str], local: bool = False) -> Path:
        found = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=_UNWANTED,
            local_files_only=local,
            tqdm_class=bar,
        )
        return Path(found)

    try:
        return retrying(lambda: fetch(wanted), f"downloading {repository}")
    except FileNotFoundError as error:  # the hub cannot be reached, and the cache is incomplete
        if getattr(error, "snapshot_path", None) is None:
            raise
        try:
            return fetch(needed, local=True)  # perhaps only the licence is missing
        except FileNotFoundError:
            raise error from None


def _bar(title: str) -> type:
    """A class of progress bars for the hub's client: one bar for the bytes of all files, instead of three.

    It is silent where the client's own bars would be.
    """
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            counts_bytes = options.get("unit") == "B" and not str(options.get("name")).endswith(".transfer")
            # With a delay, nothing is drawn before the first byte.
            options |= {"desc": title, "delay": 1e-9, "bar_format": None}
            super().__init__(*args, **(options if counts_bytes else {**options, "disable": True}))

        def set_description(self, *args: Any, **options: Any) -> None:
            """Called by the client at the end: keep the title, and the bar if anything was downloaded."""
            self.delay = 0
            if not self.n:
                self.disable = True
            self.close()

    return Bar


def retrying(work: Callable[[], T], doing: str) -> T:
    """The result of `work()`, which is tried again a few times if the hub is busy or the connection breaks.

    Each further attempt is logged as a warning. `doing` says what is being done, for that warning.
    """
    # The hub's client repeats some of its requests by itself,
    # but gives up on a status 500 in the middle of a download.
    for wait in _WAITS:
        try:
            return work()
        except Exception as error:
            if not _passing(error):
                raise
            wait = max(wait, _asked_wait(error))
            _log.warning("%s: %s; trying again in %g s", doing, one_line(error), wait)
        time.sleep(wait)
    return work()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its cause, the cause of that, and so on."""
    while error is not None:
        yield error
        error = error.__cause__


def _answer(error: BaseException) -> Any:
    """The HTTP response of the hub that caused an error; None if there was none."""
    responses = (getattr(cause, "response", None) for cause in _chain(error))
    return next((response for response in responses if response is not None), None)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that caused an error; None if there was none."""
    answer = _answer(error)
    return None if answer is None else answer.status_code


def _broken(error: BaseException) -> bool:
    """Whether an error is a connection that broke.

    One that could not be made is not worth another attempt.
    """
    names = {c.__name__ for c in type(error).__mro__ if c.__module__.startswith("httpx")}
    return "TransportError" in names and not names & {"ConnectError", "ProxyError", "UnsupportedProtocol"}


def _passing(error: Exception) -> bool:
    """Whether an error may be gone at the next attempt."""
    status = status_of(error)
    if status is not None:
        return status in _PASSING
    wrong_size = type(error) is OSError and error.errno is None  # the client's own check of a file
    return wrong_size or any(_broken(e) for e in _chain(error))


def _asked_wait(error: Exception) -> float:
    """Seconds for which the hub asks to wait, at most `_LONGEST_WAIT`; 0 if it does not ask."""
    headers = getattr(_answer(error), "headers", {})
    asked = re.fullmatch(r"[0-9]{1,6}", headers.get("Retry-After", "")) or re.search(
        r"r=0\s*;\s*t=([0-9]{1,6})", headers.get("RateLimit", "")
    )
    return min(float(asked[asked.lastindex or 0]), _LONGEST_WAIT) if asked else 0.0


def one_line(error: BaseException) -> str:
    """The message of an error of the hub's client, in one line and without the token."""
    from huggingface_hub import get_token

    causes = (e for e in _chain(error) if getattr(e, "response", None) is not None or _broken(e))
    line = first_line(next(causes, error))
    token = get_token()
    return line.replace(token, "***") if token else line


def offline() -> bool:
    """Whether the user has turned on offline mode (`HF_HUB_OFFLINE`)."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _not_downloaded(error: Exception, repository: str, revision: str | None) -> str:
    """The message for a failed download: the cause in one line, and what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status, login = status_of(error), "log in with `hf auth login`"
    if isinstance(error, GatedRepoError):
        return f"{repository} is gated: accept its licence on the hub, then {login} or set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{repository} has no revision {revision!r}; "
            "leave --revision out or name a branch, tag or commit of it"
        )
    if isinstance(error, RepositoryNotFoundError):
        return f"no folder and no hub repository {repository!r} (or it is private: {login})"
    if status == 401:
        return f"the hub refuses the token for {repository}: {login} or set a valid HF_TOKEN"
    if status == 403:
        return (
            f"the hub refuses {repository} ({one_line(error)}): {login} or set an HF_TOKEN that may read it"
        )
    if status == 429:
        return f"the hub counts too many requests (429) for {repository}: wait some minutes, or {login}"
    if offline():
        name = repository if revision is None else f"{repository} at {revision}"
        return (
            f"{name} is not wholly in the cache and offline mode is on (HF_HUB_OFFLINE): "
            "turn it off, or use a local folder or demo"
        )
    of_network = isinstance(error, (ConnectionError, TimeoutError))
    if isinstance(error, OSError) and error.errno is not None and not of_network:
        return (
            f"cannot store {repository} in the hub's cache ({one_line(error)}): "
            "make room there, or set HF_HOME to another folder"
        )
    return (
        f"cannot download {repository} ({type(error).__name__}: {one_line(error)}); "
        "without network, use a local folder or demo"
    )
