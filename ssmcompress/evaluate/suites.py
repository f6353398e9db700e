"""Suites: what `eval --suite NAME` measures, as small YAML files that come with the package."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ssmcompress.errors import InputError
from ssmcompress.paths import expanded

TASKS = "tasks"  # the folder of the shipped tasks, beside the suites


class Entry(BaseModel):
    """One task to run: how many of its items, and how many examples are in the prompt; None: as the task says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)


class Suite(BaseModel):
    """Measures by name; `limit` and `num_fewshot` hold for the tasks that do not give their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    description: str = ""
    tasks: tuple[Entry, ...] = ()
    perplexity: str | None = None
    recall: bool = False
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)

    def with_tasks(self, names: Sequence[str]) -> "Suite":
        """The suite and these tasks beside it, each once."""
        known = {entry.task for entry in self.tasks}
        added = tuple(Entry(task=name) for name in dict.fromkeys(names) if name not in known)
        return self.model_copy(update={"tasks": self.tasks + added})

    def entries(self, limit: int | None, num_fewshot: int | None) -> tuple[Entry, ...]:
        """The tasks with every setting filled in; what is given here goes before what the suite says."""
        return tuple(
            Entry(
                task=entry.task,
                limit=_first(limit, entry.limit, self.limit),
                num_fewshot=_first(num_fewshot, entry.num_fewshot, self.num_fewshot),
            )
            for entry in self.tasks
        )


def shipped(name: str) -> Path:
    """A file or folder of the suites: beside the package's modules in a wheel, in `evals/suites` of a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "_suites", package.parent / "evals" / "suites"):
        if (folder / name).exists():
            return folder / name
    raise InputError(f"The shipped suite file {name} is missing.", hint="Install ssmcompress again.")


def names() -> list[str]:
    """The shipped suites."""
    return sorted(path.stem for path in shipped(TASKS).parent.glob("*.yaml"))


def read(name: str) -> Suite:
    """A suite by its shipped name, or by the path of a YAML file of the user's; InputError where it is neither."""
    if name not in names() and Path(name).suffix not in (".yaml", ".yml"):
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise InputError(f"There is no suite {name!r}.", hint=f"{hint}Shipped are {', '.join(names())}.")
    path = shipped(f"{name}.yaml") if name in names() else expanded(name)
    try:
        return Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"The suite {path} cannot be read: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise InputError(f"The suite {path} is not YAML: {' '.join(str(error).split())}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"The suite {path}: {where}: {first['msg']}.", hint="See the shipped suites.") from error


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
