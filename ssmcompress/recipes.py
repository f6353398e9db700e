"""Recipe files: those that are shipped, a user's own, overrides, and mistakes told with their lines."""

import contextlib
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from ssmcompress.errors import InputError, RecipeError, ResourceError
from ssmcompress.events import Emit, Finished, Output, Table, ignore
from ssmcompress.mapping import mapping, twice
from ssmcompress.paths import expanded
from ssmcompress.recipe import SECTIONS, Recipe, sentence, where_in
from ssmcompress.steps import SPARSESSM, Cut, step_kind


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name: beside it in a wheel, in `recipes` of a checkout."""
    package = Path(__file__).parent
    for folder in (package / "_recipes", package.parent / "recipes"):
        if folder.is_dir():
            found = sorted(folder.rglob("*.yaml"))
            return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}
    return {}


def ls(*, emit: Emit = ignore) -> dict[str, Recipe]:
    """The shipped recipes by name, with what each is for."""
    found = {name: read(name) for name in shipped()}
    rows = tuple((name, made.model, made.description) for name, made in found.items())
    emit(Table("", ("recipe", "model", "what it does"), rows))
    return found


def cat(name: str, *, emit: Emit = ignore) -> str:
    """The text of a recipe."""
    text = _text(_find(name))
    emit(Output(text))
    return text


def cp(name: str, to: str | Path, *, emit: Emit = ignore) -> Path:
    """Copies a recipe, to be changed; InputError where the file exists already."""
    text = _text(_find(name))
    target = expanded(to)
    if target.is_dir():
        target = target / f"{Path(name).name.removesuffix('.yaml')}.yaml"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise InputError(f"{target} exists already.", hint="Choose another name.") from None
    except OSError as error:
        with contextlib.suppress(OSError):
            target.unlink()
        hint = "Is there room and permission?" if target.parent.is_dir() else "Is the folder there?"
        raise ResourceError(f"{target} cannot be written: {error.strerror}.", hint=hint) from error
    emit(Finished(str(target)))
    return target


def read(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe by its shipped name or path, with `key=value` overrides; RecipeError tells every mistake and its line.

    A key is a path (steps.0.sparsity), or the last part of it where only one place has it (sparsity).
    """
    return parse(_text(_find(name)), name, overrides)


def parse(text: str, name: str = "the recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML text; RecipeError where it is none."""
    try:
        tree, fields = mapping(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {error}.") from None
    if not isinstance(fields, dict) or not isinstance(tree, yaml.MappingNode):
        raise RecipeError(f"{name} is not a mapping.", hint="It starts with `model:` and `steps:`.")
    changed = [_override(fields, assignment) for assignment in overrides]
    for place, key, value in changed:
        for rival in _rivals(key, value):
            if isinstance(place, dict) and not any(each is place and rival == other for each, other, _ in changed):
                place.pop(rival, None)
    try:
        made = Recipe.model_validate(fields)
    except ValidationError as error:
        found = [f"line {_line(tree, where_in(item['loc']))}: {sentence(item)}" for item in error.errors()]
        raise RecipeError(f"{name} is not valid.\n" + "\n".join(twice(tree) + found)) from None
    if found := twice(tree):
        raise RecipeError(f"{name} is not valid.\n" + "\n".join(found))
    return made


def _find(name: str) -> Path:
    path = shipped().get(name, expanded(name))
    if path.is_file():
        return path
    near = get_close_matches(name, shipped(), n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "`ssmcompress recipes ls` lists those that are shipped."
    raise RecipeError(f"There is no recipe {name!r}.", hint=hint)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise ResourceError(f"{path} cannot be read: {error.strerror}.") from error


def _rivals(key: str, value: Any) -> tuple[str, ...]:
    """What a recipe says of a step that has no meaning once this is said of it."""
    if value is None:
        return ()
    if key == "method" and value in ("sparsegpt", *SPARSESSM):
        return ("scope",)
    return {"pattern": ("sparsity", "scope"), "sparsity": ("pattern",), "keep": ("target",), "target": ("keep",)}.get(
        key, ()
    )


def _override(fields: dict[str, Any], assignment: str) -> tuple[Any, str, Any]:
    """Changes the fields; returns the place, its key and the new value."""
    key, equals, value = assignment.partition("=")
    if not equals:
        raise RecipeError(f"{assignment!r} is not key=value.", hint="For example: sparsity=0.6")
    *way, last = _path(fields, key)
    place: Any = fields
    try:
        for part in way:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[int(part) if isinstance(place, list) else part]
        tree, found = mapping(value)
        if said := twice(tree):
            raise RecipeError(f"The value of {assignment!r} is not valid: {'; '.join(said)}.")
        if isinstance(found, int) and ":" in value:  # 2:4, which YAML 1.1 reads as two minutes and four seconds
            found = value
        place[int(last) if isinstance(place, list) else last] = found
    except (KeyError, IndexError, ValueError, TypeError):
        raise RecipeError(
            f"The recipe has no place {key!r}.", hint="Steps are counted from 0: steps.0.sparsity"
        ) from None
    except yaml.YAMLError:
        raise RecipeError(f"The value of {assignment!r} is not YAML.") from None
    return place, last, found


def _path(fields: Mapping[str, Any], key: str) -> list[str]:
    """Where a key lies: as it says, or in the one section that has a field of this name."""
    parts = key.split(".")
    if parts[0] in Recipe.model_fields:
        return parts
    places = []
    for section, kind in SECTIONS.items():
        if section == "steps":
            steps = fields.get("steps")
            known = [step_kind(each) for each in (steps if isinstance(steps, list) else [{}])]
            places += [[section, str(i), *parts] for i, each in enumerate(known) if parts[0] in each.model_fields]
        elif parts[0] in kind.model_fields:
            places.append([section, *parts])
    if len(places) == 1:
        return places[0]
    if places:
        raise RecipeError(f"{key!r} has several places.", hint="Say which: " + ", ".join(map(".".join, places)))
    kinds: list[type[BaseModel]] = [Recipe, *SECTIONS.values(), Cut]
    near = get_close_matches(parts[0], [field for kind in kinds for field in kind.model_fields], n=1)
    raise RecipeError(f"There is no key {key!r}.", hint=f"Did you mean {near[0]!r}?" if near else "")


def _line(node: Any, loc: Sequence[int | str]) -> int:
    """The line of the deepest part of a place that the text has."""
    line = node.start_mark.line
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((key, value) for key, value in node.value if key.value == part), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = (node.value[part], node.value[part])
        else:
            found = None
        if found is None:
            break
        line, node = found[0].start_mark.line, found[1]
    return line + 1
