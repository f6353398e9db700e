"""The command line: each verb parses, calls the function of its name, and turns what went wrong into an exit code."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

import ssmcompress
from ssmcompress.events import JsonLines, Terminal
from ssmcompress.exits import misused, telling
from ssmcompress.options import (
    GATE,
    OUTPUT,
    AdapterFolder,
    Against,
    BatchSize,
    ComputeDtype,
    ContextLength,
    Device,
    Fewshot,
    IncludePath,
    Json,
    Kernels,
    Lengths,
    Limit,
    MaxMemory,
    Model,
    NoEval,
    Out,
    Overrides,
    Overwrite,
    PerplexityText,
    Recall,
    RecipeName,
    ResultsOut,
    Seed,
    SpeedToo,
    SuiteName,
    Tasks,
    WindowLength,
    bare_perplexity,
    with_pruning_options,
    with_reducing_options,
)
from ssmcompress.tuning_options import with_tuning_options

REPEATABLE = {"adapter", "include", "exclude", "overrides", "max_drop"}

app = typer.Typer(
    name="ssmcompress",
    help="Makes pretrained Mamba, Mamba-2 and hybrid checkpoints smaller, and shows what was lost.\n\n"
    "MODEL is a shipped checkpoint (ref:mamba, ref:mamba2), a hub id (with @revision), or a folder.",
    epilog="Start with: ssmcompress prune ref:mamba --method wanda --sparsity 0.5 --out out/wanda50",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _call(verb: str, *subjects: Any, json: bool, **options: Any) -> None:
    for repeatable in REPEATABLE & options.keys():
        options[repeatable] = tuple(options[repeatable] or ())
    with telling(json) as emit:
        function: Callable[..., Any] = getattr(ssmcompress, verb)
        function(*subjects, **options, emit=emit)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"ssmcompress {ssmcompress.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the verb."""


@app.command(epilog="Example: ssmcompress prune ref:mamba --pattern 2:4 --out out/wanda-2-4")
@with_pruning_options
def prune(
    model: Model,
    *,
    out: Out,
    overwrite: Overwrite = False,
    no_eval: NoEval = False,
    max_memory: MaxMemory = None,
    **options: Any,
) -> None:
    """Set weights to zero, write the checkpoint, load it again and measure it."""
    _call("prune", model=model, out=out, overwrite=overwrite, no_eval=no_eval, max_memory=max_memory, **options)


@app.command("reduce-tokens", epilog="Example: ssmcompress reduce-tokens ref:mamba --flops 0.2 --out out/tokens20")
@with_reducing_options
def reduce_tokens(
    model: Model, *, out: Out, overwrite: Overwrite = False, no_eval: NoEval = False, **options: Any
) -> None:
    """Let tokens of long prompts leave on their way through the blocks, and measure what that costs."""
    given = {name: value for name, value in options.items() if value is not None}
    _call("reduce_tokens", model=model, out=out, overwrite=overwrite, no_eval=no_eval, **given)


@app.command("tune-state", epilog="Example: ssmcompress tune-state ref:mamba --data train.jsonl --out adapter")
@with_tuning_options
def tune_state(
    model: Model, *, out: Out, adapter: AdapterFolder = None, overwrite: Overwrite = False, **options: Any
) -> None:
    """Learn a few tensors in state space from examples, write them as an adapter, and measure it."""
    given = {name: value for name, value in options.items() if value is not None}
    _call("tune_state", model=model, out=out, adapter=adapter, overwrite=overwrite, **given)


@app.command(epilog="Example: ssmcompress plan ref:mamba --pattern 2:4")
@with_pruning_options
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL|RECIPE", help="What prune or run would be given.")],
    overrides: Overrides = None,
    **options: Any,
) -> None:
    """Show what prune or run would change: parameters and bytes before and after, and who loads the result."""
    _call("plan", model=model, overrides=overrides, **options)


@app.command(epilog="Example: ssmcompress run prune/wanda-50 sparsity=0.6 --out out/wanda60")
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    *,
    out: Out,
    overwrite: Overwrite = False,
    no_eval: NoEval = False,
    max_memory: MaxMemory = None,
    json: Json = False,
) -> None:
    """Do what a recipe says: compress, write, measure, and fail where more was lost than its gate allows."""
    _call("run", **locals())


@app.command(epilog="Example: ssmcompress apply out/wanda50/edits.safetensors ref:mamba --out out/again")
def apply(
    edits: Annotated[
        Path, typer.Argument(metavar="EDITS", help="edits.safetensors of an earlier output, or an adapter's folder.")
    ],
    model: Model,
    *,
    out: Out,
    own_config: Annotated[
        bool, typer.Option("--own-config", help="Let a state offset be a weight; stock transformers knows none.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    backend: Kernels = "auto",
) -> None:
    """Apply the edits of an earlier run again, the same bytes without calibration; or fold an adapter into weights."""
    _call("apply", **locals())


@app.command("eval", epilog="Example: ssmcompress eval out/wanda50 --perplexity --recall --out results/wanda50")
def evaluate(
    model: Model,
    *,
    adapter: AdapterFolder = None,
    perplexity: PerplexityText = None,
    recall: Recall = False,
    tasks: Tasks = None,
    suite: SuiteName = None,
    include_path: IncludePath = None,
    num_fewshot: Fewshot = None,
    speed: SpeedToo = False,
    against: Against = None,
    lengths: Lengths = "128,512",
    length: WindowLength = 512,
    context: ContextLength = None,
    limit: Limit = None,
    out: ResultsOut = None,
    overwrite: Overwrite = False,
    json: Json = False,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: ComputeDtype = "auto",
    backend: Kernels = "auto",
) -> None:
    """Measure a checkpoint as it lies on disk."""
    _call("evaluate", **locals() | {"tasks": () if tasks is None else tasks})


@app.command(epilog="Example: ssmcompress compare results/dense results/wanda50 --max-drop 0.01")
def compare(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS", help="Folders that eval --out wrote; the first is the reference.")
    ],
    *,
    max_drop: Annotated[
        list[str] | None,
        typer.Option(
            "--max-drop",
            metavar="[MEASURE=]BOUND",
            help="Loss allowed: points of an accuracy, share of a perplexity (repeatable). A real loss beyond it exits "
            "with 5.",
            rich_help_panel=GATE,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail too where such a loss is not excluded.", rich_help_panel=GATE)
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for comparison.json.", rich_help_panel=OUTPUT)
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    seed: Seed = 0,
) -> None:
    """Say whether what was lost is real: paired on the same items, with intervals; with --max-drop, a gate."""
    _call("compare", *results, max_drop=max_drop, strict=strict, out=out, overwrite=overwrite, json=json, seed=seed)


@app.command(epilog="Example: ssmcompress report out/wanda50 results/dense --out report.html")
def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDERS", help="Outputs of prune or run, and of eval, in any mix.")
    ],
    *,
    out: Annotated[Path, typer.Option("--out", help="Page to write.", rich_help_panel=OUTPUT)] = Path("report.html"),
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write one HTML page that shows what was done and what it cost."""
    _call("report", *folders, out=out, overwrite=overwrite, json=json)


@app.command(epilog='Example: ssmcompress generate out/wanda50 --against ref:mamba --prompt "Once upon a time"')
def generate(
    model: Model,
    *,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to go on from.")],
    adapter: AdapterFolder = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="A second model, shown beside the first.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")] = 0.0,
    json: Json = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: ComputeDtype = "auto",
    backend: Kernels = "auto",
) -> None:
    """Continue a prompt, with one model or with two side by side."""
    _call("generate", **locals())


@app.command(epilog="Example: ssmcompress convert out/wanda50 --to mamba-ssm --out out/original-layout")
def convert(
    model: Model,
    *,
    to: Annotated[Literal["hf", "mamba-ssm"], typer.Option("--to", help="Layout to write.", rich_help_panel=OUTPUT)],
    out: Out,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Rewrite a checkpoint in the Hugging Face or the mamba-ssm layout."""
    _call("convert", **locals())


recipes = typer.Typer(
    help="List, show and copy the recipes that come with the package.",
    epilog="Example: ssmcompress recipes cat prune/wanda-50",
    no_args_is_help=True,
)
app.add_typer(recipes, name="recipes")


@recipes.command("ls", epilog="Example: ssmcompress recipes ls")
def recipes_ls(json: Json = False) -> None:
    """List the shipped recipes."""
    _recipes("ls", json=json)


@recipes.command("cat", epilog="Example: ssmcompress recipes cat prune/wanda-50")
def recipes_cat(recipe: RecipeName, *, json: Json = False) -> None:
    """Show a recipe."""
    _recipes("cat", recipe, json=json)


@recipes.command("cp", epilog="Example: ssmcompress recipes cp prune/wanda-50 mine.yaml")
def recipes_cp(
    recipe: RecipeName,
    to: Annotated[Path, typer.Argument(metavar="TO", help="File or folder to copy it to.")],
    *,
    json: Json = False,
) -> None:
    """Copy a recipe, to be changed."""
    _recipes("cp", recipe, to, json=json)


def _recipes(name: str, *arguments: Any, json: bool) -> None:
    with telling(json) as emit:
        from ssmcompress import recipes

        getattr(recipes, name)(*arguments, emit=emit)


@app.command(epilog="Example: ssmcompress doctor")
def doctor(json: Json = False) -> None:
    """Report packages, compiler and kernels, and check every kernel against the reference."""
    _call("doctor", **locals())


@app.command(epilog="Example: ssmcompress models")
def models(json: Json = False) -> None:
    """List the supported families and the shipped checkpoints."""
    _call("models", **locals())


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and leaves with its exit code."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin for work halve the speed of a busy machine
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was begun is put away
    given = bare_perplexity(list(sys.argv[1:] if arguments is None else arguments))
    try:
        code = app(given, prog_name="ssmcompress", standalone_mode=False)
    except typer.TyperException as error:
        if error.format_message():  # else there were no arguments, and typer has shown the help
            event = misused(error, given)
            if "--json" in given:
                JsonLines(sys.stdout)(event)
            Terminal()(event)
        code = error.exit_code
    sys.exit(code)
