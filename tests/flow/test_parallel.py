"""Two processes that do one run together find what one process finds; where one of them dies the other says so."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import ssmcompress
from ssmcompress import edits as editing
from ssmcompress import parallel
from ssmcompress.cli import main
from ssmcompress.edits import Replace
from ssmcompress.errors import InputError
from ssmcompress.tune.record import MEASURED

SHARED = """
import json, sys
import ssmcompress

for verb, model, out, options in json.loads(sys.argv[1]):
    getattr(ssmcompress, verb)(model, out=out, **options)
"""
DIES = """
import os, signal, sys
import ssmcompress
from ssmcompress.calib import walk

def observe(*given, before=walk.Walk._observe):
    if given[1] and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return before(*given)

walk.Walk._observe = observe
from ssmcompress.cli import main
main(sys.argv[1:])
"""
TUNING_DIES = """
import os, signal, sys
from ssmcompress.tune import fit

def loss(self, *given, before=fit._Fit.compute_loss, **more):
    if self.state.global_step == 5 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return before(self, *given, **more)

fit._Fit.compute_loss = loss
from ssmcompress.cli import main
main(sys.argv[1:])
"""
SLOW = """
import os, sys, time
from ssmcompress.evaluate import evaluation

def load(*given, before=evaluation.load, **more):
    time.sleep(4 * int(os.environ["RANK"]))
    return before(*given, **more)

evaluation.load = load
from ssmcompress.cli import main
main(sys.argv[1:])
"""
PRUNED = {
    "wanda": ("mamba", {"method": "wanda"}),
    "sparsegpt": ("mamba2", {"method": "sparsegpt", "include": ("in_proj",)}),
    "sparsessm": ("mamba", {"method": "sparsessm"}),
    "taylor": ("mamba", {"axis": "channel", "method": "taylor", "keep": 0.5}),
    "joint": ("mamba2", {"axis": "state", "method": "joint", "keep": 0.5, "scope": "model"}),
    "flap": ("mamba2", {"axis": "head_channel", "method": "flap", "keep": 0.5, "any_size": True}),
    "refit": ("mamba2", {"axis": "head_channel", "method": "minitron", "correct": "refit", "keep": 0.5}),
    "shedder": ("mamba2", {"axis": "layer", "method": "shedder", "keep": 0.5}),
    "similarity": ("mamba", {"axis": "ssm", "method": "similarity", "keep": 0.5}),
    "width": ("mamba", {"axis": "width", "method": "minitron", "correct": "rescale", "keep": 0.5}),
}
RECIPE = """
model: {model}
calibrate: {{text: {text}, windows: 7, length: 32}}
steps:
  - {{step: prune, method: wanda}}
  - {{step: reduce-tokens, flops: 0.1, layers: [0]}}
  - {{step: tune-state, data: {text}, steps: 2, every: 2, length: 32, batch_size: 4, lr: 0.01}}
eval: {{perplexity: {text}, limit: 5}}
"""


def processes(script, *arguments):
    """Two of them, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    started = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": rank}, stdout=-1, stderr=-1, text=True)
        for rank in "01"
    ]
    told = [process.communicate(timeout=300) for process in started]
    return [process.returncode for process in started], told


@pytest.fixture(scope="module")
def found(models, text, tmp_path_factory):
    """The folders of the same work done by two processes, and by one."""
    root = tmp_path_factory.mktemp("parallel")
    few = {"calib": text, "windows": 7, "length": 32, "any_size": True}
    work = []
    for name, (model, options) in PRUNED.items():
        given = {"no_eval": name != "wanda"} | few | options
        if "axis" not in options:
            del given["any_size"]
        work.append(["prune", models[model], name, given])
    tuned = {"data": text, "steps": 4, "every": 2, "length": 32, "batch_size": 4, "lr": 0.01}
    work.append(["tune_state", models["mamba2"], "offset", tuned])
    work.append(["tune_state", models["mamba"], "sdt", tuned | {"method": "sdt", "accumulate": 2, "rank": 2}])
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=models["mamba2"], text=text), encoding="utf-8")
    work.append(["run", str(recipe), "recipe", {}])
    work.append(["evaluate", "ref:mamba", "tasks", {"tasks": "lambada_openai_local", "perplexity": text, "limit": 5}])
    two = [[verb, model, str(root / f"{name}-2"), options] for verb, model, name, options in work]
    codes, told = processes(SHARED, json.dumps(two))
    assert codes == [0, 0], told
    for verb, model, name, options in work:
        getattr(ssmcompress, verb)(model, out=root / f"{name}-1", **options)
    return lambda name: (root / f"{name}-1", root / f"{name}-2")


@pytest.mark.parametrize("name", PRUNED)
def test_pruning_finds_the_same_edits(found, name):
    one, two = (editing.load(folder / "edits.safetensors").items for folder in found(name))
    assert [(each.kind, each.tensor) for each in one] == [(each.kind, each.tensor) for each in two]
    for alone, together in zip(one, two, strict=True):
        if isinstance(alone, Replace):
            torch.testing.assert_close(together.values, alone.values, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(alone.pack(), together.pack())


def test_the_same_masks_are_the_same_bytes(found):
    one, two = ((folder / "model.safetensors").read_bytes() for folder in found("wanda"))
    assert one == two


@pytest.mark.parametrize("name", ["offset", "sdt"])
def test_tuning_learns_the_same(found, name):
    one, two = (load_file(folder / "adapter_model.safetensors") for folder in found(name))
    assert one.keys() == two.keys()
    for key, values in one.items():
        torch.testing.assert_close(two[key], values, rtol=1e-3, atol=1e-4)
    told = [json.loads((folder / MEASURED).read_text()) for folder in found(name)]
    assert told[0]["after"]["bits_per_byte"] == pytest.approx(told[1]["after"]["bits_per_byte"], rel=1e-5)


def test_evaluation_shares_out_documents_and_requests(found):
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in found("tasks"))
    assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-6)
    for alone, together in zip(one["tasks"], two["tasks"], strict=True):
        assert together.pop("value") == pytest.approx(alone.pop("value"), rel=1e-5)
        assert together.pop("standard_error") == pytest.approx(alone.pop("standard_error"), rel=1e-5)
        assert together == alone


def test_a_recipe_is_run_by_all_of_them(found):
    for name in ("model.safetensors", "config.json", "edits.safetensors"):
        one, two = ((folder / name).read_bytes() for folder in found("recipe"))
        assert one == two, name
    one, two = (json.loads((folder / "eval/tuned/summary.json").read_text()) for folder in found("recipe"))
    assert one["bits_per_byte"] == pytest.approx(two["bits_per_byte"], rel=1e-4) and two["adapter"] == one["adapter"]


def test_where_one_dies_the_other_says_so_and_the_run_goes_on_later(models, text, tmp_path):
    out = tmp_path / "out"
    given = ["prune", models["mamba"], "--calib", text, "--windows", "4", "--length", "32", "--no-eval", "--out"]
    codes, told = processes(DIES, *given, out)
    assert codes == [4, -signal.SIGKILL]
    assert "Process 1 of 2 has lost the others" in told[0][1] and "goes on from there" in told[0][1]
    assert "Traceback" not in told[0][1]
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    heard = []
    options = {"calib": text, "windows": 4, "length": 32, "no_eval": True}
    ssmcompress.prune(models["mamba"], out=out, emit=heard.append, **options)
    assert any("Going on" in getattr(event, "text", "") for event in heard)
    fresh = ssmcompress.prune(models["mamba"], out=tmp_path / "fresh", **options).folder
    assert (fresh / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


def test_a_tuning_of_which_one_dies_keeps_what_was_learned(models, text, tmp_path):
    given = ["tune-state", models["mamba2"], "--data", text, "--steps", "8", "--every", "2", "--length", "32"]
    given += ["--batch-size", "4", "--lr", "0.01", "--out", tmp_path / "out"]
    codes, told = processes(TUNING_DIES, *given)
    assert codes == [4, -signal.SIGKILL], told
    assert "Process 1 of 2 has lost the others" in told[0][1] and "Traceback" not in told[0][1]
    assert list((tmp_path / "out.partial").rglob("checkpoint-4"))


def test_one_that_comes_late_finds_what_the_first_measured(models, tmp_path):
    codes, told = processes(SLOW, "eval", models["mamba"], "--recall", "--out", tmp_path / "out")
    assert codes == [0, 0], told
    assert json.loads((tmp_path / "out/summary.json").read_text())["recall"]


def test_a_mistake_that_the_first_finds_ends_all_at_once(models, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    codes, told = processes(
        "from ssmcompress.cli import main; import sys; main(sys.argv[1:])",
        "prune",
        models["mamba"],
        "--calib",
        text,
        "--out",
        tmp_path / "out",
    )
    assert codes == [2, 2]
    assert all("exists already" in err and "Traceback" not in err for _, err in told)


def test_what_one_process_does_is_refused_to_several(models, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match="One process does this alone"):
        ssmcompress.convert(models["mamba"], to="mamba-ssm", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_environment_that_is_no_number_is_said(models, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(SystemExit) as ended:
        main(["prune", models["mamba"], "--out", str(tmp_path / "out")])
    assert ended.value.code == 2
    assert "WORLD_SIZE=many in the environment is no number" in capfd.readouterr().err


def test_too_little_for_all_is_said(monkeypatch):
    parallel.require(1, "calibration windows")
    monkeypatch.setenv("WORLD_SIZE", "2")
    parallel.require(2, "calibration windows")
    with pytest.raises(InputError, match="1 calibration windows cannot be shared out to 2 processes"):
        parallel.require(1, "calibration windows")
    assert parallel.share(range(5)) == range(0, 5, 2)
    monkeypatch.setenv("RANK", "1")
    assert parallel.share(range(5)) == range(1, 5, 2) and not parallel.first()
