"""State tuning as data: what is learned, from which examples, and how."""

from collections.abc import Iterable
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ssmcompress.schema import Strict

TuneMethod = Literal[
    "state-offset",
    "output-offset",
    "initial-state",
    "conv-state",
    "additional-scan",
    "prefix",
    "prompt",
    "bitfit",
    "a-log",
    "sdt",
    "lora",
    "full",
]
TUNE_METHODS: tuple[TuneMethod, ...] = get_args(TuneMethod)
TaskName = Literal["e2e", "dart", "spider", "sst2", "rte"]
Form = Literal["full", "low-rank", "per-head"]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
SIZES = {  # what says how much is learned, and its value unless told
    "lora": ("rank", 8),
    "sdt": ("rank", 8),
    "low-rank": ("rank", 1),
    "additional-scan": ("states", 8),
    "prefix": ("tokens", 16),
    "prompt": ("tokens", 16),
}


class TuneState(Strict):
    """Learns an adapter from examples of a prompt and its completion, on the completion only, or from plain text.

    `data`, `valid` and `test` are JSON lines, tables, plain text or data sets, the data the shipped calibration text
    unless told; without `valid` a twentieth of it is held out, and never more than 512 examples validate. Of the test
    only the first `limit` prompts count. A `task` reads the files that its authors publish, and has completions of the
    test prompts judged. `prompt` and `completion` are templates over the columns ("{question} =" and " {answer}");
    without them columns of these names are taken, or `text`. Of `steps` updates on `batch_size` · `accumulate` examples
    the state that is best on the validation examples, seen every `every` updates, is kept. `objective` is the
    likelihood (ce), or the distribution of a `teacher` (distill), with `hidden` the weight of the distance between last
    hidden states.
    """

    step: Literal["tune-state"] = "tune-state"
    method: TuneMethod = "state-offset"
    form: Form | None = None
    rank: Count | None = None
    states: Count | None = None
    tokens: Count | None = None
    sdt_channels: Share | None = None
    sdt_states: Share | None = None
    warm_up: Count | None = None
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    targets: tuple[str, ...] = ()
    data: str | None = None
    valid: str | None = None
    test: str | None = None
    split: str | None = None
    task: TaskName | None = None
    limit: Count | None = None
    prompt: str | None = None
    completion: str | None = None
    length: Annotated[int, Field(ge=2)] = 512
    steps: Count = 300
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    batch_size: Count = 8
    accumulate: Count = 1
    every: Count | None = None
    objective: Literal["ce", "distill"] = "ce"
    teacher: str | None = None
    hidden: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    checkpointing: bool = False

    @field_validator("targets", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("prompt", "completion")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        if value is not None:
            list(columns(value))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "TuneState":
        if self.form is not None and self.method != "state-offset":
            raise ValueError(f"form has no meaning with the method {self.method}")
        for option in ("rank", "states", "tokens"):
            if getattr(self, option) is not None and option != self._sized[0]:
                owners = ", ".join(kind for kind, (name, _) in SIZES.items() if name == option)
                raise ValueError(f"{option} has no meaning with the method {self.method}: it is for {owners}")
        for option in ("sdt_channels", "sdt_states", "warm_up"):
            if getattr(self, option) is not None and self.method != "sdt":
                raise ValueError(f"{option} has no meaning with the method {self.method}")
        for option in ("alpha", "targets"):
            if getattr(self, option) and self.method != "lora":
                raise ValueError(f"{option} has no meaning with the method {self.method}")
        for option in ("teacher", "hidden"):
            if getattr(self, option) is not None and self.objective != "distill":
                raise ValueError(f"{option} has no meaning without the objective distill")
        if self.task is not None and self.completion is not None:
            raise ValueError(f"the task {self.task} has templates of its own")
        for option in ("task", "split", "completion"):
            if getattr(self, option) is not None and self.data is None:
                raise ValueError(f"{option} has no meaning without data")
        if self.limit is not None and self.test is None:
            raise ValueError("limit bounds how many prompts of the test count: there is no test")
        if self.prompt is not None and self.completion is None:
            raise ValueError("a template of the prompt needs one of the completion")
        return self

    @property
    def _sized(self) -> tuple[str, int | None]:
        return SIZES.get(self.form or self.method, ("", None))

    @property
    def size(self) -> int | None:
        """The rank, the states or the tokens that are learned, where the method has such a number."""
        option, usual = self._sized
        return (getattr(self, option) if option else None) or usual

    @property
    def shares(self) -> tuple[float, float]:
        """Of the channels, and of the states of each, how many SDT learns."""
        return self.sdt_channels or 0.01, self.sdt_states or 0.1

    def portable(self) -> "TuneState":
        """The step as records name it: without the paths of this machine."""
        named = {name: getattr(self, name) for name in ("data", "valid", "test", "teacher")}
        return self.model_copy(
            update={name: Path(at).name if at and Path(at).exists() else at for name, at in named.items()}
        )

    @property
    def pace(self) -> int:
        """Updates between two looks at the validation examples: ten looks unless told."""
        return min(self.every or max(1, self.steps // 10), self.steps)


def columns(template: str) -> Iterable[str]:
    """The columns that a template names; ValueError for one that is no plain {column}."""
    for _, name, form, conversion in Formatter().parse(template):
        if name is None:
            continue
        if not name or form or conversion or not name.replace(" ", "_").replace("-", "_").isidentifier():
            raise ValueError(f"the template {template!r} names columns as {{column}}; two braces stand for one")
        yield name
