"""What a user can get wrong, through the command line: one sentence, the right exit code, nothing left behind."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import ssmcompress
from ssmcompress import kernels
from ssmcompress.arch.registry import arch_for
from ssmcompress.checkpoint import shards
from ssmcompress.checkpoint.source import resolve
from ssmcompress.errors import RecipeError
from tests.flow.conftest import FAMILIES
from tests.unit.checkpoint.folders import change, edit_json


@pytest.fixture
def model(models, tmp_path):
    """A copy of a model to damage."""
    folder = tmp_path / "model"
    shutil.copytree(models["mamba2"], folder)
    return folder


@pytest.fixture
def refused(run, tmp_path):
    """Runs a command line that must fail: checks its words and that it leaves no file; returns what it said."""

    def check(code, *arguments):
        before = snapshot(tmp_path)
        found, out, err = run(*arguments)
        assert found == code, err
        assert "Traceback" not in err + out and "bug in ssmcompress" not in err
        lines = re.findall(r"^(error|hint): (\S.*)", err, flags=re.MULTILINE)
        assert [kind for kind, _ in lines] in (["error"], ["error", "hint"]), err
        assert snapshot(tmp_path) == before
        return " ".join(err[err.index("error: ") :].split())

    return check


def snapshot(folder):
    """Every path below a folder and what the files hold, but for the finished layers that a next run goes on from."""
    found = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    unfinished = {path for path in found if path.suffix == ".partial" and (path / ".journal").is_dir()}
    kept = {folder / name for folder in unfinished for name in ("", ".journal", ".recipe", "events.jsonl")}
    return {path: told for path, told in found.items() if path not in kept and path.parent.name != ".journal"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--method wnda", "Did you mean 'wanda'?"),
        ("--include inproj", "Did you mean 'in_proj'?"),
        ("--include x_proj", "no prunable module 'x_proj'"),
        ("--exclude conv", "conv"),
        ("--exclude in_proj --exclude out_proj", "Nothing is left to prune"),
        ("--sparsity 1.0", "sparsity"),
        ("--sparsity -0.1", "sparsity"),
        ("--sparsity nan", "sparsity"),
        ("--sparsity abc", "valid number"),
        ("--pattern 4:2", "N:M"),
        ("--pattern 4:4", "N:M"),
        ("--pattern 0:4", "N:M"),
        ("--pattern 2-4", "N:M"),
        ("--scope column", "--scope"),
        ("--scope row --pattern 2:4", "scope has no meaning"),
        ("--scope row --method sparsegpt", "scope has no meaning"),
        ("--windows 0", "--windows"),
        ("--seed -1", "seed"),
        ("--seed 9223372036854775808", "seed"),
        ("--length 0", "--length"),
        ("--backend fast", "fast"),
        ("--dtype float8", "float8"),
        ("--device toaster", "toaster"),
        ("--calib-mix songs", "songs"),
        ("--calib-split train", "split"),
    ],
)
def test_wrong_options(refused, models, text, tmp_path, options, words):
    given = ["--calib", text, "--windows", 4, "--length", 32, *options.split()]
    said = refused(2, "prune", models["mamba2"], *given, "--no-eval", "--out", tmp_path / "out")
    assert words in said


@pytest.mark.parametrize("seed", ["-1", str(2**63)])
def test_seeds_that_no_generator_takes(refused, models, text, seed):
    assert "seed" in refused(2, "eval", models["mamba"], "--perplexity", text, "--seed", seed)
    assert "seed" in refused(2, "generate", models["mamba"], "--prompt", "bak", "--seed", seed)


def test_sparsegpt_of_the_convolution_is_not_supported(refused, models, tmp_path):
    arguments = ("--method", "sparsegpt", "--include", "conv1d", "--out", tmp_path / "out")
    assert "SparseGPT" in refused(3, "prune", models["mamba"], *arguments)


@pytest.mark.parametrize("verb", ["prune", "plan", "eval", "generate", "convert", "apply"])
@pytest.mark.parametrize("given", ["./nowhere", "ref:nobody"])
def test_a_model_that_is_not_there(refused, models, small, tmp_path, verb, given, run):
    rest = {
        "prune": ["--out", tmp_path / "out"],
        "plan": [],
        "eval": ["--out", tmp_path / "out"],
        "generate": ["--prompt", "bak"],
        "convert": ["--to", "mamba-ssm", "--out", tmp_path / "out"],
        "apply": ["--out", tmp_path / "out"],
    }[verb]
    first = []
    if verb == "apply":
        ssmcompress.prune(models["mamba"], out=tmp_path / "earlier", **small)
        first = [tmp_path / "earlier" / "edits.safetensors"]
    said = refused(2, verb, *first, given, *rest)
    assert given.removeprefix("ref:") in said


def truncate(model):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def not_a_number(model):
    bad = shards.Shards(model)["backbone.layers.1.mixer.in_proj.weight"]
    bad[3, 4] = torch.nan
    change(model, backbone__layers__1__mixer__in_proj__weight=bad)


def outside(model):
    (model / "model.safetensors").rename(model.parent / "elsewhere.safetensors")
    listed = {"metadata": {}, "weight_map": {"backbone.norm_f.weight": "../elsewhere.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(listed))


def no_config(model):
    (model / "config.json").unlink()


def no_weights(model):
    (model / "model.safetensors").unlink()


def broken_config(model):
    (model / "config.json").write_text('{"model_type": "mamba2",')


def another_activation(model):
    edit_json(model / "config.json", hidden_act="sulu")


def a_larger_tokenizer(model):
    config = resolve(str(model)).config()
    config.vocab_size = 300
    torch.manual_seed(0)
    arch_for(config).build("cpu").save_pretrained(model)


def a_layer_less(model):
    edit_json(model / "config.json", num_hidden_layers=3)


def other_shape(model):
    edit_json(model / "config.json", state_size=32)


def broken_tokenizer(model):
    (model / "tokenizer.json").write_text('{"version": "1.0"')


def empty_weights(model):
    (model / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "model.safetensors"),
        (empty_weights, "model.safetensors"),
        (not_a_number, "NaN"),
        (outside, "outside its folder"),
        (no_config, "config.json"),
        (no_weights, "no weights"),
        (broken_config, "config.json"),
        (a_layer_less, "2 layers"),
        (other_shape, "conv1d"),
        (broken_tokenizer, "tokenizer"),
        (another_activation, "Did you mean 'silu'?"),
        (a_larger_tokenizer, "the token 511; the model knows 300"),
    ],
)
def test_a_damaged_model(refused, model, text, tmp_path, damage, words):
    damage(model)
    assert words in refused(2, "prune", model, "--calib", text, "--no-eval", "--out", tmp_path / "out")
    assert words in refused(2, "eval", model, "--perplexity", text, "--out", tmp_path / "out")
    assert words in refused(2, "generate", model, "--prompt", "bak dek")


def test_a_model_that_computes_no_numbers_writes_no_text(refused, model):
    change(model, backbone__layers__1__mixer__out_proj__weight=torch.full((32, 64), 3e38))
    for options in ((), ("--temperature", 1)):
        assert "NaN or infinite" in refused(2, "generate", model, "--prompt", "bak dek", *options)


def test_a_prompt_that_is_no_text(refused, models):
    assert "not text" in refused(2, "generate", models["mamba"], "--prompt", "bak \udcff")


def test_a_prompt_of_a_token_that_the_model_does_not_know(refused, model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    assert "the token 512" in refused(2, "generate", model, "--prompt", "bak <extra>")


@pytest.mark.parametrize("verb", ["prune", "eval", "generate", "convert", "report", "cp"])
def test_a_home_that_is_not_there(refused, models, text, verb):
    given = {
        "prune": ["prune", models["mamba"], "--calib", text, "--no-eval", "--out", "~nobody-here/x"],
        "eval": ["eval", models["mamba"], "--perplexity", "~nobody-here/x"],
        "generate": ["generate", "~nobody-here/x", "--prompt", "bak"],
        "convert": ["convert", models["mamba"], "--to", "mamba-ssm", "--out", "~nobody-here/x"],
        "report": ["report", models["mamba"], "--out", "~nobody-here/x"],
        "cp": ["recipes", "cp", "prune/wanda-50", "~nobody-here/x"],
    }[verb]
    assert "~nobody-here/x begins with a home directory" in refused(2, *given)


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc")
@pytest.mark.parametrize("out", ["/proc/x", "/proc/x/y"])
def test_a_place_that_takes_no_files(refused, models, text, out):
    said = refused(4, "prune", models["mamba"], "--calib", text, "--no-eval", "--out", out)
    assert "/proc" in said and "Another run" not in said


class Bomb:
    """An object whose unpickling writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(refused, model, tmp_path, legacy):
    (model / "model.safetensors").unlink()
    trap = tmp_path / "trap"
    torch.save({"bomb": Bomb(trap)}, model / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert "pytorch_model.bin" in refused(2, "prune", model, "--out", tmp_path / "out")
    assert not trap.exists()


@pytest.mark.parametrize(("model_type", "words"), [("llama", "llama"), ("mamba3", "Did you mean 'mamba")])
def test_another_family(refused, model, tmp_path, model_type, words):
    edit_json(model / "config.json", model_type=model_type)
    assert words in refused(3, "prune", model, "--out", tmp_path / "out")
    assert words in refused(3, "plan", model)


def test_a_quantised_checkpoint(refused, model, tmp_path):
    edit_json(model / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    assert "quantised" in refused(3, "prune", model, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", "", "no text"),
        ("blank.jsonl", "\n \n", "no text"),
        ("short.txt", "bak dek", "less than one window"),
        ("bad.jsonl", '{"text": "bak dek"}\n{"text": \n', "Line 2"),
        ("list.jsonl", '["bak dek"]\n', "Line 1"),
        ("column.jsonl", '{"body": "bak dek"}\n', "no column 'text'"),
        ("binary.txt", b"\xff\xfe\x00bak", "UTF-8"),
    ],
)
def test_calibration_that_cannot_be_used(refused, models, tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for backend in ("auto", "reference"):
        arguments = ("--calib", path, "--no-eval", "--backend", backend, "--out", tmp_path / "out")
        assert words in refused(2, "prune", models["mamba"], *arguments)


def test_calibration_that_is_not_there(refused, models, tmp_path):
    arguments = ("--calib", tmp_path / "nowhere.txt", "--no-eval", "--out", tmp_path / "out")
    assert "nowhere.txt" in refused(2, "prune", models["mamba"], *arguments)


@pytest.mark.parametrize("verb", ["prune", "eval", "convert", "apply"])
def test_an_output_that_exists_is_left_alone(refused, run, models, small, text, tmp_path, verb):
    out = tmp_path / "out"
    if verb == "eval":
        ssmcompress.evaluate(models["mamba"], perplexity=text, limit=1, out=out)
    else:
        ssmcompress.prune(models["mamba"], out=out, **small)
    arguments = {
        "prune": ["prune", models["mamba"], "--calib", text, "--windows", 4, "--length", 32, "--no-eval"],
        "eval": ["eval", models["mamba"], "--perplexity", text],
        "convert": ["convert", models["mamba"], "--to", "mamba-ssm"],
        "apply": ["apply", out / "edits.safetensors", models["mamba"]],
    }[verb]
    assert "exists already" in refused(2, *arguments, "--out", out)
    assert run(*arguments, "--out", out, "--overwrite")[0] == 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_folder_of_the_users_own_is_never_replaced(refused, models, text, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    arguments = ("--calib", text, "--no-eval", "--out", precious, "--overwrite")
    assert "does not look like" in refused(2, "prune", models["mamba"], *arguments)


def test_the_model_itself_is_never_replaced(refused, model, text):
    arguments = ("--calib", text, "--no-eval", "--out", model, "--overwrite")
    assert "holds the model" in refused(2, "prune", model, *arguments)


def test_a_file_where_the_parent_should_be(refused, models, text, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    arguments = ("--calib", text, "--no-eval", "--out", tmp_path / "file" / "out")
    assert "file" in refused(2, "prune", models["mamba"], *arguments)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_may_not_be_written(refused, models, text, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    arguments = ("--calib", text, "--no-eval", "--out", tmp_path / "locked" / "out")
    assert "permission" in refused(4, "prune", models["mamba"], *arguments)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where", ["ssmcompress.checkpoint.shards.save_file", "shutil.copyfile", "ssmcompress.edits.save_file"]
)
@pytest.mark.parametrize("name", FAMILIES[:2])
def test_a_full_disk(refused, models, text, tmp_path, monkeypatch, where, name):
    monkeypatch.setattr(where, full)
    arguments = ("--calib", text, "--windows", 4, "--length", 32, "--no-eval", "--out", tmp_path / "out")
    said = refused(4, "prune", models[name], *arguments)
    assert re.search(r"full|No space|Free some|room", said)


def test_a_full_disk_leaves_the_earlier_output(refused, models, small, text, tmp_path, monkeypatch):
    ssmcompress.prune(models["mamba"], out=tmp_path / "out", **small)
    monkeypatch.setattr(shards, "save_file", full)
    arguments = ("--calib", text, "--windows", 4, "--length", 32, "--no-eval", "--overwrite", "--out", tmp_path / "out")
    refused(4, "prune", models["mamba"], *arguments)


def test_too_little_room_is_told_before_anything_is_written(refused, models, text, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    arguments = ("--calib", text, "--windows", 4, "--length", 32, "--no-eval", "--out", tmp_path / "out")
    assert "do not fit" in refused(4, "prune", models["mamba"], *arguments)


@pytest.mark.skipif(kernels.cuda.available()[0], reason="the CUDA kernels are there")
@pytest.mark.parametrize("verb", ["prune", "eval", "generate"])
def test_cuda_kernels_where_there_are_none(refused, models, text, tmp_path, verb):
    rest = {"prune": ["--calib", text, "--out", tmp_path / "out"], "eval": [], "generate": ["--prompt", "bak"]}[verb]
    assert "cuda" in refused(4, verb, models["mamba"], "--backend", "cuda", *rest)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(refused, models, text, tmp_path):
    assert "cuda" in refused(
        4, "prune", models["mamba"], "--device", "cuda", "--calib", text, "--out", tmp_path / "out"
    )


@pytest.mark.parametrize(("other", "words"), [("mamba2", "shape"), ("mamba", "shape")])
def test_edits_of_another_model(refused, models, small, model, tmp_path, other, words):
    ssmcompress.prune(models["mamba"], out=tmp_path / "first", **small)
    if other == "mamba":
        torch.manual_seed(0)
        config = resolve(models["mamba"]).config()
        config.hidden_size, config.intermediate_size, config.time_step_rank = 48, 96, 3
        arch_for(config).build("cpu").save_pretrained(tmp_path / "wider")
        target = tmp_path / "wider"
    else:
        target = model
    edits = tmp_path / "first" / "edits.safetensors"
    said = refused(2, "apply", edits, target, "--out", tmp_path / "out")
    assert words in said and ("another model" in said or "closest" in said)


def test_damaged_edits(refused, models, small, tmp_path):
    ssmcompress.prune(models["mamba"], out=tmp_path / "first", **small)
    path = tmp_path / "first" / "edits.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "edits.safetensors" in refused(2, "apply", path, models["mamba"], "--out", tmp_path / "out")
    weights = tmp_path / "first" / "model.safetensors"
    assert "holds no edits" in refused(2, "apply", weights, models["mamba"], "--out", tmp_path / "out")


def test_mistakes_in_python_are_the_same_errors(models, tmp_path):
    for options, words in (
        ({"methd": "wanda"}, "methd"),
        ({"method": "wnda"}, "method"),
        ({"sparsity": 1}, "sparsity"),
    ):
        with pytest.raises(RecipeError, match=words):
            ssmcompress.prune(models["mamba"], out=tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_in_a_process_of_its_own(models, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-m", "ssmcompress", "prune", "nowhere/at/all", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: ") and "Traceback" not in ran.stderr
    assert not list(tmp_path.iterdir())
