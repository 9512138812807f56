"""Publishes a finished folder in a repository of the hub, in a single commit: completely or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmprune.checkpoint.contents import CARD, INDEX, JOURNAL, MADE, PLOTS, RECORD, is_companion
from llmprune.checkpoint.reader import Checkpoint, read_json, read_record
from llmprune.common.version import __version__
from llmprune.hub.download import offline, one_line, retrying, status_of

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    from llmprune.contracts import Reporter


def check_destination(repository: str, token: str | None) -> str:
    """The token to push with: the given one, or the one the user is logged in with.

    Raises:
        ValueError: nothing can be pushed to this repository, as far as can be told without asking the hub.
    """
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
            "the token holds characters no token has; "
            "log in again with `hf auth login` or set a valid HF_TOKEN"
        )
    return found


def belonging_files(folder: Path) -> list[str]:
    """The files of a finished output folder that are published.

    Raises `ValueError` if the folder is not finished.
    """
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}; push takes the output folder of llmprune run or prune")
    for name in (INDEX, "config.json", RECORD):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder} has no {name}, so it is no finished output folder; "
                "push takes one that llmprune run or prune wrote"
            )
    code = "auto_map" in read_json(folder / "config.json")
    companions = {p.name for p in folder.iterdir() if is_companion(p.name, code)}
    names = Checkpoint(folder).files | companions | {*MADE} - {JOURNAL}
    return sorted(name for name in names if (folder / name).is_file())


@dataclass(frozen=True)
class Destination:
    """Where a folder is published.

    Attributes:
        repository: `owner/name`.
        revision: the branch; None is `main`.
        private: whether the repository, if it is created, will be private.
        token: to push with.
    """

    repository: str
    revision: str | None
    private: bool
    token: str


def upload(
    folder: Path, files: list[str], card: str, to: Destination, check: Callable[[], None], reporter: Reporter
) -> dict[str, Any]:
    """Publish the files of a folder in one commit. Files that the hub already has are not sent again.

    Args:
        folder: the finished output folder.
        files: names of the files to publish.
        card: the text of the model card.
        to: where they are published.
        check: raises `ValueError` if the weights have changed since they were counted.
        reporter: shows the progress.

    Raises:
        ValueError: the hub refuses or cannot be reached; the message says what to do.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    client, repository, revision = HfApi(token=to.token), to.repository, to.revision
    with _errors_in_one_line(to):
        created, private = _prepare(client, to)
        removals = _left_over(client, to, files)
        _check_card(client, card)
        names = files if CARD in files else [*files, CARD]
        contents = [card.encode() if name == CARD else folder / name for name in names]
        additions = [CommitOperationAdd(*pair) for pair in zip(names, contents, strict=True)]
        # The hashes of the files were taken just now, and the
        # hub accepts no other content. So they are checked here.
        check()
        commit = _send(client, to, additions, removals, _title(folder), reporter)
        _check_arrived(client, repository, commit, additions)
    return {
        "repository": repository,
        "url": f"{client.endpoint}/{repository}" + (f"/tree/{revision}" if revision else ""),
        "revision": revision,
        "commit": commit,
        "created": created,
        "private": private,
        "files": [{"name": a.path_in_repo, "bytes": a.upload_info.size} for a in additions],
        "bytes": sum(a.upload_info.size for a in additions),
        "removed": [r.path_in_repo for r in removals],
    }


def _prepare(client: HfApi, to: Destination) -> tuple[bool, bool]:
    """Create the repository and the branch if they do not exist.

    Returns whether it was created and is private.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = retrying(lambda: client.model_info(to.repository), f"looking for {to.repository}")
        created, private = False, bool(found.private)
    except RepositoryNotFoundError:
        retrying(lambda: client.create_repo(to.repository, private=to.private), f"creating {to.repository}")
        created, private = True, to.private
    if to.private and not private:
        raise ValueError(
            f"{to.repository} is there and public: give --public (private=False) to publish in it, "
            "or name another repository"
        )
    branch = to.revision
    if branch is not None:
        retrying(
            lambda: client.create_branch(to.repository, branch=branch, exist_ok=True),
            f"creating branch {to.revision}",
        )
    return created, private


def _left_over(client: HfApi, to: Destination, files: list[str]) -> list[CommitOperationDelete]:
    """Removals of an earlier push's weights, which a loader might take instead of the new ones, and plots.

    Raises:
        ValueError: the repository holds weights that were not written by this program.
    """
    from huggingface_hub import CommitOperationDelete

    there = client.list_repo_files(to.repository, revision=to.revision)
    weights = {n for n in there if "/" not in n and n.endswith((".safetensors", ".safetensors.index.json"))}
    stale = sorted(weights - set(files))
    if stale and RECORD not in there:
        raise ValueError(
            f"{to.repository} holds other weights ({stale[0]}), which loaders would mix up with these; "
            "name another repository"
        )
    plots = sorted({*PLOTS} & {*there} - {*files}) if RECORD in there else []
    return [CommitOperationDelete(path_in_repo=name) for name in [*stale, *plots]]


def _check_card(client: HfApi, card: str) -> None:
    """Raise `ValueError` if the hub refuses the model card. Asked first, not after hours of upload."""
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
            f"the hub refuses the model card ({_server_words(error)}); "
            "edit the top of README.md and push again"
        ) from None


def _title(folder: Path) -> str:
    """The title of the commit."""
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
    """Upload the weights file by file, then make everything visible in one commit; returns the commit's id.

    The client's `upload_folder` would make several commits, and a reader in
    between would find an incomplete model. A file that the hub has, perhaps
    from an interrupted push, is recognised by its hash and not sent again.
    """
    large = [a for a in additions if a.path_in_repo.endswith(".safetensors")]
    reporter.stage(f"uploading to {to.repository}", len(large) + 1)

    def upload_file(addition: CommitOperationAdd) -> None:
        client.preupload_lfs_files(to.repository, [addition], revision=to.revision, free_memory=False)

    def make_commit() -> str:
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*additions, *removals]
        made = client.create_commit(to.repository, operations, commit_message=title, revision=to.revision)
        return made.oid

    for addition in large:
        retrying(partial(upload_file, addition), f"uploading {addition.path_in_repo}")
        reporter.step()
    commit = retrying(make_commit, "committing")
    reporter.step()
    return commit


def _check_arrived(client: HfApi, repository: str, commit: str, additions: list[CommitOperationAdd]) -> None:
    """Raise `ValueError` if a file of the commit is missing or incomplete."""
    from huggingface_hub.hf_api import RepoFile

    entries = client.list_repo_tree(repository, revision=commit)
    sizes = {entry.path: entry.size for entry in entries if isinstance(entry, RepoFile)}
    for addition in additions:
        name, wanted = addition.path_in_repo, addition.upload_info.size
        if (
            sizes.get(name) != wanted
        ):  # for example, the hub leaves out what a .gitignore of the repository names
            raise ValueError(
                f"{name} did not arrive whole in {repository} ({sizes.get(name)} of {wanted} bytes); "
                "look for a .gitignore there and push again"
            )


@contextmanager
def _errors_in_one_line(to: Destination) -> Iterator[None]:
    """Raise errors inside the `with` as `ValueError`: one line without the token that says what to do."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"nothing is visible in {to.repository} yet; the same push again sends only what is missing"
        ) from None
    except Exception as error:  # hub, network and transport errors share no base class
        if type(error) is ValueError and "\n" not in str(
            error
        ):  # ours; those of the client have several lines
            raise
        raise ValueError(_not_pushed(error, to.repository, to.revision).replace(to.token, "***")) from error


def _not_pushed(error: Exception, repository: str, revision: str | None) -> str:
    """The message for a failed push: the cause in one line, and what to do."""
    from huggingface_hub.errors import RevisionNotFoundError

    status, line, owner = status_of(error), _server_words(error), repository.partition("/")[0]
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no branch {revision!r}, and one of that name cannot be made"
    if status == 401:
        return (
            f"the hub refuses the token for {repository}: "
            "log in with `hf auth login` or set a valid HF_TOKEN, with write access"
        )
    if status == 403:
        return (
            f"the hub does not let this token write {repository} ({line}): "
            f"use a token with write access for {owner!r}, or another owner"
        )
    if status == 404:
        return (
            f"the hub has no {repository!r}, or no owner {owner!r}, that this token may write ({line}); "
            "check the name and the token"
        )
    if status == 409:
        return (
            f"{repository} is taken, or being changed by someone else ({line}); "
            "wait and push again, or name another repository"
        )
    if status in (402, 413):
        return (
            f"the hub has no room for it ({line}); "
            f"free some in the settings of {owner!r}, or name another owner"
        )
    return (
        f"cannot push to {repository} ({type(error).__name__}: {line}); "
        "the same push again sends only what is missing"
    )


def _server_words(error: Exception) -> str:
    """The hub's own message if it sent one, else the client's; in one line."""
    words = getattr(error, "server_message", None)
    return " ".join(str(words).split())[:200] if words else one_line(error)
