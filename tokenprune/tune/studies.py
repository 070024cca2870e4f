"""Where a study lives: made anew or gone on with, in memory, in a database, or in a journal file."""

from __future__ import annotations

import json
import re
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, SQLAlchemyError

from tokenprune.cache import cache_folder
from tokenprune.errors import ConfigError
from tokenprune.files import given_path

_ATTEMPTS = 4
_JOURNAL = "journal:"
_ASKED = "tokenprune"  # the study's attribute that says what was asked


def cached_storage(name: str) -> str:
    """The SQLite file of a study in the user's cache folder, as a URL; a name that is a path stays inside it."""
    inside = quote(name, safe=" ").replace("..", "%2E%2E")
    file = cache_folder() / "studies" / f"{inside}.db"
    return URL.create("sqlite", database=str(file)).render_as_string()


def without_password(url: str) -> str:
    """A storage's URL as it may be shown."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return re.sub(r"(?<=:)[^:/@]*(?=@)", "***", url)


@contextmanager
def storage_errors(url: str | None) -> Iterator[None]:
    """What a storage that is damaged, full or read-only raises, as an error that says so.

    Raises:
        ConfigError: names the storage, and what it said.
    """
    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, sqlite3.Error) as error:
        cause = error.__cause__ or error
        reason = _masked(str(getattr(cause, "orig", None) or cause).splitlines()[0][:200], url)
        raise ConfigError(
            f"the study's storage {without_password(url or 'in memory')!r} cannot be used: {reason}; begin another "
            f"where it is damaged (study, or storage), and put it elsewhere where it is full or read-only"
        ) from error


def _masked(text: str, url: str | None) -> str:
    """A text from a database's driver without the password that it was given."""
    try:
        password = make_url(url).password if url else None
    except ArgumentError:
        password = None
    return text.replace(str(password), "***") if password else text


def open_storage(url: str | None, heartbeat: int) -> Any:
    """A storage by its URL.

    Args:
        url: of a database, as SQLAlchemy writes it ("sqlite:///study.db", "postgresql://..."); "journal:PATH" for a
            file that machines share; None for memory.
        heartbeat: seconds between signs of life of a running trial in a database; after four without one it counts
            as failed.

    Raises:
        ConfigError: it cannot be opened.
    """
    if url is None:
        return optuna.storages.InMemoryStorage()
    try:
        if url.startswith(_JOURNAL):
            path = given_path(url[len(_JOURNAL) :])
            path.parent.mkdir(parents=True, exist_ok=True)
            return _journal(path)
        options: dict[str, Any] = {}
        if url.startswith("sqlite:///"):
            Path(make_url(url).database or "").parent.mkdir(parents=True, exist_ok=True)
            options["engine_kwargs"] = {"connect_args": {"timeout": 60}}  # several workers write in turn
        return _database(url, heartbeat, options)
    except (SQLAlchemyError, ImportError, ValueError, OSError, RuntimeError) as error:
        reason = _masked(str(error).splitlines()[0][:200], url)
        raise ConfigError(
            f"cannot open the storage {without_password(url)!r}: {reason}; give a database's URL such as "
            f"sqlite:///study.db, or journal:PATH"
        ) from None


def _journal(path: Path) -> Any:
    """Whatever a journal that is none makes Optuna raise is an error about the file."""
    try:
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(path)))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no journal of Optuna's ({type(error).__name__}: {error})") from error


def _database(url: str, heartbeat: int, options: Mapping[str, Any]) -> Any:
    """Two workers that make the tables of a new database at the same time get into each other's way once."""
    for attempt in range(_ATTEMPTS):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.storages.RDBStorage(
                    url, heartbeat_interval=heartbeat, grace_period=4 * heartbeat, **options
                )
        except (IntegrityError, OperationalError):
            if attempt == _ATTEMPTS - 1:
                raise
            time.sleep(0.5)
    raise AssertionError  # the loop returns or raises


def open_study(
    name: str,
    asked: Mapping[str, Any],
    directions: Sequence[str],
    storage: Any,
    resume: bool,
) -> Any:
    """A study of that name.

    Args:
        name: of the study.
        asked: what it searches for; a study that is gone on with must have been asked the same.
        directions: of its objectives.
        storage: from `open_storage`.
        resume: go on with the one that is there, or make it.

    Raises:
        ConfigError: it is there already and `resume` was not asked for, or it is about something else.
    """
    wanted = json.loads(json.dumps(asked))
    try:
        study = optuna.create_study(
            storage=storage, study_name=name, directions=list(directions), load_if_exists=resume
        )
    except optuna.exceptions.DuplicatedStudyError:
        raise ConfigError(
            f"there is a study {name!r} already: go on with it (resume), or give the new one another name (study)"
        ) from None
    except ValueError as error:  # another number of objectives
        raise ConfigError(f"the study {name!r} cannot be gone on with: {error}") from None
    held = study.user_attrs.get(_ASKED)
    if held is None:
        study.set_user_attr(_ASKED, wanted)
    elif held != wanted:
        other = ", ".join(sorted(k for k in {*held, *wanted} if held.get(k) != wanted.get(k)))
        raise ConfigError(
            f"the study {name!r} was made for another {other}; give this one another name (study)"
        )
    return study
