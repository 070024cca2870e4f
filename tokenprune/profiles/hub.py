"""Profiles on the Hugging Face hub: one JSON file of a repository, checked as any other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenprune.errors import ConfigError
from tokenprune.profiles.store import LARGEST

FILE = "tokenprune.json"
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,99}\.json", re.ASCII)


def upload(content: bytes, repo_id: str, file: str = FILE, **options: Any) -> str:
    """Put a profile into a model repository, which is made where it is missing.

    Args:
        content: its JSON.
        repo_id: "owner/name".
        file: its name there.
        options: of `huggingface_hub.HfApi`: token, endpoint.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: a name that is none, or whatever the hub refuses.
    """
    import huggingface_hub as hub

    _check_name(file)
    try:
        api = hub.HfApi(**options)
        api.create_repo(repo_id, exist_ok=True)
        done = api.upload_file(
            path_or_fileobj=content,
            path_in_repo=file,
            repo_id=repo_id,
            commit_message="Add a tokenprune pruning profile",
        )
    except Exception as error:  # what the hub and its transport raise has no common base
        raise ConfigError(f"cannot put the profile into {repo_id!r}: {_line(error)}") from error
    return str(done)


def download(repo_id: str, file: str = FILE, revision: str | None = None, **options: Any) -> Path:
    """A profile's file from a repository, in the hub's cache; not read yet.

    Args:
        repo_id: "owner/name".
        file: its name there.
        revision: branch, tag or commit; a commit cannot change.
        options: of `huggingface_hub.HfApi`: token, endpoint.

    Raises:
        ConfigError: a name that is none, a file too large for a profile, or whatever the hub refuses.
    """
    import huggingface_hub as hub

    _check_name(file)
    try:
        api = hub.HfApi(**options)
        if not hub.constants.HF_HUB_OFFLINE:
            (known,) = api.get_paths_info(repo_id, file, revision=revision) or (None,)
            size = getattr(known, "size", None)
            if size is not None and size > LARGEST:
                raise ConfigError(f"{file} in {repo_id!r} is too large for a pruning profile: {size} bytes")
        return Path(api.hf_hub_download(repo_id, file, revision=revision))
    except ConfigError:
        raise
    except Exception as error:  # what the hub and its transport raise has no common base
        raise ConfigError(f"cannot read {file} from {repo_id!r}: {_line(error)}") from error


def _check_name(file: str) -> None:
    if not isinstance(file, str) or not _NAME.fullmatch(file):
        raise ConfigError(f"a profile's file is a plain name that ends in .json, not {file!r:.80}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
