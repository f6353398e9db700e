"""The options of `tune-state`, and what is said of them in `--help`."""

from collections.abc import Callable
from typing import Annotated, Literal

import typer

from ssmcompress.options import COMPUTE, ComputeDtype, Device, Json, Kernels, Seed, with_options
from ssmcompress.tuning import Form, TaskName, TuneMethod

WHAT, EXAMPLES, TRAINING = "What is learned", "Examples", "Training"

Method = Annotated[
    TuneMethod, typer.Option("--method", help="What is learned of the state space.", rich_help_panel=WHAT)
]
OffsetForm = Annotated[
    Form | None,
    typer.Option("--form", help="Of a state offset.", show_default="full", rich_help_panel=WHAT),
]
Rank = Annotated[
    int | None,
    typer.Option(
        "--rank", min=1, help="Of lora, sdt or a low-rank offset.", show_default="8, 8; 1", rich_help_panel=WHAT
    ),
]
States = Annotated[
    int | None,
    typer.Option("--states", min=1, help="Of an additional scan.", show_default="8", rich_help_panel=WHAT),
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", min=1, help="Of a prefix or prompt.", show_default="16", rich_help_panel=WHAT),
]
SdtChannels = Annotated[
    float | None,
    typer.Option("--sdt-channels", help="Share that sdt learns.", show_default="0.01", rich_help_panel=WHAT),
]
SdtStates = Annotated[
    float | None,
    typer.Option("--sdt-states", help="Of these, share of the states.", show_default="0.1", rich_help_panel=WHAT),
]
WarmUp = Annotated[
    int | None,
    typer.Option("--warm-up", min=1, help="Updates by which sdt chooses.", show_default="steps", rich_help_panel=WHAT),
]
Alpha = Annotated[float | None, typer.Option("--alpha", help="Of lora.", show_default="the rank", rich_help_panel=WHAT)]
Targets = Annotated[
    str | None,
    typer.Option("--targets", metavar="A,B", help="Projections for lora.", show_default="all", rich_help_panel=WHAT),
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="JSON lines, CSV, plain text or a data set id to learn from.",
        show_default="the shipped calibration text",
        rich_help_panel=EXAMPLES,
    ),
]
Valid = Annotated[
    str | None,
    typer.Option(
        "--valid",
        help="Examples by which the best state is chosen.",
        show_default="a twentieth of the data",
        rich_help_panel=EXAMPLES,
    ),
]
Test = Annotated[str | None, typer.Option("--test", help="Examples that are reported on.", rich_help_panel=EXAMPLES)]
Split = Annotated[str | None, typer.Option("--split", help="Of a data set.", rich_help_panel=EXAMPLES)]
Task = Annotated[
    TaskName | None,
    typer.Option("--task", help="Reads its authors' files, and judges completions.", rich_help_panel=EXAMPLES),
]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Prompts of the test that count.", rich_help_panel=EXAMPLES)
]
Prompt = Annotated[
    str | None,
    typer.Option("--prompt", metavar="TEMPLATE", help='Over the columns: "{mr} =".', rich_help_panel=EXAMPLES),
]
Completion = Annotated[
    str | None,
    typer.Option("--completion", metavar="TEMPLATE", help='Over the columns: " {ref}".', rich_help_panel=EXAMPLES),
]
Length = Annotated[int, typer.Option("--length", min=2, help="Tokens an example may have.", rich_help_panel=EXAMPLES)]
Steps = Annotated[int, typer.Option("--steps", min=1, help="Updates.", rich_help_panel=TRAINING)]
Rate = Annotated[
    float | None,
    typer.Option("--lr", help="Learning rate, falling to zero.", show_default="by method", rich_help_panel=TRAINING),
]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Examples at a time.", rich_help_panel=TRAINING)]
Accumulate = Annotated[int, typer.Option("--accumulate", min=1, help="Batches an update.", rich_help_panel=TRAINING)]
Every = Annotated[
    int | None,
    typer.Option(
        "--every", min=1, help="Updates between two validations.", show_default="a tenth", rich_help_panel=TRAINING
    ),
]
Objective = Annotated[
    Literal["ce", "distill"],
    typer.Option("--objective", help="Likelihood, or a teacher's distribution.", rich_help_panel=TRAINING),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher", metavar="MODEL", help="For distill.", show_default="the dense model", rich_help_panel=TRAINING
    ),
]
Hidden = Annotated[
    float | None,
    typer.Option(
        "--hidden", help="Weight of the distance of hidden states to the teacher's.", rich_help_panel=TRAINING
    ),
]
Tracker = Annotated[
    str | None,
    typer.Option("--tracker", metavar="NAME", help="tensorboard, wandb, … hears of it.", rich_help_panel=TRAINING),
]
Checkpointing = Annotated[
    bool,
    typer.Option("--checkpointing", help="Less memory, a third more time.", rich_help_panel=COMPUTE),
]


def _tuning_options(
    *,
    data: Data = None,
    method: Method = "state-offset",
    form: OffsetForm = None,
    rank: Rank = None,
    states: States = None,
    tokens: Tokens = None,
    sdt_channels: SdtChannels = None,
    sdt_states: SdtStates = None,
    warm_up: WarmUp = None,
    alpha: Alpha = None,
    targets: Targets = None,
    valid: Valid = None,
    test: Test = None,
    split: Split = None,
    task: Task = None,
    limit: Limit = None,
    prompt: Prompt = None,
    completion: Completion = None,
    length: Length = 512,
    steps: Steps = 300,
    lr: Rate = None,
    batch_size: BatchSize = 8,
    accumulate: Accumulate = 1,
    every: Every = None,
    objective: Objective = "ce",
    teacher: Teacher = None,
    hidden: Hidden = None,
    checkpointing: Checkpointing = False,
    tracker: Tracker = None,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: ComputeDtype = "auto",
    backend: Kernels = "auto",
) -> None:
    """What `tune-state` takes."""


def with_tuning_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Puts them between the verb's own parameters and its `**options`."""
    return with_options(_tuning_options, verb)
