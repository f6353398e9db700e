"""What is to be done, as data: model, calibration, steps, what is measured and what may be lost.

Unknown keys are refused, and every mistake is told at once, with its line where the recipe is a file.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from ssmcompress.errors import RecipeError
from ssmcompress.steps import KINDS, METHODS, AnyStep, Cut, Method, Prune, ReduceTokens, Step, Strict, beyond_defaults
from ssmcompress.tuning import TuneState


def _no_switch(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads yes and on as true, which would be a bound of one
        raise ValueError("must be a number")
    return value


Drop = Annotated[float, BeforeValidator(_no_switch), Field(ge=0, allow_inf_nan=False)]


class Calibration(Strict):
    """Which text the statistics are taken from: None is the shipped text."""

    text: str | None = None
    split: str | None = None
    column: str | None = None
    mix: Literal["recall"] | None = None
    windows: Annotated[int, Field(gt=0)] = 64
    length: Annotated[int, Field(gt=0)] = 512


class Save(Strict):
    """How the weights are written: shards of at most this size."""

    shard_size: Annotated[str, Field(pattern=r"^[1-9]\d* ?[KMGT]B$")] = "5GB"


class Evaluation(Strict):
    """What is measured of the dense model and of the result, each from disk: the options of the verb `eval`."""

    perplexity: str | None = "default"
    recall: bool = False
    suite: str | None = None
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    length: Annotated[int, Field(gt=1)] = 512
    context: Annotated[int, Field(ge=0)] | None = None
    batch_size: Annotated[int, Field(gt=0)] = 8


class Gate(Strict):
    """What may be lost at most, by task or measure; one number is the bound of `all` (see `compare`)."""

    max_drop: Annotated[dict[str, Drop], Field(min_length=1)]
    strict: bool = False

    @field_validator("max_drop", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return {"all": value} if isinstance(value, int | float | str) else value


class Recipe(Strict):
    """A whole run, every default written out."""

    description: str = ""
    model: str
    seed: Annotated[int, Field(ge=0, lt=2**63, strict=True)] = 0
    backend: Literal["auto", "native", "torch", "cuda", "reference"] = "auto"
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    calibrate: Calibration = Calibration()
    steps: tuple[AnyStep, ...]
    save: Save = Save()
    eval: Evaluation | None = None
    gate: Gate | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        if not self.steps:
            raise ValueError("there are no steps")
        if not self.made:
            raise ValueError("no step makes a model: `ssmcompress tune-state` learns an adapter for one that there is")
        if self.steps != (*self.made, *self.tuned):
            raise ValueError("tune-state comes after all other steps, which would change the model below its adapter")
        if self.gate and not self.eval:
            raise ValueError("a gate needs an eval section, which says what is measured")
        return self

    @property
    def made(self) -> tuple[Step, ...]:
        """The steps that make the model."""
        return tuple(step for step in self.steps if not isinstance(step, TuneState))

    @property
    def tuned(self) -> tuple[TuneState, ...]:
        """The steps that learn adapters for it, each on those before."""
        return tuple(step for step in self.steps if isinstance(step, TuneState))

    def to_yaml(self) -> str:
        """The recipe as YAML, in the order of the schema."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """A hash of what is done, whatever its spelling; a key that a new version adds changes none by its default."""
        said = self.model_dump(mode="json", exclude={"description", "steps"}, exclude_defaults=True)
        said["steps"] = [{"step": step.step} | beyond_defaults(step) for step in self.steps]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def making(self) -> "Recipe":
        """What makes the model: all but what is learned on it, measured of it, and may be lost."""
        return self.model_copy(update={"steps": self.made, "eval": None, "gate": None})

    def portable(self, model: str) -> "Recipe":
        """The same recipe as records name it: without the paths of this machine."""
        text = self.calibrate.text
        name = Path(text).name if text is not None and Path(text).exists() else text
        steps = (*self.made, *(step.portable() for step in self.tuned))
        calibrate = self.calibrate.model_copy(update={"text": name})
        return self.model_copy(update={"model": model, "calibrate": calibrate, "steps": steps})


class PruneOptions(TypedDict, total=False):
    """What `prune` and `plan` take beside the model; what is left out has the default of the recipe's schema."""

    method: str
    sparsity: float
    pattern: str | None
    scope: str | None
    include: Sequence[str]
    exclude: Sequence[str]
    modules: dict[str, float]
    axis: str | None
    keep: float | None
    target: str | None
    correct: str | None
    any_size: bool
    stock_only: bool
    calib: str | None
    calib_split: str | None
    calib_column: str | None
    calib_mix: str | None
    windows: int
    length: int
    seed: int
    device: str
    dtype: str
    backend: str


class ReduceOptions(TypedDict, total=False):
    """What `reduce_tokens` takes beside the model; what is left out has the default of the recipe's schema."""

    method: str
    flops: float | None
    layers: Sequence[int] | None
    keep: float | None
    pruned: float | None
    importance: str | None
    merge: str | None
    match_window: int | None
    decay: str
    seed: int
    device: str
    dtype: str
    backend: str


class TuneOptions(TypedDict, total=False):
    """What `tune_state` takes beside the model; what is left out has the default of the schema."""

    method: str
    form: str | None
    rank: int | None
    states: int | None
    tokens: int | None
    sdt_channels: float | None
    sdt_states: float | None
    warm_up: int | None
    alpha: float | None
    targets: Sequence[str]
    data: str | None
    valid: str | None
    test: str | None
    split: str | None
    task: str | None
    limit: int | None
    prompt: str | None
    completion: str | None
    length: int
    steps: int
    lr: float | None
    batch_size: int
    accumulate: int
    every: int | None
    objective: str
    teacher: str | None
    hidden: float | None
    checkpointing: bool


CALIBRATION = {"calib": "text", "calib_split": "split", "calib_column": "column", "calib_mix": "mix"}
OPTIONS = {field: option for option, field in CALIBRATION.items()}


def pruning(model: str, options: PruneOptions) -> Recipe:
    """The recipe of one pruning step; RecipeError for an option there is not, or a value that will not do."""
    _require_known(options, PruneOptions)
    kind, other = (Cut, Prune) if options.get("axis") else (Prune, Cut)
    axes = [axis for axis, methods in METHODS.items() if options.get("method") in methods]
    if kind is Prune and axes and options.get("method") not in get_args(Method):
        raise RecipeError(f"The method {options['method']} needs an axis.", hint=f"Its axes are {', '.join(axes)}.")
    step: dict[str, Any] = {"step": "prune"}
    calibrate: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in options.items():
        if name in kind.model_fields:
            step[name] = value
        elif name in other.model_fields:
            if value not in (None, (), [], {}, False):
                clash = "has no meaning with an axis" if kind is Cut else "needs an axis"
                raise RecipeError(f"{name} {clash}.", hint="An axis takes keep or target; zeroing weights, sparsity.")
        elif name in CALIBRATION or name in Calibration.model_fields:
            calibrate[CALIBRATION.get(name, name)] = value
        else:
            rest[name] = value
    return _validated({"model": model, "calibrate": calibrate, "steps": [step]} | rest, _option)


def reducing(model: str, options: ReduceOptions) -> Recipe:
    """The recipe of one step that reduces tokens; RecipeError as of `pruning`."""
    _require_known(options, ReduceOptions)
    step = {name: value for name, value in options.items() if name in ReduceTokens.model_fields}
    rest = {name: value for name, value in options.items() if name not in step}
    return _validated({"model": model, "steps": [{"step": "reduce-tokens"} | step]} | rest, _option)


def tuning(options: TuneOptions) -> TuneState:
    """The step that learns; RecipeError as of `pruning`."""
    _require_known(options, TuneOptions)
    try:
        return TuneState.model_validate(options)
    except ValidationError as error:
        raise RecipeError(
            "; ".join(sentence(item, _option(("steps", 0, *item["loc"]))) for item in error.errors()) + "."
        ) from None


def _require_known(options: Mapping[str, Any], kind: type) -> None:
    for name in options:
        if name not in kind.__annotations__:
            near = get_close_matches(name, kind.__annotations__, n=1)
            raise RecipeError(f"There is no option {name!r}.", hint=f"Did you mean {near[0]!r}?" if near else "")


def recipe(**fields: Any) -> Recipe:
    """A recipe from plain values; RecipeError tells every mistake at once."""
    return _validated(fields, _key)


def _validated(fields: dict[str, Any], name: Callable[[Sequence[int | str]], str]) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeError(
            "; ".join(sentence(item, name(where_in(item["loc"]))) for item in error.errors()) + "."
        ) from None


def _key(loc: Sequence[int | str]) -> str:
    """What a recipe calls a place in it."""
    return ".".join(map(str, loc)) or "the recipe"


def _option(loc: Sequence[int | str]) -> str:
    """What the command line calls a place in the recipe of one step; nothing where several options clash."""
    section, *parts = map(str, loc)
    if section == "calibrate":
        parts = [OPTIONS.get(parts[0], parts[0])]
    elif section == "steps":
        parts = parts[1:]
    else:
        parts = [section]
    plain = not parts or parts[0] in ("model", "modules")  # the latter is given in Python only
    return ".".join(parts) if plain else "--" + parts[0].replace("_", "-")


SECTIONS: dict[str, type[Strict]] = {
    "calibrate": Calibration,
    "steps": Prune,
    "save": Save,
    "eval": Evaluation,
    "gate": Gate,
}


def where_in(loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """Where a mistake is, without the name of the kind of step that pydantic puts behind its number."""
    return (*loc[:2], *loc[3:]) if loc[:1] == ("steps",) and len(loc) > 2 else tuple(loc)


def sentence(item: Any, where: str | None = None) -> str:
    """One of pydantic's errors in a sentence: where (its key, unless told), what is wrong, what was found."""
    kind = KINDS.get(str(item["loc"][2]), Prune) if len(item["loc"]) > 2 else Prune
    loc = [str(part) for part in where_in(item["loc"])]
    where = _key(loc) if where is None else where
    if item["type"] == "missing":
        return f"{where}: is missing"
    if item["type"] == "extra_forbidden":
        sections = [kind if part == "steps" else SECTIONS[part] for part in loc[:-1] if part in SECTIONS]
        near = get_close_matches(loc[-1], (sections or [Recipe])[-1].model_fields, n=1)
        return f"{where}: there is no such key" + (f", did you mean {near[0]!r}?" if near else "")
    said = (f"{where}: " if where else "") + item["msg"].removeprefix("Value error, ")
    if item["type"] == "literal_error":
        near = get_close_matches(str(item["input"]), re.findall(r"'([^']*)'", item["msg"]), n=1)
        return f"{said}, found {item['input']!r}" + (f", did you mean {near[0]!r}?" if near else "")
    whole = isinstance(item["input"], dict)  # a contradiction between keys, which the message names
    return said if whole else f"{said}, found {item['input']!r}"
