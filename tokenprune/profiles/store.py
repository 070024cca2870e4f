"""Documents about models in the user's cache folder: one JSON file per kind and fingerprint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tokenprune.cache import cache_folder
from tokenprune.errors import ConfigError
from tokenprune.files import read_regular, write_whole

DocumentT = TypeVar("DocumentT", bound=BaseModel)
Line = Annotated[str, Field(max_length=400, pattern=r"^[ -~]*$")]  # nothing that steers a terminal
Number = Annotated[float, Field(allow_inf_nan=False)]
Fingerprint = Annotated[str, Field(pattern=r"^([0-9a-f]{32})?$")]  # "" for no model in particular


class Document(BaseModel):
    """A JSON document, or a part of one: no unknown fields, no types that are only alike."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, protected_namespaces=())


LARGEST = 2**20  # bytes


def stored_path(kind: str, model: str) -> Path:
    """The file of a kind of document about the model with that fingerprint."""
    return cache_folder() / kind / f"{model}.json"


def check_writable(kind: str) -> None:
    """Refuse a cache folder that cannot be written to, before anything is measured for it.

    Raises:
        ConfigError: says how to name another.
    """
    folder = stored_path(kind, "").parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ConfigError(
            f"nothing can be kept in {str(folder)!r}; set TOKENPRUNE_CACHE to a folder that can be written to"
        )


def write_document(document: BaseModel, path: Path) -> None:
    """Write a document; see `write_whole`.

    Raises:
        ConfigError: the file could not be written.
    """
    try:
        write_whole(path, document.model_dump_json(indent=1))
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror or error}") from error


def read_document(kind: type[DocumentT], path: Path, what: str) -> DocumentT:
    """A document from its file; nothing in it is ever executed.

    Args:
        kind: its class.
        path: of the file.
        what: what it is called in errors, "detected layer" for example.

    Raises:
        ConfigError: no such file, or something else in it; names the file and the field.
    """
    try:
        return kind.model_validate_json(read_regular(path, LARGEST))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise ConfigError(
            f"{path} is no {what} ({where}: {first['msg']}); remove it and make it again"
        ) from None
