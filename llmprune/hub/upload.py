"""From a finished folder to a repository of the hub: what belongs to it, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune import __version__
from llmprune.checkpoint.contents import CARD, INDEX, JOURNAL, MADE, RECORD, is_companion
from llmprune.checkpoint.reader import Checkpoint, read_json, read_record
from llmprune.hub.download import offline, one_line, retrying, status_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from llmprune.contracts import Reporter


def check_destination(repository: str, token: str | None) -> str:
    """The token to push with. Raises `ValueError` where nothing can be pushed there, without asking the hub."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ValueError(f"{repository!r} cannot be a hub repository: {one_line(error)}") from None
    if "/" not in repository:
        raise ValueError(
            f"name the repository as owner/name, for example your-name/{repository}; got {repository!r}"
        )
    if offline():
        raise ValueError("offline mode is on (HF_HUB_OFFLINE), and push needs the hub: turn it off")
    found = token or get_token()
    if not found:
        raise ValueError("push needs a token with write access: log in with `hf auth login` or set HF_TOKEN")
    if not (found.isascii() and found.isprintable()) or " " in found:
        raise ValueError(
            "the token holds characters no token has; log in again with `hf auth login` or set a valid HF_TOKEN"
        )
    return found


def belonging_files(folder: Path) -> list[str]:
    """What is published of a finished folder, and nothing else that lies in it. Raises `ValueError` where it is not finished."""
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}; push takes the output folder of llmprune run or prune")
    for name in (INDEX, "config.json", RECORD):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}, so it is no finished output folder; push takes one that llmprune run or prune wrote"
            )
    code = "auto_map" in read_json(folder / "config.json")
    companions = {p.name for p in folder.iterdir() if is_companion(p.name, code)}
    names = Checkpoint(folder).files | companions | {*MADE} - {JOURNAL}
    return sorted(name for name in names if (folder / name).is_file())


@dataclass(frozen=True)
class Destination:
    """Where a folder goes: a branch (None: `main`) of a repository `owner/name`; `private` is of one that is made."""

    repository: str
    revision: str | None
    private: bool
    token: str


def upload(
    folder: Path, files: list[str], card: str, to: Destination, check: Callable[[], None], reporter: Reporter
) -> dict[str, Any]:
    """Publish the files of a folder in one commit; what the hub already has is not sent again.

    Args:
        card: the text of the model card.
        check: raises `ValueError` where the weights are not what they were when they were counted.

    Raises:
        ValueError: the hub refuses or cannot be reached, in one line with the way out.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    client, repository, revision = HfApi(token=to.token), to.repository, to.revision
    with _told(to):
        created, hidden = _prepare(client, to)
        removals = _left_over(client, to, files)
        _check_card(client, card)
        contents = {
            name: card.encode() if name == CARD else folder / name
            for name in [*files, *({CARD} - set(files))]
        }
        additions = [CommitOperationAdd(name, content) for name, content in contents.items()]
        check()  # each file's hash is known from here on, and the hub takes nothing else
        commit = _send(client, to, additions, removals, _title(folder), reporter)
        _check_arrived(client, repository, commit, additions)
    return {
        "repository": repository,
        "url": f"{client.endpoint}/{repository}" + (f"/tree/{revision}" if revision else ""),
        "revision": revision,
        "commit": commit,
        "created": created,
        "private": hidden,
        "files": [{"name": a.path_in_repo, "bytes": a.upload_info.size} for a in additions],
        "bytes": sum(a.upload_info.size for a in additions),
        "removed": [r.path_in_repo for r in removals],
    }


def _prepare(client: HfApi, to: Destination) -> tuple[bool, bool]:
    """Make the repository and branch where they are not there: (whether it was created, whether it is private)."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        hidden = bool(
            retrying(lambda: client.model_info(to.repository), f"looking for {to.repository}").private
        )
        created = False
    except RepositoryNotFoundError:
        retrying(lambda: client.create_repo(to.repository, private=to.private), f"creating {to.repository}")
        hidden, created = to.private, True
    if to.private and not hidden:
        raise ValueError(
            f"{to.repository} is there and public: give --public (private=False) to publish in it, or name another repository"
        )
    branch = to.revision
    if branch is not None:
        retrying(
            lambda: client.create_branch(to.repository, branch=branch, exist_ok=True),
            f"creating branch {to.revision}",
        )
    return created, hidden


def _left_over(client: HfApi, to: Destination, files: list[str]) -> list[CommitOperationDelete]:
    """Weight files of an earlier push that this one replaces: a loader may prefer one to ours.

    Raises:
        ValueError: the repository holds weights that are not this program's to remove.
    """
    from huggingface_hub import CommitOperationDelete

    there = client.list_repo_files(to.repository, revision=to.revision)
    stale = sorted(
        n
        for n in set(there) - set(files)
        if "/" not in n and n.endswith((".safetensors", ".safetensors.index.json"))
    )
    if stale and RECORD not in there:
        raise ValueError(
            f"{to.repository} holds other weights ({stale[0]}), which loaders would mix up with these; name another repository"
        )
    return [CommitOperationDelete(path_in_repo=name) for name in stale]


def _check_card(client: HfApi, card: str) -> None:
    """Ask the hub whether it takes the card now, not after hours of upload."""
    from huggingface_hub.errors import BadRequestError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    def ask() -> None:
        headers = build_hf_headers(token=client.token)
        question = {"content": card, "repoType": "model"}
        hf_raise_for_status(
            get_session().post(f"{client.endpoint}/api/validate-yaml", json=question, headers=headers)
        )

    try:
        retrying(ask, "checking the model card")
    except BadRequestError as error:
        raise ValueError(
            f"the hub refuses the model card ({_server_words(error)}); edit the top of README.md and push again"
        ) from None


def _title(folder: Path) -> str:
    totals = read_record(folder)["totals"]
    return f"{totals['sparsity']:.1%} sparse, by llmprune {__version__}"


def _send(
    client: HfApi,
    to: Destination,
    additions: list[CommitOperationAdd],
    removals: list[CommitOperationDelete],
    title: str,
    reporter: Reporter,
) -> str:
    """The commit's id. The weights go first, file by file; then one commit makes all of it visible at once.

    `upload_folder` would commit in parts, and a reader in between would find half a model.
    A file the hub has (sent by a push that was interrupted) is recognised by its hash and not sent again.
    """
    large = [a for a in additions if a.path_in_repo.endswith(".safetensors")]
    reporter.stage(f"uploading to {to.repository}", len(large) + 1)
    for addition in large:
        one = [addition]
        retrying(
            lambda one=one: client.preupload_lfs_files(
                to.repository, one, revision=to.revision, free_memory=False
            ),  # type: ignore[misc]
            f"uploading {addition.path_in_repo}",
        )
        reporter.step()
    commit = retrying(
        lambda: client.create_commit(
            to.repository, [*additions, *removals], commit_message=title, revision=to.revision
        ),
        "committing",
    )
    reporter.step()
    return commit.oid


def _check_arrived(client: HfApi, repository: str, commit: str, additions: list[CommitOperationAdd]) -> None:
    from huggingface_hub.hf_api import RepoFile

    sizes = {
        f.path: f.size for f in client.list_repo_tree(repository, revision=commit) if isinstance(f, RepoFile)
    }
    for addition in additions:
        if (
            sizes.get(addition.path_in_repo) != addition.upload_info.size
        ):  # a .gitignore of the repository's, for one
            raise ValueError(
                f"{addition.path_in_repo} did not arrive whole in {repository} "
                f"({sizes.get(addition.path_in_repo)} of {addition.upload_info.size} bytes); look for a .gitignore there and push again"
            )


@contextmanager
def _told(to: Destination) -> Iterator[None]:
    """What the hub refuses, in one line with the way out and never with the token."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"nothing is visible in {to.repository} yet; the same push again sends only what is missing"
        ) from None
    except Exception as error:  # hub, network and transport errors share no base class
        if type(error) is ValueError and "\n" not in str(error):  # ours; the client's own take several lines
            raise
        raise ValueError(_not_pushed(error, to.repository, to.revision).replace(to.token, "***")) from error


def _not_pushed(error: Exception, repository: str, revision: str | None) -> str:
    from huggingface_hub.errors import RevisionNotFoundError

    status, line, owner = status_of(error), _server_words(error), repository.partition("/")[0]
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no branch {revision!r}, and one of that name cannot be made"
    if status == 401:
        return f"the hub refuses the token for {repository}: log in with `hf auth login` or set a valid HF_TOKEN, with write access"
    if status == 403:
        return f"the hub does not let this token write {repository} ({line}): use a token with write access for {owner!r}, or another owner"
    if status == 404:
        return f"the hub has no {repository!r}, or no owner {owner!r}, that this token may write ({line}); check the name and the token"
    if status == 409:
        return f"{repository} is taken, or being changed by someone else ({line}); wait and push again, or name another repository"
    if status in (402, 413):
        return f"the hub has no room for it ({line}); free some in the settings of {owner!r}, or name another owner"
    return f"cannot push to {repository} ({type(error).__name__}: {line}); the same push again sends only what is missing"


def _server_words(error: Exception) -> str:
    """The hub's own words where it has some; the client's otherwise."""
    words = getattr(error, "server_message", None)
    return " ".join(str(words).split())[:200] if words else one_line(error)
