"""Fetching a model from the Hugging Face hub: its weights and what belongs to them, nothing that runs."""

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ssmcompress.errors import InputError, ResourceError

ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
BESIDE = ("*.json", "*.txt", "*.jinja", "tokenizer*", "*.model", "README.md", "LICENSE*", "NOTICE*")
SAFETENSORS = ("model*.safetensors",)
BIN = ("pytorch_model*.bin",)


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, with or without a revision."""
    return ID.fullmatch(name) is not None


def fetch(name: str, revision: str | None) -> Path:
    """The local folder of a model's commit, named by its hash; from the cache when the hub cannot be reached.

    Raises InputError for an unknown model or revision, ResourceError where it is neither in reach nor in the cache.
    """
    at = f"{name}@{revision}" if revision else name
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*BESIDE, *SAFETENSORS]))
        if not any(folder.glob(SAFETENSORS[0])):
            snapshot_download(name, revision=revision, allow_patterns=list(BIN))
    except GatedRepoError as error:
        raise ResourceError(
            f"Access to {at} must be granted by its owners.", hint="Ask on its hub page, then run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {revision!r}.", hint="Give a branch, tag or commit hash.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(
            f"There is no folder {name}, and no model of this name on the hub.",
            hint="Check the spelling; a private model needs `hf auth login`.",
        ) from error
    except (LocalEntryNotFoundError, HTTPError) as error:
        raise ResourceError(
            f"There is no folder {at}; the hub cannot be reached, and its cache does not hold a model of this name.",
            hint="Connect and unset HF_HUB_OFFLINE, or use a folder or a shipped checkpoint such as ref:mamba.",
        ) from error
    return folder
