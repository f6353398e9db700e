"""Suites: what `eval --suite NAME` measures, as small YAML files that come with the package."""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ssmcompress.errors import InputError
from ssmcompress.mapping import mapping, twice
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

    @field_validator("tasks")
    @classmethod
    def _once(cls, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
        tasks = [entry.task for entry in entries]
        if twice := [task for task in dict.fromkeys(tasks) if tasks.count(task) > 1]:
            raise ValueError(f"there twice: {', '.join(twice)}; write another suite for other settings")
        return entries

    @property
    def empty(self) -> bool:
        """Whether nothing is measured."""
        return not (self.tasks or self.perplexity or self.recall)

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


def listed(tasks: str | Sequence[str]) -> tuple[str, ...]:
    """Tasks by name, of which a text names several with commas; InputError where such a text names none."""
    if not isinstance(tasks, str):
        return tuple(tasks)
    if found := tuple(name.strip() for name in tasks.split(",") if name.strip()):
        return found
    raise InputError(f"--tasks {tasks!r} names no task.", hint="Write --tasks arc_easy_local, or leave it out.")


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
    hint = f"Shipped are {', '.join(names())}: see {shipped(TASKS).parent}."
    try:
        tree, fields = mapping(path.read_text(encoding="utf-8"))
        if said := twice(tree):
            raise InputError(f"The suite {path}: {'; '.join(said)}.")
        return Suite.model_validate(fields)
    except OSError as error:
        raise InputError(f"The suite {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"The suite {path} is not UTF-8 text.", hint=hint) from error
    except yaml.YAMLError as error:
        raise InputError(f"The suite {path} is not YAML: {' '.join(str(error).split())}.") from error
    except ValidationError as error:
        raise InputError(f"The suite {path}: {'; '.join(map(_mistake, error.errors()))}.", hint=hint) from error


def _mistake(found: Any) -> str:
    """One of pydantic's errors in a sentence."""
    where = ".".join(map(str, found["loc"])) or "the file"
    if found["type"] == "model_type":
        return f"{where}: expected a mapping" + (", such as {task: NAME}" if found["loc"] else ", with tasks:")
    if found["type"] == "extra_forbidden":
        known = (Entry if found["loc"][0] == "tasks" else Suite).model_fields
        close = difflib.get_close_matches(str(found["loc"][-1]), known, n=1)
        return f"{where}: there is no such key" + (f", did you mean {close[0]!r}?" if close else "")
    return f"{where}: {found['msg'].removeprefix('Value error, ')}"


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)
