"""The steps of a recipe as data: weights become zero, units are removed, tokens leave, an adapter is learned."""

import re
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from ssmcompress.policy import HALVING, LEAST, MATCHING, RANKING, Decay, Importance, Merge, Rule
from ssmcompress.schema import Strict
from ssmcompress.tuning import TuneState

Ratio = Annotated[float, Field(ge=0, lt=1)]
Scope = Literal["row", "tensor"]
Method = Literal["wanda", "magnitude", "sparsegpt", "sparsessm", "sparsessm_v2"]
SPARSESSM = ("sparsessm", "sparsessm_v2")  # on the entries of A_log
UNITS = ("taylor", "flap", "minitron", "magnitude", "random")
LAYER, SSM, WIDTH = WHOLE = "layer", "ssm", "width"  # axes of the model: blocks, their scans, residual dimensions
GROUP = "group"  # of B and C, in Mamba-2
METHODS = {  # of each axis, the usual one first
    "state": ("ghost", "joint", "sparsessm", "last", "taylor", "magnitude", "random", "rotate"),
    "channel": UNITS,
    "dt_rank": ("wanda", "taylor", "magnitude", "random"),
    "head": UNITS,
    "head_channel": UNITS,
    "group": ("merge", "taylor", "magnitude", "random"),
    "width": ("taylor", "minitron", "magnitude", "random"),
    "ssm": ("shedder", "similarity", "random"),
    "layer": ("shedder", "similarity", "random"),
}
INNER = ("channel", "head", "head_channel")  # axes whose units are inputs of out_proj
USUAL = dict.fromkeys(INNER, "refit") | {"width": "rescale"}  # corrections; others: none


class Prune(Strict):
    """Zeroes weights: a share of each tensor or row (half unless told), or M - N of every M inputs.

    Entries of A_log, which `sparsessm` chooses among and magnitude too where it is included, become memoryless instead.

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
    modules: dict[str, Ratio] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _half(cls, values: Any) -> Any:
        if isinstance(values, dict):
            values = {name: value for name, value in values.items() if name != "method" or value is not None}
            if values.get("sparsity") is None and values.get("pattern") is None:
                values["sparsity"] = 0.5
        return values

    @field_validator("scope", mode="before")
    @classmethod
    def _within(cls, value: Any) -> Any:
        known = get_args(Scope)
        if isinstance(value, str) and value not in known:
            near = get_close_matches(value, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"must be {' or '.join(known)} where weights become zero{hint}")
        return value

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
        if self.scope and (self.pattern or self.grouped):
            cause = "a pattern" if self.pattern else self.method
            raise ValueError(f"scope has no meaning with {cause}, which has groups of its own")
        return self

    @property
    def grouped(self) -> bool:
        """Whether the method itself says where scores compete."""
        return self.method in ("sparsegpt", *SPARSESSM)

    @property
    def calibrated(self) -> bool:
        """Whether the scores need calibration text."""
        return self.method != "magnitude"

    @property
    def new_values(self) -> bool:
        """Whether weights that stay get new values."""
        return self.method == "sparsegpt"


class Cut(Strict):
    """Removes units of an axis from every layer, or dimensions, scans or layers of the model: those of least score.

    `keep` is the share that stays (up to 1) or their number (above 1); `target` a budget: params=75%, state=50% or
    memory=500MB, of the whole model. By `scope` every layer keeps as many units, or those of the whole model compete:
    layers then end with sizes of their own, and a number is that of all. `correct` makes up for what went: refit solves
    each out_proj for the dense block's output, and is usual for channels and heads; bias gives it the mean of what
    went; rescale corrects the norms that heads, or dimensions, share, and is usual for the latter. The method rotate
    takes the states of Mamba-2 to a basis of fewer instead of choosing among them; merge lets the heads of a run of its
    groups share the mean of what makes B and C, where by other methods they share the best group. `any_size` lets sizes
    pass that kernels run slowly or not at all; `stock_only` refuses those that no config of transformers says.
    """

    step: Literal["prune"] = "prune"
    axis: Literal["state", "channel", "dt_rank", "head", "head_channel", "group", "width", "ssm", "layer"]
    method: str | None = None
    keep: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    target: str | None = None
    correct: Literal["none", "rescale", "refit", "bias"] | None = None
    scope: Literal["layer", "model"] | None = None
    any_size: bool = False
    stock_only: bool = False

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
        if self.correct == "rescale" and self.axis not in ("head", "head_channel", WIDTH):
            raise ValueError(f"rescale corrects the norm that units share; those of the axis {self.axis} have none")
        if self.correct == "refit" and self.axis in WHOLE:
            raise ValueError(
                f"refit corrects blocks of which units go one by one; the axis {self.axis} has no form of it"
            )
        if self.correct == "bias" and self.axis not in INNER:
            raise ValueError(f"bias stands in for inputs of out_proj that went; the axis {self.axis} leaves them all")
        if self.scope and self.axis in WHOLE:
            raise ValueError(f"scope has no meaning with the axis {self.axis}, which is one for the whole model")
        if self.scope == "model" and self.merges:
            raise ValueError("merge has no scores by which groups of all layers compete: name taylor, or another")
        if self.method not in (None, *METHODS[self.axis]):
            near = get_close_matches(str(self.method), METHODS[self.axis], n=1)
            known = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(METHODS[self.axis])}"
            raise ValueError(f"the axis {self.axis} has no method {self.method!r}: {known}")
        return self

    @property
    def criterion(self) -> str:
        """The method, or the axis's usual one, chosen on the validation novel (evals/axes.py)."""
        return self.method or METHODS[self.axis][0]

    @property
    def correction(self) -> str:
        """What makes up for the units that went; usually what helped on the validation novel."""
        return self.correct or USUAL.get(self.axis, "none")

    @property
    def rotates(self) -> bool:
        """Whether states are taken to another basis."""
        return self.method == "rotate"

    @property
    def merges(self) -> bool:
        """Whether runs of groups become their mean."""
        return self.criterion == "merge"

    @property
    def reach(self) -> Literal["layer", "model"] | None:
        """Where the units of a block's axis compete: within their layer unless told; None for an axis of the model."""
        return None if self.axis in WHOLE else self.scope or "layer"

    @property
    def calibrated(self) -> bool:
        """Whether the scores need calibration text."""
        return self.correction != "none" or self.criterion not in ("magnitude", "last", "merge", "random")

    @property
    def new_values(self) -> bool:
        """Whether weights that stay get new values."""
        return self.correction != "none" or self.merges


class ReduceTokens(Strict):
    """Lets tokens of a prompt leave after some blocks: those that a rule chooses, merged with others where it says so.

    `flops` is the share of the blocks' work to be saved on a long prompt (0.2 unless told); `keep`, instead, the share
    of tokens that stay after each of `layers`, which are the paper's unless told. `pruned`, `importance`,
    `match_window`, `merge` and `decay` are as in the policy that is stored. Decoding is dense.
    """

    step: Literal["reduce-tokens"] = "reduce-tokens"
    method: Rule = "utrc"
    flops: Annotated[float, Field(gt=0, lt=1)] | None = None
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    keep: Annotated[float, Field(ge=LEAST, le=1)] | None = None
    pruned: Annotated[float, Field(ge=0, le=1)] | None = None
    importance: Importance | None = None
    merge: Merge | None = None
    match_window: Annotated[int, Field(ge=1)] | None = None
    decay: Decay = "drop"

    @field_validator("layers", mode="before")
    @classmethod
    def _numbers(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        numbers = value.split(",")
        if not all(number.strip().isdecimal() for number in numbers):
            raise ValueError("must be numbers of blocks, from 0, with commas between them (5,8,10)")
        return tuple(map(int, numbers))

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("flops") is None and values.get("keep") is None:
            return values | {"flops": 0.2}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "ReduceTokens":
        if self.flops is not None and self.keep is not None:
            raise ValueError(f"flops {self.flops:g} and keep {self.keep:g} exclude one another")
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers {list(self.layers)} must rise, each named once")
        if self.method in HALVING and self.keep is not None and self.keep < 0.5:
            raise ValueError(f"{self.method} takes at most half of the tokens at a time: keep must be at least 0.5")
        for option, methods in (
            ("pruned", ("utrc",)),
            ("importance", RANKING),
            ("merge", MATCHING),
            ("match_window", MATCHING),
        ):
            if getattr(self, option) is not None and self.method not in methods:
                raise ValueError(f"{option} has no meaning with the method {self.method}")
        return self

    @property
    def details(self) -> dict[str, Any]:
        """What the policy takes from the step as it is; what is not told has the policy's default."""
        told = self.model_dump(include={"method", "pruned", "importance", "merge", "match_window", "decay"})
        return {name: value for name, value in told.items() if value is not None}

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration text: it looks at the prompt alone."""
        return False

    @property
    def new_values(self) -> bool:
        """Whether weights get new values."""
        return False


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
    if not isinstance(step, dict):
        return next((name for name, kind in KINDS.items() if isinstance(step, kind)), "prune")
    if step.get("step") in ("reduce-tokens", "tune-state"):
        return str(step["step"])
    return "cut" if "axis" in step else "prune"


Step = Prune | Cut | ReduceTokens  # what makes a model of another
AnyStep = Annotated[
    Annotated[Prune, Tag("prune")]
    | Annotated[Cut, Tag("cut")]
    | Annotated[ReduceTokens, Tag("reduce-tokens")]
    | Annotated[TuneState, Tag("tune-state")],
    Discriminator(_kind),
]
KINDS: dict[str, type[Strict]] = {
    "prune": Prune,
    "cut": Cut,
    "reduce-tokens": ReduceTokens,
    "tune-state": TuneState,
}


def usual_scope(method: str, module: str) -> Scope:
    """Where scores compete unless a step says otherwise."""
    # the rows of a head are words, and none of them may go for another
    return "row" if module == "lm_head" and method == "wanda" else "tensor"


def beyond_defaults(step: Step | TuneState) -> dict[str, Any]:
    """What a step says that is not usual, be it written out or left out."""
    said = step.model_dump(mode="json", exclude_defaults=True)
    if isinstance(step, Cut):
        if step.reach == "layer":
            said.pop("scope", None)
        return said | {"method": step.criterion, "correct": step.correction}
    if isinstance(step, ReduceTokens | TuneState):
        return said
    scope = said.pop("scope", None)
    if isinstance(scope, dict):
        scope = {module: each for module, each in scope.items() if each != usual_scope(step.method, module)}
    elif scope is not None:
        named = {*step.include, *step.modules} - {*step.exclude} | {"in_proj"}
        scope = None if all(usual_scope(step.method, module) == scope for module in named) else scope
    return said | ({"scope": scope} if scope else {})


def step_kind(step: Any) -> type[Strict]:
    """Which step a mapping describes, by its name and, of those that prune, by whether it has an axis."""
    return KINDS[_kind(step)]
