"""Fetches models and data sets from the Hugging Face Hub whole, or says in one line what could not be fetched.

The libraries would ask file by file while they load, and wait for minutes when the hub has a bad day.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from open_r1.base.errors import FileMistake, MissingFile, first_line

MODEL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.safetensors")


def fetch(repo_id: str, files: Sequence[str], repo_type: str = "model", revision: str = "main") -> Path:
    """The local folder of a repository, with the files of these patterns; those that are cached are not fetched again.

    The folder's name is the commit. When the hub cannot be reached, what is cached is taken.

    Raises:
        FileMistake: it cannot be had; the line names it and the reason.
    """
    import httpx  # what the hub's client speaks through; both need half a second that local files do without
    from huggingface_hub import constants, get_session, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    def limit(request: httpx.Request) -> None:
        """Give a request a timeout: the client sets none for most, and would wait for a Hub that does not answer."""
        limits = request.extensions["timeout"]
        for phase in limits:
            limits[phase] = limits[phase] or constants.HF_HUB_ETAG_TIMEOUT

    session = get_session()
    hooks = session.event_hooks
    session.event_hooks = {"request": [*hooks["request"], limit]}
    try:
        return Path(snapshot_download(repo_id, repo_type=repo_type, revision=revision, allow_patterns=list(files)))
    except HFValidationError as error:
        raise MissingFile(f"{repo_id}: no such file or folder") from error
    except (OSError, httpx.HTTPError) as error:
        # The client says that it found nothing in its cache; why it looked there is behind that.
        known = isinstance(error, LocalEntryNotFoundError) and error.__cause__
        reason = f"{first_line(known or error)}; the same command tries again"
        if isinstance(error, RepositoryNotFoundError):
            reason = "the Hub has no such repository, or only for a login: `hf auth login`"
        if isinstance(error, GatedRepoError):  # also a RepositoryNotFoundError
            reason = "it asks for a login: accept its terms on its page, then `hf auth login`"
        raise FileMistake(f"{repo_id}: neither here nor to be had from the Hub ({reason})") from error
    finally:
        session.event_hooks = hooks


def model_folder(model_name_or_path: str | Path, revision: str = "main", files: Sequence[str] = MODEL_FILES) -> Path:
    """The folder of a model: itself, or where these files of the Hub's model of that name are."""
    folder = Path(os.path.expanduser(model_name_or_path))
    if folder.is_file():
        raise FileMistake(f"{folder} is a file; name the folder of a model")
    return folder if folder.is_dir() else fetch(str(model_name_or_path), files, revision=revision)
