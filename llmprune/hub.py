"""From the name of a model to a folder on this machine: `demo`, an alias, a local folder, or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmprune.registry import nearest

ALIASES = {
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "opt-125m": "facebook/opt-125m",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
}
_WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_UNWANTED = ["*/*", "consolidated*"]  # other formats of the same weights


@dataclass(frozen=True)
class Located:
    """A model on this machine. `label` names it in records: never a local path. `remote`: it came from the hub."""

    folder: Path
    label: str
    revision: str | None
    remote: bool


def demo_folder() -> Path:
    """The embedded model."""
    return Path(__file__).resolve().parent / "demo" / "model"


def locate(model: str, revision: str | None = None, code: bool = False) -> Located:
    """Find a model, downloading it (safetensors and small files only) when it is a hub id.

    Raises:
        ValueError: an unknown name, no such folder, or a download that failed, each with the way out.
    """
    path = Path(model).expanduser()
    if revision is not None and (model == "demo" or path.is_dir()):
        raise ValueError(f"{model} is not on the hub, so it has no revision {revision!r}; leave --revision out")
    if model == "demo":
        return Located(demo_folder(), "demo", None, False)
    if path.is_dir():
        return Located(path, path.resolve().name, None, False)
    if path.is_file():
        raise ValueError(f"{model} is a file; name the checkpoint's folder")
    repository = ALIASES.get(model, model)
    if "/" not in repository:
        raise nearest("model", model, ["demo", *ALIASES, "a local folder", "a hub id (owner/name)"])
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", repository):
        raise ValueError(f"no such folder: {model} (and it is not a hub id of the form owner/name)")
    folder = download(repository, revision, code)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{repository} has no safetensors; if it has a pickle (.bin), which llmprune never opens, and you trust it, convert it: "
            "AutoModelForCausalLM.from_pretrained(ID).save_pretrained(NEW_FOLDER)"
        )
    return Located(folder, repository, folder.name, True)


def download(repository: str, revision: str | None, code: bool) -> Path:
    """A snapshot of a hub repository in the hub's own cache (its folder is named by the commit)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [*_WANTED, "*.py"] if code else _WANTED
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except GatedRepoError:
        raise ValueError(
            f"{repository} is gated: accept its licence on the hub, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{repository} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise ValueError(f"no folder and no hub repository {repository!r} (or it is private: log in with `hf auth login`)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise ValueError(f"the hub refuses {repository}: log in with `hf auth login` or set a valid HF_TOKEN") from None
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(
            f"cannot download {repository} ({type(error).__name__}: {line}); without network, use a local folder or demo"
        ) from error
