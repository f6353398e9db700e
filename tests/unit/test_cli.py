import errno
import inspect
import json
import subprocess
import sys
from functools import partial
from importlib import import_module
from typing import get_args

import pytest

import ssmcompress
from ssmcompress import cli, options
from ssmcompress.errors import BackendError, GateError, InputError, UnsupportedError
from ssmcompress.events import Note, Table
from ssmcompress.recipe import PruneOptions, Recipe, pruning
from ssmcompress.steps import METHODS, Cut, Prune, Scope

VERBS = {
    *("prune", "plan", "apply", "eval", "generate", "compare"),
    *("convert", "doctor", "models", "report", "run", "recipes"),
}
NEEDED = {
    "prune": ["prune", "MODEL", "--out", "out"],
    "plan": ["plan", "MODEL"],
    "run": ["run", "prune/wanda-50", "--out", "out"],
    "apply": ["apply", "edits.safetensors", "MODEL", "--out", "out"],
    "evaluate": ["eval", "MODEL"],
    "generate": ["generate", "MODEL", "--prompt", "Once"],
    "compare": ["compare", "A", "B"],
    "convert": ["convert", "MODEL", "--to", "mamba-ssm", "--out", "out"],
    "report": ["report", "A", "B"],
    "doctor": ["doctor"],
    "models": ["models"],
}


def run(*arguments):
    """The exit code of a command line."""
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    return left.value.code or 0


@pytest.fixture
def calls(monkeypatch):
    """What the verbs pass on to the functions of their names."""
    seen = []
    for name in NEEDED:
        monkeypatch.setitem(vars(ssmcompress), name, partial(_record, seen, name))
    return seen


def _record(seen, name, *results, **given):
    seen.append((name, given | ({"results": results} if results else {})))


def fails_with(monkeypatch, error):
    def doctor(*, emit):
        raise error

    monkeypatch.setitem(vars(ssmcompress), "doctor", doctor)


def python(code, **kwargs):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **kwargs)


def test_help_needs_neither_torch_nor_transformers():
    code = """
import sys
from ssmcompress.cli import main
for arguments in (["--help"], ["prune", "--help"], ["--version"]):
    try:
        main(arguments)
    except SystemExit as left:
        assert not left.code
print("loaded:", sorted({"torch", "transformers", "numpy", "yaml"} & sys.modules.keys()))
"""
    ran = python(code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "loaded: []"
    assert f"ssmcompress {ssmcompress.__version__}" in ran.stdout
    assert all(verb in ran.stdout for verb in VERBS)


def test_the_module_runs_as_a_command():
    ran = subprocess.run([sys.executable, "-m", "ssmcompress", "--version"], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout) == (0, f"ssmcompress {ssmcompress.__version__}\n")


def test_functions_stay_functions_when_modules_of_their_names_are_imported():
    code = """
import ssmcompress, ssmcompress.doctor, ssmcompress.cli
from ssmcompress import doctor
from ssmcompress.doctor import Diagnosis
print(type(ssmcompress.doctor).__name__, type(doctor).__name__, type(ssmcompress.cli).__name__)
print("prune" in dir(ssmcompress))
"""
    ran = python(code)
    assert ran.stdout.split() == ["function", "function", "module", "True"], ran.stderr


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="prnue"):
        _ = ssmcompress.prnue


@pytest.mark.parametrize("name", NEEDED)
def test_each_verb_calls_the_function_of_its_name(calls, name):
    assert run(*NEEDED[name]) == 0
    (found, given), *others = calls
    assert found == name and not others and callable(given["emit"])


@pytest.mark.parametrize("name", NEEDED)
def test_each_option_is_an_argument_with_the_same_default(calls, name):
    run(*NEEDED[name])
    given = calls[0][1]
    function = getattr(import_module(ssmcompress.FUNCTIONS[name]), name)
    listed = inspect.signature(function).parameters.values()
    parameters = {"results" if each.kind == each.VAR_POSITIONAL else each.name: each for each in listed}
    if parameters.pop("options", None):  # those of a pruning recipe, whose schema has the defaults
        options = {key: given.pop(key) for key in PruneOptions.__annotations__ if key in given}
        assert PruneOptions.__annotations__.keys() - options.keys() == {"modules"}  # a table has no place on a line
        assert pruning("MODEL", options) == pruning("MODEL", {})
    required = {"model", "recipe", "out", "edits", "prompt", "to", "results", "emit"}
    assert given.keys() == parameters.keys()
    assert {key: value for key, value in given.items() if key not in required} == {
        key: parameter.default for key, parameter in parameters.items() if key not in required
    }


def test_options_arrive_as_they_were_given(calls):
    line = (
        "prune MODEL --method sparsegpt --pattern 2:4 --scope row --include in_proj --include out_proj --exclude x_proj"
    )
    line += " --calib text.jsonl --calib-split train --calib-column text --calib-mix recall --windows 8 --length 64"
    line += " --axis state --keep 0.5 --target state=50% --correct refit --any-size"
    line += (
        " --no-eval --overwrite --max-memory 3GB --seed 3 --device cuda:1 --dtype bfloat16 --backend torch --out out"
    )
    assert run(*line.split()) == 0
    given = calls[0][1]
    given["out"] = str(given["out"])
    del given["emit"]
    assert given == {
        "model": "MODEL",
        "method": "sparsegpt",
        "sparsity": None,
        "pattern": "2:4",
        "scope": "row",
        "axis": "state",
        "keep": 0.5,
        "target": "state=50%",
        "correct": "refit",
        "any_size": True,
        "stock_only": False,
        "include": ("in_proj", "out_proj"),
        "exclude": ("x_proj",),
        "calib": "text.jsonl",
        "calib_split": "train",
        "calib_column": "text",
        "calib_mix": "recall",
        "windows": 8,
        "length": 64,
        "no_eval": True,
        "max_memory": "3GB",
        "overwrite": True,
        "seed": 3,
        "device": "cuda:1",
        "dtype": "bfloat16",
        "backend": "torch",
        "out": "out",
    }


@pytest.mark.parametrize(
    ("line", "perplexity", "recall"),
    [
        ("eval MODEL", None, False),  # asked for nothing, the function measures the shipped text: its own test
        ("eval MODEL --perplexity", "default", False),
        ("eval MODEL --perplexity --limit 3", "default", False),
        ("eval MODEL --perplexity text.txt", "text.txt", False),
        ("eval MODEL --perplexity=text.txt --recall", "text.txt", True),
        ("eval MODEL --perplexity --recall", "default", True),
        ("eval MODEL --recall", None, True),
    ],
)
def test_the_text_of_perplexity_is_optional(calls, line, perplexity, recall):
    assert run(*line.split()) == 0
    assert (calls[0][1]["perplexity"], calls[0][1]["recall"]) == (perplexity, recall)


def test_choices_are_those_of_the_recipe():

    methods = {
        *get_args(Prune.model_fields["method"].annotation),
        *(name for names in METHODS.values() for name in names),
    }
    assert set(get_args(options.Method)) == methods
    assert get_args(options.AxisName) == get_args(Cut.model_fields["axis"].annotation) == tuple(METHODS)
    scopes = {*get_args(Scope), *get_args(get_args(Cut.model_fields["scope"].annotation)[0])}
    assert set(get_args(get_args(get_args(options.Scope)[0])[0])) == scopes
    assert set(get_args(options.Backend)) == set(get_args(Recipe.model_fields["backend"].annotation))


@pytest.mark.parametrize(("error", "code"), [(InputError, 2), (UnsupportedError, 3), (BackendError, 4), (GateError, 5)])
def test_errors_are_a_sentence_a_hint_and_an_exit_code(monkeypatch, capsys, error, code):
    fails_with(monkeypatch, error("What [is] wrong.", hint="What to do."))
    assert run("doctor") == code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: What [is] wrong.\nhint: What to do.\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"),
            "out/model.safetensors does not fit",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out may not be"),
        (RuntimeError('IoError(Os { code: 28, kind: StorageFull, message: "No space" })'), "the disk is full"),
        (MemoryError(), "Memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), "Memory ran out"),
    ],
)
def test_what_the_machine_lacks_is_exit_code_4(monkeypatch, capsys, error, words):
    fails_with(monkeypatch, error)
    assert run("doctor") == 4
    err = capsys.readouterr().err
    assert err.startswith("error: ") and words in err and "Traceback" not in err


@pytest.mark.parametrize("error", [ValueError("boom"), FileNotFoundError(errno.ENOENT, "gone", "x"), AssertionError()])
def test_anything_else_is_our_bug(monkeypatch, capsys, error):
    fails_with(monkeypatch, error)
    assert run("doctor") == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and type(error).__name__ in err and "This is a bug in ssmcompress." in err


def test_an_interrupt_is_exit_code_130(monkeypatch, capsys):
    fails_with(monkeypatch, KeyboardInterrupt())
    assert run("doctor") == 130
    err = capsys.readouterr().err
    assert "Interrupted" in err and "Traceback" not in err


def test_a_reader_that_leaves_ends_it_quietly():
    code = """
import ssmcompress
from ssmcompress.cli import main
from ssmcompress.events import Finished
def doctor(*, emit):
    for _ in range(20000):
        emit(Finished("out/" + "x" * 60))
ssmcompress.doctor = doctor
main(["doctor"])
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ran:
        ran.stdout.readline()
        ran.stdout.close()
        assert ran.stderr.read() == b""
    assert ran.returncode == 141


def test_json_prints_events_as_lines(monkeypatch, capsys):
    def doctor(*, emit):
        emit(Note("a note"))
        emit(Table("t", ("a",), (("1",),)))
        raise InputError("Wrong.", hint="Right.")

    monkeypatch.setitem(vars(ssmcompress), "doctor", doctor)
    assert run("doctor", "--json") == 2
    out, err = capsys.readouterr()
    note, table, failed = (json.loads(line) for line in out.splitlines())
    assert (note["event"], note["text"], table["event"], table["rows"]) == ("note", "a note", "table", [["1"]])
    assert {key: failed[key] for key in ("event", "message", "hint", "exit_code")} == {
        "event": "failed",
        "message": "Wrong.",
        "hint": "Right.",
        "exit_code": 2,
    }
    assert err == "error: Wrong.\nhint: Right.\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prune MODEL", "--out"),
        ("prune", "MODEL"),
        ("prun MODEL", "prune"),
        ("prune MODEL --out out --metod wanda", "--method"),
        ("prune MODEL --out out --method wnda", "Did you mean 'wanda'?"),
        ("prune MODEL --out out --sparsity half", "valid number"),
        ("prune MODEL --out out --windows 0", "--windows"),
        ("eval MODEL --length 1", "--length"),
        ("convert MODEL --out out --to gguf", "mamba-ssm"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_names_what_was_meant(calls, capsys, line, words):
    assert run(*line.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and words in err and "hint: " in err
    assert not out and not calls


def test_without_a_verb_there_is_help(capsys):
    assert run() == 2
    out, err = capsys.readouterr()
    assert "Commands" in out + err and "error" not in err


def test_every_verb_shows_an_example(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")
    for verb in VERBS:
        assert run(verb, "--help") == 0
        assert f"Example: ssmcompress {verb}" in capsys.readouterr().out


def test_a_model_taken_for_a_text_is_explained(capsys):
    assert run("eval", "--perplexity", "ref:mamba") == 2
    assert "put MODEL first" in capsys.readouterr().err
