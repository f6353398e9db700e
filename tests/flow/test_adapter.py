"""An adapter through the command line: the adapted model is shown, measured, timed, compared and reported."""

import copy
import json
import sys

import pytest
import torch

import ssmcompress
from ssmcompress.evaluate.results import Summary
from ssmcompress.evaluate.speed import read as read_speed
from ssmcompress.report.checkpoints import read as read_checkpoints
from tests.flow.conftest import prose
from tests.unit.arch.models import STOCK
from tests.unit.checkpoint import adapters


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Four documents of different sizes."""
    path = tmp_path_factory.mktemp("documents") / "held-out.jsonl"
    path.write_text("".join(json.dumps({"text": prose(40 + 20 * i, 70 + i)}) + "\n" for i in range(4)))
    return str(path)


@pytest.fixture(scope="module")
def adapted(models, tmp_path_factory):
    """Plain PEFT's adapted model, and the folder of the adapter."""
    folder = tmp_path_factory.mktemp("adapters") / "lora"
    dense = STOCK["mamba"].from_pretrained(models["mamba"], dtype=torch.float32).eval()
    return adapters.made(dense, folder, "in_proj", "x_proj"), folder


def test_generate_shows_the_adapted_model_beside_the_plain_one(run, models, adapted, tmp_path):
    twin, lora = adapted
    model, arguments = models["mamba"], ("--prompt", "bak dek", "--max-new-tokens", 12)
    code, printed, err = run("generate", model, "--adapter", lora, "--against", model, *arguments)
    assert code == 0, err
    assert "lora" in printed
    found = ssmcompress.generate(model, prompt="bak dek", adapter=lora, against=model, max_new_tokens=12)
    (alone,) = ssmcompress.generate(model, prompt="bak dek", max_new_tokens=12)
    assert [each.model for each in found] == [f"{model} + {lora}", model]
    assert found[1].text == alone.text != found[0].text
    tokenizer = ssmcompress.load(model).tokenizer
    given = tokenizer("bak dek", return_tensors="pt").input_ids
    ids = twin.generate(input_ids=given, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert found[0].text == tokenizer.decode(ids[0, given.shape[1] :], skip_special_tokens=True)


def test_eval_measures_the_adapted_model_and_compare_and_report_tell_them_apart(
    run, models, adapted, documents, tmp_path
):
    twin, lora = adapted
    measured = ("--perplexity", documents, "--length", 64)
    for name, more in (("plain", ()), ("adapted", ("--adapter", lora))):
        code, _, err = run("eval", models["mamba"], *more, *measured, "--out", tmp_path / name)
        assert code == 0, err
    plain, found = (
        Summary.model_validate_json((tmp_path / n / "summary.json").read_text()) for n in ("plain", "adapted")
    )
    copy.deepcopy(twin).merge_and_unload().save_pretrained(tmp_path / "merged")
    ssmcompress.load(models["mamba"]).tokenizer.save_pretrained(tmp_path / "merged")
    merged = ssmcompress.evaluate(str(tmp_path / "merged"), perplexity=documents, length=64)
    assert found.bits_per_byte == pytest.approx(merged.bits_per_byte, rel=1e-5) != plain.bits_per_byte
    assert (plain.label, plain.adapter, plain.source) == ("mamba", None, None)
    assert (found.label, found.adapter, found.source) == ("mamba + lora", "lora", "mamba")
    assert set(found.model_sha256) - set(plain.model_sha256) == {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in (tmp_path / "adapted" / "summary.json").read_text()
    assert (found.params, found.weight_bytes) == (plain.params, plain.weight_bytes)
    code, printed, err = run("compare", tmp_path / "plain", tmp_path / "adapted")
    assert code == 0 and "mamba + lora against mamba" in printed, err
    code, _, err = run("report", tmp_path / "adapted", tmp_path / "plain", "--out", tmp_path / "page.html")
    assert code == 0, err
    assert "mamba + lora" in (tmp_path / "page.html").read_text()
    dense, other = read_checkpoints([tmp_path / "adapted", tmp_path / "plain"])
    assert (dense.label, other.label, other.source, other.dense) == ("mamba", "mamba + lora", dense, False)


def test_an_evaluation_goes_on_only_with_the_same_adapter(run, models, adapted, documents, tmp_path, monkeypatch):
    lora, other = adapted[1], tmp_path / "lora"  # another one of the same name
    adapters.made(STOCK["mamba"].from_pretrained(models["mamba"], dtype=torch.float32), other, "in_proj", seed=6)
    asked = ("eval", models["mamba"], "--perplexity", documents, "--recall", "--out", tmp_path / "out")
    evaluation = sys.modules["ssmcompress.evaluate.evaluation"]

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "_memory", interrupted)
    for adapter, goes_on in ((lora, False), (lora, True), (other, False), (None, False)):
        code, printed, err = run(*asked, *(("--adapter", adapter) if adapter else ()))
        assert code == 130
        assert ("going on after perplexity" in " ".join((printed + err).split())) == goes_on


def test_the_merged_model_is_timed(run, models, adapted, documents, tmp_path):
    model, lora = models["mamba"], adapted[1]
    asked = ("--speed", "--lengths", 8, "--against", model, "--out", tmp_path / "out")
    code, _, err = run("eval", model, "--adapter", lora, *asked)
    assert code == 0, err
    found = read_speed(tmp_path / "out")
    assert (found.model.model, found.against.model) == ("mamba + lora", "mamba")
    assert found.model.prefill[0].flops_per_token == found.against.prefill[0].flops_per_token


@pytest.mark.parametrize("verb", [("eval",), ("generate", "--prompt", "bak")])
def test_an_adapter_that_does_not_fit_is_refused_in_a_sentence(run, models, adapted, tmp_path, verb):
    lora, wrong = adapted[1], tmp_path / "prefix"
    adapters.written(wrong, {}, peft_type="PREFIX_TUNING")
    for code, model, adapter, said in (
        (2, "mamba2", lora, "x_proj, which a mamba2 model does not have"),
        (2, "falcon_mamba", lora, "ask for"),
        (2, "mamba", tmp_path / "nothing", "is not there"),
        (2, "mamba", models["mamba2"], "give it as MODEL"),
        (3, "mamba", wrong, "'PREFIX_TUNING', which is not supported"),
    ):
        found, out, err = run(verb[0], models[model], *verb[1:], "--adapter", adapter)
        assert found == code and said in " ".join(err.split()) and "Traceback" not in out + err
