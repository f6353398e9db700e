"""What is to be done, as data: model, calibration, steps, what is measured and what may be lost.

Unknown keys are refused, and every mistake is told at once, with its line where the recipe is a file.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from ssmcompress.errors import RecipeError

Ratio = Annotated[float, Field(ge=0, lt=1)]
Drop = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Scope = Literal["row", "tensor"]
Method = Literal["wanda", "magnitude", "sparsegpt"]
UNITS = ("minitron", "flap", "taylor", "magnitude", "random")
METHODS = {  # of each axis, the usual one first
    "state": ("joint", "ghost", "last", "taylor", "magnitude", "random"),
    "channel": UNITS,
    "dt_rank": ("wanda", "taylor", "magnitude", "random"),
    "head": UNITS,
    "head_channel": UNITS,
    "layer": ("shedder", "similarity", "random"),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Calibration(_Strict):
    """Which text the statistics are taken from: None is the shipped text."""

    text: str | None = None
    split: str | None = None
    column: str | None = None
    mix: Literal["recall"] | None = None
    windows: Annotated[int, Field(gt=0)] = 64
    length: Annotated[int, Field(gt=0)] = 512


class Prune(_Strict):
    """Zeroes weights: a share of each tensor or row (half unless told), or M - N of every M inputs.

    Scores compete over the whole tensor unless `scope` says row, for all modules or by module. WANDA's authors compare
    within rows, which costs these models more: a row of in_proj is a channel, a state or a step size, of which the
    model uses some far more than others (evals/results/scopes.md).
    """

    step: Literal["prune"] = "prune"
    method: Method = "wanda"
    sparsity: Ratio | None = None
    pattern: str | None = None
    scope: Scope | dict[str, Scope] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    modules: dict[str, Ratio] = {}

    @model_validator(mode="before")
    @classmethod
    def _half(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = {name: value for name, value in values.items() if name != "method" or value is not None}
            if values.get("sparsity") is None and values.get("pattern") is None:
                values["sparsity"] = 0.5
        return values

    @field_validator("include", "exclude", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("pattern", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int) and value > 60:  # YAML 1.1 counts minutes and seconds
            n, m = divmod(value, 60)
            raise ValueError(f'must be in quotes: pattern: "{n}:{m}", for YAML reads {n}:{m} as a number')
        return value

    @field_validator("pattern")
    @classmethod
    def _pattern(cls, value: str | None) -> str | None:
        if value is not None:
            n, _, m = value.partition(":")
            if not (n.isdecimal() and m.isdecimal() and 0 < int(n) < int(m)):
                raise ValueError("must be N:M, N of every M inputs kept, with 0 < N < M (2:4)")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Prune":
        if self.pattern and self.modules:
            raise ValueError("pattern and modules (ratios by module) exclude one another")
        if self.pattern and self.sparsity is not None:
            raise ValueError(f"pattern {self.pattern} and sparsity {self.sparsity} exclude one another")
        if self.scope and (self.pattern or self.method == "sparsegpt"):
            cause = "a pattern" if self.pattern else "sparsegpt"
            raise ValueError(f"scope has no meaning with {cause}, which has groups of its own")
        return self

    @property
    def calibrated(self) -> bool:
        """Whether the scores need calibration text."""
        return self.method != "magnitude"

    @property
    def new_values(self) -> bool:
        """Whether weights that stay get new values."""
        return self.method == "sparsegpt"


class Cut(_Strict):
    """Removes units of an axis from every layer, or whole layers: those of which the method makes least.

    `keep` is the share that stays (up to 1) or their number (above 1); `target` a budget: params=75%, state=50% or
    memory=500MB, of the whole model. `correct` makes up for what went: refit solves each out_proj for the dense block's
    output, rescale (heads and their channels) corrects the norm that they shared. `any_size` lets sizes pass that
    kernels run slowly or not at all.
    """

    step: Literal["prune"] = "prune"
    axis: Literal["state", "channel", "dt_rank", "head", "head_channel", "layer"]
    method: str | None = None
    keep: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    target: str | None = None
    correct: Literal["none", "rescale", "refit"] = "none"
    any_size: bool = False

    @field_validator("target")
    @classmethod
    def _target(cls, value: str | None) -> str | None:
        if value is not None:
            budget(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "Cut":
        if (self.keep is None) == (self.target is None):
            raise ValueError(f"an axis needs either keep or target, to say how many units of {self.axis} stay")
        if self.correct == "rescale" and self.axis not in ("head", "head_channel"):
            raise ValueError(f"rescale corrects the norm that heads share; the axis {self.axis} has none")
        if self.correct == "refit" and self.axis == "layer":
            raise ValueError("refit needs a block whose output projection stays; the axis layer leaves none")
        if self.method not in (None, *METHODS[self.axis]):
            near = get_close_matches(str(self.method), METHODS[self.axis], n=1)
            known = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METHODS[self.axis])}"
            raise ValueError(f"the axis {self.axis} has no method {self.method!r}: {known}")
        return self

    @property
    def criterion(self) -> str:
        """The method, or the axis's usual one."""
        return self.method or METHODS[self.axis][0]

    @property
    def calibrated(self) -> bool:
        """Whether the scores need calibration text."""
        return self.new_values or self.criterion not in ("magnitude", "last", "random")

    @property
    def new_values(self) -> bool:
        """Whether weights that stay get new values."""
        return self.correct != "none"


def budget(text: str) -> tuple[str, float, bool]:
    """What "params=75%", "state=50%" or "memory=500MB" bounds, the bound, and whether it is a share; ValueError."""
    found = re.fullmatch(r"(params|state|memory)=(\d+(?:\.\d+)?) ?(%|[KMGT]?B?)", text.replace(",", ""))
    if not found:
        raise ValueError("must be params=, state= or memory= with a share (75%) or an amount (100M, 500MB)")
    value, unit = float(found[2]), found[3]
    if unit == "%":
        return found[1], value / 100, True
    return found[1], value * 1000 ** "KMGT".index(unit[0]) * 1000 if unit[:1] in tuple("KMGT") else value, False


def _kind(step: Any) -> str:
    named = "axis" in step if isinstance(step, dict) else isinstance(step, Cut)
    return "cut" if named else "prune"


Step = Annotated[Annotated[Prune, Tag("prune")] | Annotated[Cut, Tag("cut")], Discriminator(_kind)]


class Save(_Strict):
    """How the weights are written: shards of at most this size."""

    shard_size: Annotated[str, Field(pattern=r"^\d+ ?[KMGT]?B$")] = "5GB"


class Evaluation(_Strict):
    """What is measured of the dense model and of the result, each from disk: the options of the verb `eval`."""

    perplexity: str | None = "default"
    recall: bool = False
    suite: str | None = None
    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[int, Field(gt=0)] | None = None
    length: Annotated[int, Field(gt=1)] = 512
    batch_size: Annotated[int, Field(gt=0)] = 8


class Gate(_Strict):
    """What may be lost at most, by task or measure; one number is the bound of `all` (see `compare`)."""

    max_drop: Annotated[dict[str, Drop], Field(min_length=1)]
    strict: bool = False

    @field_validator("max_drop", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return {"all": value} if isinstance(value, int | float) else value


class Recipe(_Strict):
    """A whole run, every default written out."""

    description: str = ""
    model: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    backend: Literal["auto", "native", "torch", "cuda", "reference"] = "auto"
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    calibrate: Calibration = Calibration()
    steps: tuple[Step, ...]
    save: Save = Save()
    eval: Evaluation | None = None
    gate: Gate | None = None

    @model_validator(mode="after")
    def _whole(self) -> "Recipe":
        if not self.steps:
            raise ValueError("there are no steps")
        if self.gate and not self.eval:
            raise ValueError("a gate needs an eval section, which says what is measured")
        return self

    def to_yaml(self) -> str:
        """The recipe as YAML, in the order of the schema."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """A hash of what is done, whatever its spelling; a key that a new version adds changes none by its default."""
        said = self.model_dump(mode="json", exclude={"description", "steps"}, exclude_defaults=True)
        said["steps"] = [{"step": step.step} | _beyond_defaults(step) for step in self.steps]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def portable(self, model: str) -> "Recipe":
        """The same recipe as records name it: without the paths of this machine."""
        text = self.calibrate.text
        name = Path(text).name if text is not None and Path(text).exists() else text
        return self.model_copy(update={"model": model, "calibrate": self.calibrate.model_copy(update={"text": name})})


def usual_scope(method: str, module: str) -> Scope:
    """Where scores compete unless a step says otherwise."""
    # the rows of a head are words, and none of them may go for another
    return "row" if module == "lm_head" and method == "wanda" else "tensor"


def _beyond_defaults(step: Step) -> dict[str, Any]:
    """What a step says that is not usual, be it written out or left out."""
    said = step.model_dump(mode="json", exclude_defaults=True)
    if isinstance(step, Cut):
        return said | {"method": step.criterion}
    scope = said.pop("scope", None)
    if isinstance(scope, dict):
        scope = {module: each for module, each in scope.items() if each != usual_scope(step.method, module)}
    elif scope is not None:
        named = {*step.include, *step.modules} - {*step.exclude} | {"in_proj"}
        scope = None if all(usual_scope(step.method, module) == scope for module in named) else scope
    return said | ({"scope": scope} if scope else {})


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
    correct: str
    any_size: bool
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


CALIBRATION = {"calib": "text", "calib_split": "split", "calib_column": "column", "calib_mix": "mix"}


def pruning(model: str, options: PruneOptions) -> Recipe:
    """The recipe of one pruning step; RecipeError for an option there is not, or a value that will not do."""
    for name in options:
        if name not in PruneOptions.__annotations__:
            near = get_close_matches(name, PruneOptions.__annotations__, n=1)
            raise RecipeError(f"There is no option {name!r}.", hint=f"Did you mean {near[0]!r}?" if near else "")
    kind, other = (Cut, Prune) if options.get("axis") else (Prune, Cut)
    step: dict[str, Any] = {"step": "prune"}
    calibrate: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in options.items():
        if name in kind.model_fields:
            step[name] = value
        elif name in other.model_fields:
            if value not in (None, (), [], {}, False, "none"):
                clash = "has no meaning with an axis" if kind is Cut else "needs an axis"
                raise RecipeError(f"{name} {clash}.", hint="An axis takes keep or target; zeroing weights, sparsity.")
        elif name in CALIBRATION or name in Calibration.model_fields:
            calibrate[CALIBRATION.get(name, name)] = value
        else:
            rest[name] = value
    return recipe(model=model, calibrate=calibrate, steps=[step], **rest)


def recipe(**fields: Any) -> Recipe:
    """A recipe from plain values; RecipeError tells every mistake at once."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeError("; ".join(sentence(item) for item in error.errors()) + ".") from None


SECTIONS: dict[str, type[_Strict]] = {
    "calibrate": Calibration,
    "steps": Prune,
    "save": Save,
    "eval": Evaluation,
    "gate": Gate,
}


def where_in(loc: Sequence[int | str]) -> tuple[int | str, ...]:
    """Where a mistake is, without the name of the kind of step that pydantic puts behind its number."""
    return (*loc[:2], *loc[3:]) if loc[:1] == ("steps",) and len(loc) > 2 else tuple(loc)


def step_kind(step: Any) -> type[Prune] | type[Cut]:
    """Which step a mapping describes: one with an axis removes units, another zeroes weights."""
    return Cut if _kind(step) == "cut" else Prune


def sentence(item: Any) -> str:
    """One of pydantic's errors in a sentence: where, what is wrong, what was found."""
    kind = Cut if item["loc"][2:3] == ("cut",) else Prune
    loc = [str(part) for part in where_in(item["loc"])]
    where = ".".join(loc) or "the recipe"
    if item["type"] == "missing":
        return f"{where}: is missing"
    if item["type"] == "extra_forbidden":
        sections = [kind if part == "steps" else SECTIONS[part] for part in loc[:-1] if part in SECTIONS]
        near = get_close_matches(loc[-1], (sections or [Recipe])[-1].model_fields, n=1)
        return f"{where}: there is no such key" + (f", did you mean {near[0]!r}?" if near else "")
    said = f"{where}: {item['msg'].removeprefix('Value error, ')}"
    if item["type"] == "literal_error":
        near = get_close_matches(str(item["input"]), re.findall(r"'([^']*)'", item["msg"]), n=1)
        return f"{said}, found {item['input']!r}" + (f", did you mean {near[0]!r}?" if near else "")
    whole = isinstance(item["input"], dict)  # a contradiction between keys, which the message names
    return said if whole else f"{said}, found {item['input']!r}"
