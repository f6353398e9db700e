"""The options of the command line that verbs share, and what is said of them in `--help`."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from ssmcompress.policy import Rule

Backend = Literal["auto", "native", "torch", "cuda", "reference"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Method = Literal[
    "wanda",
    "magnitude",
    "sparsegpt",
    "joint",
    "ghost",
    "sparsessm",
    "sparsessm_v2",
    "last",
    "taylor",
    "minitron",
    "flap",
    "shedder",
    "similarity",
    "rotate",
    "merge",
    "random",
]
AxisName = Literal["state", "channel", "dt_rank", "head", "head_channel", "group", "width", "ssm", "layer"]

TOKENS = "Which tokens leave"
SHIPPED = "default"  # the text that comes with the package
WHAT, TEXT, MEASURE, GATE, OUTPUT, COMPUTE = (
    "What to prune",
    "Calibration",
    "Measuring",
    "Gate",
    "Output",
    "Computing",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="ref:NAME, a hub id with optional @revision, or a folder.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write.", rich_help_panel=OUTPUT)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.", rich_help_panel=OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print events as JSON lines.", rich_help_panel=OUTPUT)]
Seed = Annotated[int, typer.Option("--seed", help="Of every random choice.", rich_help_panel=COMPUTE)]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.", rich_help_panel=COMPUTE)]
ComputeDtype = Annotated[
    Dtype, typer.Option("--dtype", help="Of the computation; auto: float32 on a CPU.", rich_help_panel=COMPUTE)
]
Kernels = Annotated[
    Backend, typer.Option("--backend", help="Kernels; auto: the fastest there is.", rich_help_panel=COMPUTE)
]
PruneMethod = Annotated[
    Method | None,
    typer.Option(
        "--method",
        help="How weights or units are scored; each axis has its own.",
        show_default="wanda",
        rich_help_panel=WHAT,
    ),
]
Axis = Annotated[
    AxisName | None,
    typer.Option("--axis", help="Remove units of this axis instead of zeroing weights.", rich_help_panel=WHAT),
]
KeepUnits = Annotated[
    float | None,
    typer.Option("--keep", help="Share of the units that stay, or their number (above 1).", rich_help_panel=WHAT),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="BUDGET",
        help="Instead of --keep: params=75%, state=50%, memory=500MB.",
        rich_help_panel=WHAT,
    ),
]
Correct = Annotated[
    Literal["none", "rescale", "refit", "bias"] | None,
    typer.Option(
        "--correct",
        help="Make up for what went: by new weights of out_proj, or by those of the norm that units share.",
        show_default="refit for channels and heads, rescale for width",
        rich_help_panel=WHAT,
    ),
]
AnySize = Annotated[bool, typer.Option("--any-size", help="Allow sizes that kernels run slowly.", rich_help_panel=WHAT)]
StockOnly = Annotated[
    bool, typer.Option("--stock-only", help="Refuse sizes that transformers cannot load.", rich_help_panel=WHAT)
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        "--sparsity",
        help="Share of weights set to zero, or of A_log made memoryless.",
        show_default="0.5",
        rich_help_panel=WHAT,
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option("--pattern", metavar="N:M", help="Keep N of every M inputs instead (2:4).", rich_help_panel=WHAT),
]
Scope = Annotated[
    Literal["row", "tensor", "layer", "model"] | None,
    typer.Option(
        "--scope",
        help="Where scores compete: those of weights in a tensor or a row (as in the WANDA paper), those of the units "
        "of an axis in a layer, or in the whole model, where layers end with sizes of their own.",
        show_default="tensor; layer",
        rich_help_panel=WHAT,
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option("--include", metavar="MODULE", help="Only this module (repeatable).", rich_help_panel=WHAT),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", metavar="MODULE", help="Not this module (repeatable).", rich_help_panel=WHAT),
]
Calib = Annotated[
    str | None,
    typer.Option("--calib", help="Text, JSON lines or a data set id; else the shipped text.", rich_help_panel=TEXT),
]
CalibSplit = Annotated[str | None, typer.Option("--calib-split", help="Of the data set.", rich_help_panel=TEXT)]
CalibColumn = Annotated[str | None, typer.Option("--calib-column", help="That holds the text.", rich_help_panel=TEXT)]
CalibMix = Annotated[
    Literal["recall"] | None,
    typer.Option("--calib-mix", help="Mix in memory exercises.", rich_help_panel=TEXT),
]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Read the model block by block within 3GB, say."),
]
NoEval = Annotated[bool, typer.Option("--no-eval", help="Skip the figures before and after.", rich_help_panel=OUTPUT)]
TokenMethod = Annotated[
    Rule | None,
    typer.Option("--method", help="The rule by which tokens leave.", show_default="utrc", rich_help_panel=TOKENS),
]
Flops = Annotated[
    float | None,
    typer.Option(
        "--flops",
        help="Share of the blocks' work to save on a long prompt.",
        show_default="0.2",
        rich_help_panel=TOKENS,
    ),
]
KeepTokens = Annotated[
    float | None,
    typer.Option("--keep", help="Instead: share of the tokens that stay each time.", rich_help_panel=TOKENS),
]
Anchors = Annotated[
    str | None,
    typer.Option(
        "--layers",
        metavar="N,N",
        help="Blocks after which tokens leave, from 0.",
        show_default="the paper's, by depth",
        rich_help_panel=TOKENS,
    ),
]
Pruned = Annotated[
    float | None,
    typer.Option(
        "--pruned",
        help="utrc: share of the removed tokens that are not merged.",
        show_default="0.5",
        rich_help_panel=TOKENS,
    ),
]
TokenImportance = Annotated[
    Literal["clip", "l1", "l2", "mean"] | None,
    typer.Option(
        "--importance",
        help="utrc, evit: of a token, from the mixer's output.",
        show_default="clip",
        rich_help_panel=TOKENS,
    ),
]
Merging = Annotated[
    Literal["mean", "sequential"] | None,
    typer.Option(
        "--merge", help="utrc, tome, pumer: several tokens into one.", show_default="mean", rich_help_panel=TOKENS
    ),
]
MatchWindow = Annotated[
    int | None,
    typer.Option(
        "--match-window",
        metavar="TOKENS",
        help="utrc, tome, pumer: merge only tokens so near; the time then grows with the length alone.",
        show_default="anywhere",
        rich_help_panel=TOKENS,
    ),
]
DecayOption = Annotated[
    Literal["drop", "carry"],
    typer.Option(
        "--decay",
        help="Drop the steps of tokens that leave, or let the next one decay for them too.",
        rich_help_panel=TOKENS,
    ),
]
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A shipped recipe's name, or a path.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe (sparsity=0.6).")
]
Windows = Annotated[int, typer.Option("--windows", min=1, help="Number of token windows.", rich_help_panel=TEXT)]
Length = Annotated[int, typer.Option("--length", min=1, help="Tokens a window.", rich_help_panel=TEXT)]

PerplexityText = Annotated[
    str | None,
    typer.Option(
        "--perplexity",
        metavar="[TEXT]",
        help="Bits per byte and perplexity on a text or JSON lines file; alone: on the shipped text. "
        "The default where no other measure is asked for.",
        rich_help_panel=MEASURE,
    ),
]
AdapterFolder = Annotated[
    list[Path] | None,
    typer.Option("--adapter", metavar="DIR", help="Adapter in PEFT's format, put into MODEL (repeatable)."),
]
Recall = Annotated[bool, typer.Option("--recall", help="Copying and key-value recall.", rich_help_panel=MEASURE)]
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", metavar="A,B", help="lm-eval tasks, shipped or of the hub.", rich_help_panel=MEASURE),
]
SuiteName = Annotated[
    str | None,
    typer.Option("--suite", metavar="NAME", help="smoke, standard or a YAML file.", rich_help_panel=MEASURE),
]
IncludePath = Annotated[
    Path | None,
    typer.Option("--include-path", metavar="DIR", help="Folder of more task YAMLs.", rich_help_panel=MEASURE),
]
Fewshot = Annotated[
    int | None, typer.Option("--num-fewshot", min=0, help="Examples in the prompt.", rich_help_panel=MEASURE)
]
SpeedToo = Annotated[
    bool, typer.Option("--speed", help="Prefill, first token, decoding, memory, FLOPs.", rich_help_panel=MEASURE)
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against", metavar="MODEL", help="Time another model in turns with this one.", rich_help_panel=MEASURE
    ),
]
Lengths = Annotated[
    str, typer.Option("--lengths", metavar="N,N", help="Prompts for --speed, in tokens.", rich_help_panel=MEASURE)
]
ContextLength = Annotated[
    int | None,
    typer.Option(
        "--context",
        min=0,
        metavar="TOKENS",
        help="Of a window, read and not scored: tokens may leave there.",
        show_default="half where tokens leave, else 0",
        rich_help_panel=MEASURE,
    ),
]
WindowLength = Annotated[int, typer.Option("--length", min=2, help="Tokens a window.", rich_help_panel=MEASURE)]
Limit = Annotated[
    int | None,
    typer.Option("--limit", min=1, help="Only the first so many documents or items.", rich_help_panel=MEASURE),
]
ResultsOut = Annotated[
    Path | None,
    typer.Option("--out", help="Folder for the results; an interrupted run goes on in it.", rich_help_panel=OUTPUT),
]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, help="Windows or prompts at a time.", rich_help_panel=COMPUTE)
]


def _pruning_options(
    *,
    method: PruneMethod = None,
    sparsity: Sparsity = None,
    axis: Axis = None,
    keep: KeepUnits = None,
    target: Target = None,
    correct: Correct = None,
    any_size: AnySize = False,
    stock_only: StockOnly = False,
    pattern: Pattern = None,
    scope: Scope = None,
    include: Include = None,
    exclude: Exclude = None,
    calib: Calib = None,
    calib_split: CalibSplit = None,
    calib_column: CalibColumn = None,
    calib_mix: CalibMix = None,
    windows: Windows = 64,
    length: Length = 512,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: ComputeDtype = "auto",
    backend: Kernels = "auto",
) -> None:
    """What `prune` and `plan` have in common."""


def _reducing_options(
    *,
    method: TokenMethod = None,
    flops: Flops = None,
    layers: Anchors = None,
    keep: KeepTokens = None,
    pruned: Pruned = None,
    importance: TokenImportance = None,
    merge: Merging = None,
    match_window: MatchWindow = None,
    decay: DecayOption = "drop",
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: ComputeDtype = "auto",
    backend: Kernels = "auto",
) -> None:
    """What `reduce-tokens` takes."""


def with_pruning_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Puts what `prune` and `plan` have in common between a verb's own parameters and its `**options`."""
    return with_options(_pruning_options, verb)


def with_reducing_options(verb: Callable[..., None]) -> Callable[..., None]:
    """Puts the options of token reduction there."""
    return with_options(_reducing_options, verb)


def with_options(options: Callable[..., None], verb: Callable[..., None]) -> Callable[..., None]:
    """Puts the parameters of one function between a verb's own and its `**options`."""
    own = [each for each in inspect.signature(verb).parameters.values() if each.kind != each.VAR_KEYWORD]
    verb.__signature__ = inspect.Signature([*own, *inspect.signature(options).parameters.values()])  # type: ignore[attr-defined]
    return verb


def bare_perplexity(arguments: list[str]) -> list[str]:
    """Lets --perplexity stand without a value, which typer's options cannot."""
    following = [*arguments, "--"][1:]
    return [
        f"--perplexity={SHIPPED}" if argument == "--perplexity" and after.startswith("-") else argument
        for argument, after in zip(arguments, following, strict=True)
    ]
