"""Token reduction from the verb to the folder, and what every other verb makes of that folder."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import ssmcompress
from ssmcompress.arch.backbone import protect
from ssmcompress.checkpoint.source import load
from ssmcompress.cli import main
from ssmcompress.edits import Reduce
from ssmcompress.edits import load as load_edits
from ssmcompress.errors import InputError, RecipeError, UnsupportedError
from ssmcompress.policy import KEY, TokenPolicy
from ssmcompress.report.checkpoints import read
from ssmcompress.tokens.schedule import lengths

IDS = torch.arange(5, 45)[None]


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def reduced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reduced") / request.param
    ssmcompress.reduce_tokens(f"ref:{request.param}", out=out, flops=0.2, match_window=64, no_eval=True)
    return out


@torch.no_grad()
def kept(folder: str | Path) -> tuple[torch.Tensor, ...]:
    model = load(str(folder), dtype=torch.float32).model
    model(IDS)
    return model.backbone.kept  # type: ignore[return-value]


def test_the_folder_says_it_and_loads_with_it(reduced: Path) -> None:
    stored = json.loads((reduced / "config.json").read_text())[KEY]
    assert stored["method"] == "utrc"
    assert stored["layers"] == [1, 2, 3, 4]
    assert stored["match_window"] == 64
    assert stored["special"] == [0]
    assert kept(reduced)[-1].shape[1] < 40
    card = (reduced / "README.md").read_text()
    assert "stock transformers reads every token" in card
    manifest = json.loads((reduced / "ssmcompress.json").read_text())
    assert manifest["verb"] == "reduce-tokens"
    assert manifest["tokens"]["flops_reduction"] == pytest.approx(0.2, abs=1e-4)
    (edit,) = load_edits(reduced / "edits.safetensors").items
    assert isinstance(edit, Reduce)


def test_stock_transformers_gives_the_dense_numbers(reduced: Path) -> None:
    dense = load(f"ref:{reduced.name}", dtype=torch.float32).model
    stock = AutoModelForCausalLM.from_pretrained(reduced, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(stock(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


def test_a_policy_of_another_version_is_not_dropped(reduced: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in reduced.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    config[KEY]["method"] = "tomorrow"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="token_policy that this version cannot follow: method"):
        load(str(copy))


def test_apply_makes_the_same_bytes(reduced: Path, tmp_path: Path) -> None:
    ssmcompress.apply(reduced / "edits.safetensors", f"ref:{reduced.name}", out=tmp_path / "again")
    for name in ("model.safetensors", "config.json", "edits.safetensors", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (reduced / name).read_bytes()


def test_pruning_keeps_the_policy_and_moves_it_with_the_blocks(reduced: Path, tmp_path: Path) -> None:
    out = tmp_path / "layers"
    ssmcompress.prune(str(reduced), axis="layer", keep=4, method="random", out=out, no_eval=True)
    policy = json.loads((out / "config.json").read_text())[KEY]
    left = json.loads((out / "ssmcompress.json").read_text())["shape"]["layers"]
    expected = sorted({sum(layer <= anchor for layer in left) - 1 for anchor in (1, 2, 3, 4)} - {-1})
    assert policy["layers"] == expected
    assert kept(out)[-1].shape[1] < 40


def test_likelihoods_are_of_the_untouched_part(reduced: Path, tmp_path: Path) -> None:
    """The same windows, of which the same half is scored, dense and reduced; and twice the same."""
    how = {"perplexity": "default", "limit": 3}
    found = ssmcompress.evaluate(str(reduced), out=tmp_path / "reduced", **how)
    dense = ssmcompress.evaluate(f"ref:{reduced.name}", out=tmp_path / "dense", context=256, **how)
    assert found.text_sha256 == dense.text_sha256
    assert found.bits_per_byte != dense.bits_per_byte
    whole = ssmcompress.evaluate(str(reduced), context=0, **how)
    assert whole.bits_per_byte == pytest.approx(ssmcompress.evaluate(f"ref:{reduced.name}", **how).bits_per_byte)


def test_tasks_score_every_token_of_a_continuation(reduced: Path) -> None:
    found, dense = (
        ssmcompress.evaluate(model, tasks="lambada_openai_local", limit=6, batch_size=size)
        for model, size in ((str(reduced), 1), (f"ref:{reduced.name}", 4))
    )
    again = ssmcompress.evaluate(str(reduced), tasks="lambada_openai_local", limit=6, batch_size=4)
    figures = [each.value for each in found.tasks]
    assert figures == pytest.approx([each.value for each in again.tasks], rel=1e-4)
    assert figures != [each.value for each in dense.tasks]


def test_compare_says_that_one_was_read_whole(reduced: Path, tmp_path: Path) -> None:
    for name, model in (("dense", f"ref:{reduced.name}"), ("reduced", str(reduced))):
        found = ssmcompress.evaluate(model, perplexity="default", limit=2, out=tmp_path / name)
    assert found.context == 256
    assert found.flops_reduction == pytest.approx(0.2, abs=1e-4)
    with pytest.raises(InputError, match="differ in --context: 0 and 256"):
        ssmcompress.compare(tmp_path / "dense", tmp_path / "reduced")


def test_the_report_tells_policies_of_the_same_weights_apart(tmp_path: Path) -> None:
    for rule in ("stride", "random"):
        ssmcompress.reduce_tokens("ref:mamba", out=tmp_path / rule, method=rule)
    ssmcompress.evaluate(str(tmp_path / "stride"), perplexity="default", limit=2, out=tmp_path / "measured")
    folders = [tmp_path / name for name in ("stride", "random", "measured")]
    page = ssmcompress.report(*folders, out=tmp_path / "report.html").read_text(encoding="utf-8")
    assert "stride = random" not in page
    (through,) = re.findall(r"stride \(tokens by stride, 20% of the work saved\): (\d+) of 256 tokens go through", page)
    policy = TokenPolicy.read(json.loads((tmp_path / "stride" / "config.json").read_text())[KEY])
    assert int(through) == 1 + lengths(255, 6, policy)[5]  # the first token, the end of a text, never leaves
    assert page.count("Tokens kept over depth") == 2
    assert page.count("by the rule random: 20.0% of the blocks") == 1
    assert "windows of 512 tokens, of which the first 256 are read and not scored" in page
    assert "No calibration" not in page
    found = {each.label: each for each in read(folders)}
    assert found["ref:mamba"].dense
    assert found["stride"].source.label == found["random"].source.label == "ref:mamba"
    assert len(found["stride"].evaluations) == 1 and not found["random"].evaluations


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"layers": (2, 9)}, UnsupportedError, "block 9: there are 6"),
        ({"flops": 0.9}, UnsupportedError, "cannot save 90%"),
        ({"keep": 0.3}, RecipeError, "at most half"),
        ({"method": "evit", "match_window": 8}, RecipeError, "match_window has no meaning"),
        ({"keep": 0.9, "flops": 0.1}, RecipeError, "exclude one another"),
        ({"layers": "5;6"}, RecipeError, "with commas"),
        ({"method": "utcr"}, RecipeError, "did you mean 'utrc'"),
        ({"flop": 0.1}, RecipeError, "no option 'flop'"),
    ],
)
def test_what_will_not_do_is_said(options: dict, error: type, said: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=said):
        ssmcompress.reduce_tokens("ref:mamba", out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_mamba_ssm_has_no_place_for_a_policy(reduced: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="the policy would be lost"):
        ssmcompress.convert(str(reduced), to="mamba-ssm", out=tmp_path / "original")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["reduce-tokens", "ref:mamba", "--out", str(tmp_path / "a"), "--no-eval"]
    with pytest.raises(SystemExit) as left:
        main([*given, "--keep", "0.9", "--layers", "1,3"])
    assert not left.value.code
    assert json.loads((tmp_path / "a" / "config.json").read_text())[KEY]["layers"] == [1, 3]
    with pytest.raises(SystemExit) as left:
        main([*given, "--overwrite", "--layers", "7"])
    assert left.value.code == 3
    assert "Without --layers they leave after 1,2,3,4" in " ".join(capsys.readouterr().err.split())


def test_rules_that_look_into_scans_need_those_that_they_look_into(tmp_path: Path) -> None:
    ssmcompress.reduce_tokens("ref:mamba2", method="simba", out=tmp_path / "a", no_eval=True)
    for verb, more in ((ssmcompress.plan, {}), (ssmcompress.prune, {"out": tmp_path / "b", "no_eval": True})):
        with pytest.raises(UnsupportedError, match="tokens leave by what more scans hold"):
            verb(str(tmp_path / "a"), axis="ssm", keep=3, method="random", **more)
    assert not (tmp_path / "b").exists()


def test_a_policy_is_never_left_without_a_block(tmp_path: Path) -> None:
    ssmcompress.reduce_tokens("ref:mamba", layers=(0,), flops=0.1, out=tmp_path / "a", no_eval=True)
    how = {"axis": "layer", "method": "random", "no_eval": True}
    for seed in (0, 1):
        out = ssmcompress.prune(str(tmp_path / "a"), keep=2, seed=seed, out=tmp_path / f"{seed}", **how).folder
        assert load(str(out)).arch.policy.layers == (0,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": [7, 9]}, "cannot leave after block 7: there are 6"),
        ({"layers": [5]}, "block 5, the last, save nothing"),
        ({"layers": []}, "no block after which"),
        ({"special": [10**30]}, "special.0"),
        ({"seed": 10**30}, "seed"),
        ({"keep": 1e-9}, "keep"),
    ],
)
def test_a_stored_policy_that_cannot_be_followed_is_never_dropped(
    reduced: Path, tmp_path: Path, change: dict, words: str
) -> None:
    for path in reduced.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config[KEY] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=words):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "evit", "flops": 0.66666666}, "cannot save 67%"),
        ({"layers": (5,)}, "the last, save nothing"),
        ({"layers": (), "keep": 0.7}, "no block after which"),
    ],
)
def test_what_would_leave_nothing_or_save_nothing_is_refused(tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        ssmcompress.reduce_tokens("ref:mamba", out=tmp_path / "a", no_eval=True, **options)


def test_any_seed_draws(tmp_path: Path) -> None:
    ssmcompress.reduce_tokens("ref:mamba", method="random", seed=2**62, out=tmp_path / "a", no_eval=True)
    assert kept(tmp_path / "a")[-1].shape[1] < 40


def test_the_card_says_what_every_block_reads_and_what_the_rule_looks_at(tmp_path: Path) -> None:
    ssmcompress.reduce_tokens("ref:mamba", method="evit", keep=0.5, layers=(1, 3), out=tmp_path / "a", no_eval=True)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "the blocks read 2,048, 2,048, 1,025, 1,025, 513, 513: 41.63% saved" in card
    assert "The policy: importance clip, decay drop." in card


def test_gradients_are_numbers_where_it_is_said_which_tokens_are_wanted(reduced: Path) -> None:
    model = load(str(reduced), dtype=torch.float32).model
    wanted = torch.zeros(1, 40, dtype=torch.bool)
    wanted[:, 20:] = True
    labels = IDS.masked_fill(~torch.cat([torch.zeros(1, 1, dtype=torch.bool), wanted[:, :-1]], 1), -100)
    with protect(model, wanted):
        loss = model(IDS, labels=labels, use_cache=False).loss
    loss.backward()
    assert loss.isfinite() and all(each.grad.isfinite().all() for each in model.parameters() if each.grad is not None)


def test_an_empty_prompt_has_no_tokens_to_lose(reduced: Path) -> None:
    model = load(str(reduced), dtype=torch.float32).model
    assert model(IDS[:, :0], use_cache=False).logits.shape[:2] == (1, 0)


def test_eval_counts_what_the_blocks_read(reduced: Path) -> None:
    found = ssmcompress.evaluate(str(reduced), perplexity="default", limit=2)
    assert found.tokens_read is not None and found.tokens_read[0] == 1
    assert list(found.tokens_read) == sorted(found.tokens_read, reverse=True)
    assert 0.08 < 1 - sum(found.tokens_read) / 6 < 0.12  # half of what is asked for: only prompts lose tokens
    assert found.flops_reduction == pytest.approx(0.2, abs=1e-4)
    assert ssmcompress.evaluate(f"ref:{reduced.name}", perplexity="default", limit=2, context=256).tokens_read is None
