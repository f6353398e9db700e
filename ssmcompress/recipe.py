"""What is to be done, as data: model, calibration, steps. Unknown keys are refused."""

import hashlib
import json
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypedDict

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ssmcompress.errors import RecipeError

Ratio = Annotated[float, Field(ge=0, lt=1)]
Method = Literal["wanda", "magnitude", "sparsegpt"]


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
    """Zeroes weights: a share of each row or tensor, or M - N of every M inputs."""

    step: Literal["prune"] = "prune"
    method: Method = "wanda"
    sparsity: Ratio = 0.5
    pattern: str | None = None
    scope: Literal["row", "tensor"] | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    modules: dict[str, Ratio] = {}

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
        if self.scope and (self.pattern or self.method == "sparsegpt"):
            cause = "a pattern" if self.pattern else "sparsegpt"
            raise ValueError(f"scope has no meaning with {cause}, which has groups of its own")
        return self


class Recipe(_Strict):
    """A whole run, every default written out."""

    model: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    backend: Literal["auto", "native", "torch", "cuda", "reference"] = "auto"
    device: str = "cpu"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    calibrate: Calibration = Calibration()
    steps: tuple[Prune, ...]

    def to_yaml(self) -> str:
        """The recipe as YAML, in the order of the schema."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """A hash of what the recipe says, whatever its spelling."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


class PruneOptions(TypedDict, total=False):
    """What `prune` and `plan` take beside the model; what is left out has the default of the recipe's schema."""

    method: str
    sparsity: float
    pattern: str | None
    scope: str | None
    include: Sequence[str]
    exclude: Sequence[str]
    modules: dict[str, float]
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
    step: dict[str, Any] = {"step": "prune"}
    calibrate: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in options.items():
        if name in Prune.model_fields:
            step[name] = value
        elif name in CALIBRATION or name in Calibration.model_fields:
            calibrate[CALIBRATION.get(name, name)] = value
        else:
            rest[name] = value
    return recipe(model=model, calibrate=calibrate, steps=[step], **rest)


def parse(text: str) -> Recipe:
    """The recipe of a YAML text; RecipeError where it is none."""
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe is not YAML: {error}.") from None
    if not isinstance(fields, dict):
        raise RecipeError("The recipe is not a mapping.")
    return recipe(**fields)


def recipe(**fields: Any) -> Recipe:
    """A recipe from plain values; RecipeError tells every mistake at once."""
    try:
        return Recipe(**fields)
    except ValidationError as error:
        raise RecipeError("; ".join(_sentences(error)) + ".") from None


def _sentences(error: ValidationError) -> Sequence[str]:
    found = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if part not in ("steps", 0)) or "the recipe"
        found.append(f"{where}: {item['msg'].removeprefix('Value error, ')}, found {item['input']!r}")
    return found
