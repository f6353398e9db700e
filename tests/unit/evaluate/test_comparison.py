"""The verb `compare` on evaluation folders: the table, the gate, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import ssmcompress
from ssmcompress import cli
from ssmcompress.checkpoint.output import output, write
from ssmcompress.checkpoint.source import load
from ssmcompress.errors import GateError, InputError
from ssmcompress.evaluate.comparison import Comparison
from ssmcompress.events import Finished, Note, Table
from ssmcompress.measure.text import documents
from tests.unit.evaluate.folders import results

RNG = np.random.default_rng(0)
SIZE = RNG.integers(300, 3000, 200).astype(float)
BITS = SIZE * RNG.lognormal(0.3, 0.2, 200)
RIGHT = (RNG.random(400) < 0.6).astype(float)
GUESSED = (np.arange(400) % 4 == 0).astype(float)
FEWER = np.where(np.arange(400) % 8 == 0, 0.0, RIGHT)  # one in eight lost
FLIPPED = RIGHT.copy()  # as often won as lost
FLIPPED[np.flatnonzero(RIGHT == 0)[:12]], FLIPPED[np.flatnonzero(RIGHT == 1)[:12]] = 1, 0
TEXT, ARC, HARD = "text/bits_per_byte", "arc_easy_local/acc", "arc_challenge_local/acc"


def folder(path, *, text=BITS, arc=RIGHT, hard=None, **options):
    values = {TEXT: text, ARC: arc} | ({} if hard is None else {HARD: hard})
    return results(path, values, weights={TEXT: SIZE}, length=512, **options)


@pytest.fixture
def dense(tmp_path):
    return folder(tmp_path / "dense")


def rows(comparison, candidate=0):
    return {row.measure: row for row in comparison.candidates[candidate].measures}


def test_the_same_evaluation_differs_by_exactly_nothing(dense):
    found = ssmcompress.compare(dense, dense, max_drop=["0"], strict=True)
    assert found.passed
    for row in rows(found).values():
        assert (row.change, row.adjusted, row.p_holm, row.gate) == (0.0, (0.0, 0.0), 1.0, "passes")
        assert row.verdict == "no difference shown"


def test_items_are_paired_whatever_their_order(dense, tmp_path):
    shuffled = np.random.default_rng(1).permutation(200)
    other = results(tmp_path / "other", {TEXT: BITS}, weights={TEXT: SIZE}, length=512, order=shuffled)
    alone = results(tmp_path / "alone", {TEXT: BITS}, weights={TEXT: SIZE}, length=512)
    assert rows(ssmcompress.compare(alone, other))[TEXT].change == 0.0


def test_the_table_comes_before_the_gate_closes(dense, tmp_path):
    events = []
    with pytest.raises(GateError, match=r"worse: arc_easy_local/acc lost more than allowed: -0\.0\d+ \[-0.*bound 0.01"):
        ssmcompress.compare(
            dense,
            folder(tmp_path / "worse", arc=FEWER),
            max_drop=[0.01],
            out=tmp_path / "out",
            emit=events.append,
        )
    [table] = [event for event in events if isinstance(event, Table)]
    assert table.title == "worse against dense" and table.columns[-1] == "gate"
    assert {row[0]: row[-1] for row in table.rows} == {TEXT: "passes", ARC: "fails"}
    assert events[-1] == Finished(str(tmp_path / "out"))
    found = Comparison.model_validate_json((tmp_path / "out" / "comparison.json").read_text())
    assert found.passed is False and rows(found)[ARC].verdict == "worse" and len(found.failures) == 1
    assert "time" not in (tmp_path / "out" / "comparison.json").read_text()


def test_a_score_of_which_less_is_better_loses_by_rising(tmp_path):
    rare = (np.arange(400) % 4 == 0).astype(float)
    a, b = (results(tmp_path / name, {"bias/acc": row}) for name, row in (("a", rare), ("b", 1 - rare)))
    for each in (a, b):
        lines = (Path(each) / "samples.jsonl").read_text()
        (Path(each) / "samples.jsonl").write_text(lines.replace('"accuracy"', '"cost"'))
    with pytest.raises(GateError, match=r"bias/acc lost more than allowed: \+0\.5000 \[.*bound 0.01"):
        ssmcompress.compare(a, b, max_drop=[0.01])
    found = rows(ssmcompress.compare(b, a, max_drop=[0.01]))["bias/acc"]
    assert (found.change, found.test, found.verdict, found.gate) == (-0.5, "mcnemar", "better", "passes")


def test_a_figure_that_has_no_items_is_said_not_to_be_compared(dense, tmp_path):
    other = folder(tmp_path / "other")
    for each in (dense, other):
        lines = (Path(each) / "samples.jsonl").read_text().splitlines(keepends=True)
        (Path(each) / "samples.jsonl").write_text("".join(line for line in lines if TEXT in line))
    told = []
    ssmcompress.compare(dense, other, emit=told.append)
    [warning] = [event for event in told if isinstance(event, Note) and event.level == "warning"]
    assert ARC in warning.text and "not compared" in warning.text


def test_the_same_comparison_is_the_same_bytes(dense, tmp_path):
    other = folder(tmp_path / "other", arc=FLIPPED, text=BITS * RNG.normal(1, 0.01, 200))
    for name in "ab":
        ssmcompress.compare(dense, other, out=tmp_path / name)
    a, b = ((tmp_path / name / "comparison.json").read_bytes() for name in "ab")
    assert a == b
    with pytest.raises(InputError, match="exists already"):
        ssmcompress.compare(dense, other, out=tmp_path / "a")
    ssmcompress.compare(dense, other, out=tmp_path / "a", seed=1, overwrite=True)
    assert (tmp_path / "a" / "comparison.json").read_bytes() != b


@pytest.mark.parametrize(
    ("bounds", "passes"),
    [
        (["0.2"], True),
        (["0.01"], False),
        (["arc_easy_local=0.2"], True),
        (["arc_easy_local/acc=0.01"], False),
        (["arc_easy_local=0.01"], False),
        (["text=0"], True),
        (["all=0.01"], False),
        (["0.01", "arc_easy_local=0.2"], True),
        (["0.2", "arc_easy_local/acc=0.01"], False),
        (["arc_easy_local=0.01", "arc_easy_local/acc=0.2"], True),
    ],
)
def test_the_nearest_bound_counts(dense, tmp_path, bounds, passes):
    other = folder(tmp_path / "worse", arc=FEWER)
    if passes:
        assert ssmcompress.compare(dense, other, max_drop=bounds).passed
    else:
        with pytest.raises(GateError):
            ssmcompress.compare(dense, other, max_drop=bounds)


def test_a_loss_is_relative_for_likelihoods_and_absolute_for_accuracies(dense, tmp_path):
    other = folder(tmp_path / "worse", text=BITS * 1.05)
    assert rows(ssmcompress.compare(dense, other))[TEXT].change == pytest.approx(0.05)
    assert ssmcompress.compare(dense, other, max_drop=["text=0.051"]).passed
    with pytest.raises(GateError, match=r"\+5\.00 % \[\+5\.00, \+5\.00\], bound 4.9 %"):
        ssmcompress.compare(dense, other, max_drop=["text=0.049"])


def test_better_is_no_loss(dense, tmp_path):
    worse = folder(tmp_path / "worse", arc=FEWER)
    found = ssmcompress.compare(worse, dense, max_drop=[0], strict=True)
    assert rows(found)[ARC].verdict == "better" and rows(found)[ARC].gate == "passes"


def test_undecided_fails_only_where_it_is_strict(dense, tmp_path):
    other = folder(tmp_path / "other", arc=FLIPPED)
    found = ssmcompress.compare(dense, other, max_drop=["0.01"])
    row = rows(found)[ARC]
    assert (row.verdict, row.gate, found.passed) == ("no difference shown", "undecided", True)
    assert -row.adjusted[0] > 0.01
    with pytest.raises(GateError, match="arc_easy_local/acc may have lost more") as failed:
        ssmcompress.compare(dense, other, max_drop=["0.01"], strict=True)
    assert "more items" in failed.value.hint
    assert ssmcompress.compare(dense, other, max_drop=["0.2"], strict=True).passed


def test_a_loss_beyond_the_bound_that_may_be_chance_is_undecided(dense, tmp_path):
    arc = FLIPPED.copy()
    arc[np.flatnonzero(RIGHT == 1)[12:20]] = 0  # 20 lost, 12 won
    row = rows(ssmcompress.compare(dense, folder(tmp_path / "other", arc=arc), max_drop=["0.01"]))[ARC]
    assert row.change == pytest.approx(-0.02) and row.p > 0.05
    assert (row.verdict, row.gate) == ("no difference shown", "undecided")


def test_what_was_computed_otherwise_is_told(dense, tmp_path):
    events = []
    other = folder(tmp_path / "other", dtype="torch.bfloat16", backend={"conv": "torch"})
    ssmcompress.compare(dense, other, folder(tmp_path / "same"), emit=events.append)
    told = [event.text for event in events if isinstance(event, Note) and event.level == "warning"]
    assert told == [
        "other was evaluated in torch.bfloat16, dense in torch.float32: part of a difference may come from that.",
        "other was evaluated with other kernels than dense: part of a difference may come from that.",
    ]


def test_what_the_reference_cannot_do_passes_no_gate(tmp_path):
    dense = folder(tmp_path / "dense", hard=GUESSED)
    other = folder(tmp_path / "other", hard=GUESSED)
    found = ssmcompress.compare(dense, other, max_drop=["0.01"])
    row = rows(found)[HARD]
    assert (row.verdict, row.gate, row.p_holm) == ("not measurable", "not measurable", None) and found.passed
    for key in (HARD, "arc_challenge_local"):
        with pytest.raises(GateError, match=f"{key} is not measurable"):
            ssmcompress.compare(dense, other, max_drop=["0.01", f"{key}=0.5"])
    alone = [results(tmp_path / name, {HARD: GUESSED}) for name in ("a", "b")]
    with pytest.raises(GateError, match="nothing that has a bound is measurable"):
        ssmcompress.compare(*alone, max_drop=["0.01"])
    assert ssmcompress.compare(*alone).passed is None


def test_every_candidate_stands_against_the_first(dense, tmp_path):
    others = folder(tmp_path / "worse", arc=FEWER), folder(tmp_path / "same")
    events = []
    found = ssmcompress.compare(dense, *others, emit=events.append)
    assert [each.label for each in found.candidates] == ["worse", "same"]
    assert [rows(found, i)[ARC].verdict for i in (0, 1)] == ["worse", "no difference shown"]
    assert len([event for event in events if isinstance(event, Table)]) == 2


def test_models_of_one_name_are_told_apart_by_their_folders(tmp_path):
    pair = [folder(tmp_path / name, label="model") for name in "ab"]
    found = ssmcompress.compare(*pair)
    assert (found.reference, found.candidates[0].label) == tuple(pair)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hard": RIGHT}, "arc_challenge_local/acc was measured in"),
        ({"items": "other"}, "400 of 400 items differ|200 of 200 items differ"),
        ({"arc": RIGHT[:300]}, "the number of items: 400 and 300"),
        ({"task": {"num_fewshot": 5}}, "the number of examples in the prompt: 0 and 5"),
        ({"task": {"version": "2"}}, "the task's version: 1 and 2"),
        ({"task": {"limit": 400}}, "--limit: None and 400"),
        ({"text": BITS * np.nan}, "bits_per_byte: .*other holds scores that are NaN"),
    ],
)
def test_what_was_measured_otherwise_is_refused(dense, tmp_path, options, words):
    with pytest.raises(InputError, match=words):
        ssmcompress.compare(dense, folder(tmp_path / "other", **options), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_single_item_that_differs_is_counted(tmp_path):
    made = [Path(results(tmp_path / name, {ARC: RIGHT})) for name in "ab"]
    lines = (made[1] / "samples.jsonl").read_text()
    (made[1] / "samples.jsonl").write_text(lines.replace('item-arc_easy_local/acc-7"', 'another"'))
    with pytest.raises(InputError, match="1 of 400 items differ"):
        ssmcompress.compare(*made)


def test_other_windows_or_weights_are_refused(tmp_path):
    made = {
        name: results(tmp_path / name, {TEXT: BITS}, weights={TEXT: SIZE + more}, length=length)
        for name, more, length in (("a", 0, 512), ("b", 0, 256), ("c", 1, 512))
    }
    with pytest.raises(InputError, match="the length of windows: 512 and 256"):
        ssmcompress.compare(made["a"], made["b"])
    with pytest.raises(InputError, match="weigh the same items differently"):
        ssmcompress.compare(made["a"], made["c"])


@pytest.mark.parametrize("out", ["dense", "."])
def test_what_is_compared_is_not_replaced_by_the_comparison(dense, tmp_path, out):
    (tmp_path / "summary.json").write_text('{"schema_version": 1}')
    with pytest.raises(InputError, match="holds the results that are compared"):
        ssmcompress.compare(dense, dense, out=tmp_path / out, overwrite=True)
    assert (Path(dense) / "samples.jsonl").exists()


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        (["arc_eazy_local=0.01"], "Did you mean 'arc_easy_local'"),
        (["nonsense=0.01"], "Measured: text/bits_per_byte, arc_easy_local/acc"),
        (["text=much"], "Write 0.01"),
        (["-0.1"], "Write 0.01"),
        (["nan"], "Write 0.01"),
        (["0.1", "0.2"], "Give it once"),
    ],
)
def test_a_bound_that_means_nothing_is_refused(dense, bounds, words):
    with pytest.raises(InputError) as refused:
        ssmcompress.compare(dense, dense, max_drop=bounds)
    assert words in refused.value.hint


def test_one_evaluation_or_strictness_without_a_bound_is_refused(dense):
    with pytest.raises(InputError, match="nothing to compare with"):
        ssmcompress.compare(dense)
    with pytest.raises(InputError, match="--strict"):
        ssmcompress.compare(dense, dense, strict=True)


def test_folders_that_hold_no_results_are_refused(dense, tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        ssmcompress.compare(dense, tmp_path)
    for line in ("{", '{"measure": "t/acc"}', "[]"):
        (tmp_path / "dense" / "samples.jsonl").write_text(line)
        with pytest.raises(InputError, match=r"samples.jsonl cannot be read: line 1"):
            ssmcompress.compare(dense, dense)
    (tmp_path / "dense" / "samples.jsonl").write_text("")
    with pytest.raises(InputError, match="holds no scored items"):
        ssmcompress.compare(dense, dense)


@pytest.mark.slow
def test_a_rise_of_bits_per_byte_by_a_twentieth_is_caught(tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each[:1500]}) + "\n" for each in documents(limit=24)))
    options = {"perplexity": str(text), "length": 256}
    reference = ssmcompress.evaluate("ref:mamba", **options, out=tmp_path / "dense")
    noise = 0.12
    found = None
    for attempt in range(4):  # towards a rise of 5 %
        perturb(tmp_path / f"model{attempt}", noise)
        summary = ssmcompress.evaluate(str(tmp_path / f"model{attempt}"), **options, out=tmp_path / f"worse{attempt}")
        rise = summary.bits_per_byte / reference.bits_per_byte - 1
        if abs(rise - 0.05) < 0.005:
            found = str(tmp_path / f"worse{attempt}")
            break
        noise *= (0.05 / rise) ** 0.5
    assert found, (noise, rise)
    itself = ssmcompress.compare(tmp_path / "dense", tmp_path / "dense", max_drop=[0])
    assert itself.passed and rows(itself)[TEXT].change == 0.0
    with pytest.raises(SystemExit) as left:
        cli.main(["compare", str(tmp_path / "dense"), found, "--max-drop", "0.01"])
    out, err = capsys.readouterr()
    assert left.value.code == 5 and "text/bits_per_byte" in out and "lost more than allowed" in err
    assert ssmcompress.compare(tmp_path / "dense", found, max_drop=["0.08"], strict=True).passed


def perturb(folder, noise):
    """Writes ref:mamba with Gaussian noise on its matrices, relative to each one's spread."""
    checkpoint = load("ref:mamba", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in checkpoint.model.named_parameters():
            if name.endswith("_proj.weight"):
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    with output(folder) as partial:
        write(checkpoint, partial)
