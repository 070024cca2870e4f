"""A published table: model, tasks, budgets, methods and expected numbers, read from YAML and checked."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

import tokenprune
from tokenprune.errors import ConfigError

TABLES = Path(__file__).with_name("tables")
NONE = "none"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Task(_Part):
    """A task of lmms-eval.

    Attributes:
        name: there.
        metrics: whose sum is the score.
        scale: that makes the score what the papers print.
        unpruned: the published score of the unpruned model, where it is known.
    """

    name: str
    metrics: list[str] = Field(min_length=1)
    scale: float = 1.0
    unpruned: float | None = None


class TableMethod(_Part):
    """A method.

    Attributes:
        name: as in the table.
        args: model arguments, with {budget}.
        published: mean relative score in %, by budget; empty where nothing is published.
    """

    name: str
    args: str
    published: list[float] = []


class Tolerance(_Part):
    """Points by which an unpruned score (in % of the published one) and a mean relative score may be off."""

    unpruned: float
    mean: float


class Table(_Part):
    """See the attributes' names; `budget` and `metric` say in words what the numbers mean."""

    title: str
    model: str
    source: str
    budget: str
    metric: str
    batch_size: int
    dtype: str
    tasks: list[Task] = Field(min_length=1)
    tolerance: Tolerance
    budgets: list[str] = Field(min_length=1)
    methods: list[TableMethod]
    elsewhere: dict[str, list[float]] = {}

    @model_validator(mode="after")
    def _as_many_as_budgets(self) -> Table:
        for name, numbers in [*((a.name, a.published) for a in self.methods), *self.elsewhere.items()]:
            if numbers and len(numbers) != len(self.budgets):
                raise ValueError(f"{name} has {len(numbers)} numbers for {len(self.budgets)} budgets")
        return self

    def runs(self) -> dict[str, str]:
        """Model arguments of every run, by its folder's name; the unpruned one first."""
        runs = {NONE: "method=none"}
        for method in self.methods:
            for budget in self.budgets:
                args = method.args.format(budget=budget)
                runs[f"{method.name}-{budget}"] = args.replace("PUBLISHED", str(_published_profiles()))
        return runs


def table_names() -> list[str]:
    """Of the tables there are."""
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


def load_table(name: str) -> Table:
    """A table by name.

    Raises:
        ConfigError: there is none, or it is not what a table must be.
    """
    path = TABLES / f"{name}.yaml"
    if name not in table_names():
        raise ConfigError(f"there is no table {name!r}; choose one of {', '.join(table_names())}")
    try:
        return Table.model_validate(yaml.safe_load(path.read_text()))
    except ValidationError as error:
        raise ConfigError(f"the table {name!r} is not right: {error}") from None


def _published_profiles() -> Path:
    return Path(tokenprune.__file__).parent / "profiles" / "published"
