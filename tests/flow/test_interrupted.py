"""A run that ends before its time leaves nothing under the final name, and the next one succeeds."""

import signal
import subprocess
import sys

import pytest
from safetensors.torch import save_file

import ssmcompress
from ssmcompress.checkpoint import manifest, shards
from ssmcompress.checkpoint.output import output
from tests.flow.conftest import FAMILIES
from tests.flow.test_bytes import contents

MOMENTS = (
    "ssmcompress.run.load",
    "ssmcompress.calib.data.windows",
    "ssmcompress.making.find_edits",
    "ssmcompress.checkpoint.shards.save_file",
    "ssmcompress.run.verify",
    "ssmcompress.checkpoint.card.write",
    "ssmcompress.checkpoint.output._replace",
)


def interrupted(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_leaves_no_output_and_the_next_run_goes_on(run, models, text, tmp_path, monkeypatch, moment):
    module, _, name = moment.rpartition(".")
    monkeypatch.setattr(sys.modules[module], name, interrupted)
    arguments = ("--calib", text, "--windows", 4, "--length", 32, "--no-eval", "--out", tmp_path / "out")
    code, _, err = run("prune", models["mamba"], *arguments)
    assert code == 130
    assert "Interrupted" in err and "Traceback" not in err
    begun = [] if moment in MOMENTS[:3] else ["out.partial"]  # before the first layer nothing is worth keeping
    assert [path.name for path in tmp_path.iterdir()] == begun
    monkeypatch.undo()
    assert run("prune", models["mamba"], *arguments)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert manifest.changed(tmp_path / "out") == []


def test_an_interrupt_leaves_the_earlier_output(run, models, small, text, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ssmcompress.prune(models["mamba"], out=out, **small)
    before = contents(out)
    monkeypatch.setattr(sys.modules["ssmcompress.run"], "verify", interrupted)
    code, _, _ = run("prune", models["mamba"], "--calib", text, "--no-eval", "--overwrite", "--out", out)
    assert code == 130
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]


def test_what_does_not_load_to_the_same_logits_gets_no_name(run, models, text, tmp_path, monkeypatch):
    def damaged(tensors, *args, **kwargs):
        name = "backbone.layers.1.mixer.out_proj.weight"
        save_file(tensors | {name: tensors[name] * 1.01}, *args, **kwargs)

    monkeypatch.setattr(shards, "save_file", damaged)
    given = ("--calib", text, "--windows", 4, "--length", 32, "--no-eval", "--out", tmp_path / "out")
    code, _, err = run("prune", models["mamba"], *given)
    assert code == 1 and "does not load again" in err and "report" in err
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
import ssmcompress.run

run = sys.modules["ssmcompress.run"]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def rename_and_die(path, target, rename=Path.rename):
    rename(path, target)
    if str(target).endswith(".replaced"):
        die()

moment, model, out, text = sys.argv[1:]
if moment == "verify":
    run.verify = die
else:
    Path.rename = rename_and_die
ssmcompress.prune(model, out=out, calib=text, windows=4, length=32, no_eval=True, overwrite=True)
"""


def killed(moment, model, out, text):
    ran = subprocess.run(
        [sys.executable, "-c", KILLED, moment, model, str(out), text], capture_output=True, timeout=120
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()


def test_a_killed_run_leaves_no_output_and_the_next_one_succeeds(models, text, small, tmp_path):
    out = tmp_path / "out"
    killed("verify", models["mamba"], out, text)
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    ssmcompress.prune(models["mamba"], out=out, **small)
    assert manifest.changed(out) == []
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == [out]
    fresh = ssmcompress.prune(models["mamba"], out=tmp_path / "fresh", **small).folder
    assert contents(out) == contents(fresh)


def test_a_run_killed_between_its_renames_loses_nothing(models, text, small, tmp_path, run):
    out = tmp_path / "out"
    ssmcompress.prune(models["mamba"], out=out, **small)
    before = contents(out)
    killed("rename", models["mamba"], out, text)
    assert not out.exists() and contents(tmp_path / "out.replaced") == before
    code, _, err = run("prune", models["mamba"], "--calib", text, "--no-eval", "--out", out)
    assert code == 2 and "exists already" in err  # the earlier output is back under its name
    assert contents(out) == before


def test_a_second_writer_is_refused(run, models, text, small, tmp_path):
    with output(tmp_path / "out"):
        code, _, err = run("prune", models[FAMILIES[0]], "--calib", text, "--no-eval", "--out", tmp_path / "out")
    assert code == 4 and "Another run" in err


def test_a_terminated_run_puts_away_what_it_began(models, text, tmp_path):
    out = tmp_path / "out"
    code = "import os, signal, sys, ssmcompress.run; from ssmcompress import cli; "
    code += "sys.modules['ssmcompress.run'].verify = lambda *_: os.kill(os.getpid(), signal.SIGTERM); "
    code += "cli.main(sys.argv[1:])"
    given = ["prune", models["mamba"], "--calib", text, "--windows", "4", "--length", "32", "--no-eval", "--out", out]
    ran = subprocess.run([sys.executable, "-c", code, *map(str, given)], capture_output=True, timeout=120)
    assert ran.returncode == 130 and b"Interrupted" in ran.stderr and b"Traceback" not in ran.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]  # and no lock
