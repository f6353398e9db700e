"""A suite from the command line: what it writes, going on after a kill, and what it refuses."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ssmcompress
from ssmcompress.checkpoint.source import resolve
from ssmcompress.evaluate import evaluation, finished
from ssmcompress.evaluate.harness import Harness
from ssmcompress.evaluate.results import read

SUITE = """
name: tiny
description: A few items of everything.
recall: true
limit: 3
tasks:
  - task: lambada_openai_local
  - task: arc_easy_local
  - task: openbookqa_local
    limit: 2
"""
TASKS = ("lambada_openai_local", "arc_easy_local", "openbookqa_local")


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "tiny.yaml"
    path.write_text(SUITE)
    return str(path)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A text of two documents."""
    path = tmp_path_factory.mktemp("pages") / "pages.jsonl"
    path.write_text('{"text": "There was a man who had two sons."}\n{"text": "The younger of them went away."}\n')
    return str(path)


@pytest.fixture(scope="module")
def whole(suite, pages, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    ssmcompress.evaluate("ref:mamba", suite=suite, perplexity=pages, out=out)
    return out


def ours(folder):
    """The files of a folder but those of lm-eval, which hold times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_suite_writes_figures_items_and_the_files_of_lm_eval(run, suite, pages, whole, tmp_path):
    out = tmp_path / "out"
    given = ("eval", "ref:mamba", "--suite", suite, "--perplexity", pages, "--out", out)
    code, printed, err = run(*given)
    assert code == 0, err
    assert "arc_easy_local" in printed and "not measurable" in printed and "±" in printed
    assert "error" not in err and "Traceback" not in err
    found = read(out)
    scored = {(score.task, score.metric): score for score in found.summary.tasks}
    assert {task for task, _ in scored} == set(TASKS)
    assert [scored["lambada_openai_local", "acc"].limit, scored["openbookqa_local", "acc"].limit] == [3, 2]
    assert found.summary.harness_versions["lm_eval"].startswith("0.4.") and found.summary.seeds["random"] == 0
    assert {"text/bits_per_byte", "recall/copy-20", "recall/key-value-4"} < set(found.samples)
    for task in TASKS:
        (results,) = (out / "lm_eval" / task).rglob("results_*.json")
        given_there = json.loads(results.read_text())["results"][task]
        for (name, metric), score in scored.items():
            if name == task:
                assert given_there[f"{metric},none"] == score.value
                assert len(found.samples[f"{task}/{metric}"].items) == score.samples
                assert found.samples[f"{task}/{metric}"].figure == pytest.approx(score.value)
    for probe in found.summary.recall:
        assert found.samples[f"recall/{probe['probe']}-{probe['load']}"].figure == pytest.approx(probe["accuracy"])
    assert ours(out) == ours(whole)


def test_a_suite_without_a_folder_only_prints(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, printed, err = run("eval", "ref:mamba2", "--tasks", "arc_easy_local,openbookqa_local", "--limit", 2, "--json")
    assert code == 0, err
    events = [json.loads(line) for line in printed.splitlines()]
    (table,) = [event for event in events if event["event"] == "table"]
    assert [row[0] for row in table["rows"]] == ["arc_easy_local"] * 2 + ["openbookqa_local"] * 2
    assert [event["name"] for event in events if event["event"] == "phase"] == ["arc_easy_local", "openbookqa_local"]
    assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
import ssmcompress
from ssmcompress.evaluate.harness import Harness

measure = Harness.run

def run(self, checkpoint, entry, place, **settings):
    found = measure(self, checkpoint, entry, place, **settings)
    if entry.task == "arc_easy_local":
        os.kill(os.getpid(), 9)  # its files are there, its figures are not yet
    return found

Harness.run = run
suite, pages, out = sys.argv[1:]
ssmcompress.evaluate("ref:mamba", suite=suite, perplexity=pages, out=out)
"""


def test_a_killed_suite_goes_on_after_its_last_finished_task(run, suite, pages, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, suite, pages, str(out)], capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    partial = tmp_path / "out.partial"
    assert not out.exists() and (partial / "lm_eval" / "arc_easy_local").is_dir()
    done = {path.stem for path in (partial / finished.FOLDER).glob("*.json")}
    assert done == {"perplexity", "recall", "task-lambada_openai_local"}
    for module, name in ((evaluation, "score"), (evaluation.probes, "recall")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("measured again"))
    measured, measure = [], Harness.run

    def counted(self, checkpoint, entry, place, **settings):
        measured.append(entry.task)
        return measure(self, checkpoint, entry, place, **settings)

    monkeypatch.setattr(Harness, "run", counted)
    code, _, err = run("eval", "ref:mamba", "--suite", suite, "--perplexity", pages, "--out", out)
    assert code == 0, err
    assert "going on after perplexity, recall, task-lambada_openai_local" in " ".join(err.split())
    assert measured == ["arc_easy_local", "openbookqa_local"]
    assert ours(out) == ours(whole)
    assert len(list((out / "lm_eval").rglob("results_*.json"))) == len(TASKS)
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == [out]


@pytest.mark.parametrize("others", [("--limit", 2), ("--num-fewshot", 1), ("--seed", 1), ("--batch-size", 3)])
def test_what_was_asked_otherwise_is_not_taken_over(run, tmp_path, monkeypatch, others):
    out, measured, measure = tmp_path / "out", [], Harness.run

    def cut_short(self, checkpoint, entry, place, **settings):
        measured.append(entry.task)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(self, checkpoint, entry, place, **settings)

    monkeypatch.setattr(Harness, "run", cut_short)
    given = ("eval", "ref:mamba", "--tasks", "arc_easy_local,openbookqa_local", "--out", out)
    code, _, err = run(*given, "--limit", 1)
    assert code == 130 and "Interrupted" in err
    code, _, err = run(*given, "--limit", 1, *others)
    assert code == 0, err
    assert measured[2:] == ["arc_easy_local", "openbookqa_local"]


RAISING = """
task: raising
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: loglikelihood
doc_to_text: "The"
doc_to_target: " x"
process_results: !function code.answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.mark.parametrize("failure", ["task", "memory", "bug"])
def test_a_failure_late_in_a_suite_costs_nothing_that_was_finished(run, pages, tmp_path, monkeypatch, failure):
    tasks, out, measure = tmp_path / "tasks", tmp_path / "out", Harness.run
    tasks.mkdir()
    (tasks / "raising.yaml").write_text(RAISING.format(data=pages, cache=tmp_path / "cache"))
    (tasks / "code.py").write_text(
        "import os\n\ndef answer(doc, results):\n    return {'acc': int(os.environ['ANSWER'])}\n"
    )
    monkeypatch.delenv("ANSWER", raising=False)
    errors = {"memory": torch.OutOfMemoryError("out of memory"), "bug": ZeroDivisionError()}

    def failing(self, checkpoint, entry, place, **settings):
        if entry.task == "raising" and failure in errors:
            raise errors[failure]
        return measure(self, checkpoint, entry, place, **settings)

    monkeypatch.setattr(Harness, "run", failing)
    given = ("eval", "ref:mamba2", "--tasks", "openbookqa_local,raising", "--include-path", tasks, "--limit", 2)
    code, printed, err = run(*given, "--out", out)
    assert code == {"task": 2, "memory": 4, "bug": 1}[failure] and not out.exists()
    assert "Finished and kept: task-openbookqa_local" in " ".join((printed + err).split())
    monkeypatch.setenv("ANSWER", "1")
    measured = []

    def counted(self, checkpoint, entry, place, **settings):
        measured.append(entry.task)
        return measure(self, checkpoint, entry, place, **settings)

    monkeypatch.setattr(Harness, "run", counted)
    code, _, err = run(*given, "--out", out)
    assert code == 0, err
    assert measured == ["raising"] and len(read(out).samples) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--tasks", "arc_esy_local"), "arc_easy_local"),
        (("--suite", "smok"), "smoke"),
        (("--tasks", "arc_easy_local", "--include-path", "nowhere"), "nowhere"),
        (("--tasks", "hellaswag"), "hellaswag"),
    ],
)
def test_what_is_not_there_is_refused(run, tmp_path, given, said):
    code, printed, err = run("eval", "ref:mamba", *given, "--out", tmp_path / "out")
    assert code == 2 and said in err and "Traceback" not in err and not printed
    assert not list(tmp_path.iterdir())


def test_a_model_that_gives_nan_leaves_nothing(run, tmp_path):
    shutil.copytree(resolve("ref:mamba").folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = "backbone.layers.1.mixer.out_proj.weight"
    weights[name] = torch.full_like(weights[name], 3e38)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    for measure in (("--tasks", "arc_easy_local"), ("--perplexity",), ("--recall",)):
        code, _, err = run("eval", tmp_path / "model", *measure, "--limit", 2, "--out", tmp_path / "out")
        assert code == 2 and "NaN" in err and "Traceback" not in err, measure
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk(run, suite, tmp_path, monkeypatch):
    write = Path.write_text

    def full(path, *args, **kwargs):
        if path.name.startswith("task-arc_easy_local"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    given = ("eval", "ref:mamba", "--tasks", "openbookqa_local,arc_easy_local", "--limit", 2, "--out", tmp_path / "out")
    code, _, err = run(*given)
    assert code == 4 and "disk is full" in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Path, "write_text", write)
    code, _, err = run(*given)
    assert code == 0 and "going on after task-openbookqa_local" in " ".join(err.split())
