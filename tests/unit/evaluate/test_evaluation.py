"""The verb `eval` as a function: what it measures, with what, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

import ssmcompress
from ssmcompress import cli
from ssmcompress.checkpoint.source import load
from ssmcompress.errors import BackendError, InputError, UnsupportedError
from ssmcompress.evaluate import evaluation
from ssmcompress.evaluate.evaluation import compute_dtype
from ssmcompress.evaluate.results import Summary
from ssmcompress.evaluate.results import documents as kept
from ssmcompress.events import Finished, Metric
from ssmcompress.measure.perplexity import paired_difference, perplexity
from tests.unit.checkpoint import folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mamba2")
    folders.save("mamba2", path, tokenizer=True)
    folders.narrow(path)
    return str(path)


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = [" ".join(f"w{(i * k) % 59}" for i in range(20 + 9 * k)) for k in range(1, 6)]
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in texts))
    return str(path)


def test_the_figures_are_those_of_the_model_on_disk(folder, documents):
    found = ssmcompress.evaluate(folder, perplexity=documents, length=16)
    checkpoint = load(folder, dtype=torch.float32)
    texts = [json.loads(line)["text"] for line in Path(documents).read_text().splitlines()]
    expected = perplexity(checkpoint.model, checkpoint.tokenizer, texts, length=16)
    assert found.bits_per_byte == expected.bits_per_byte
    assert found.bits_per_byte_interval == expected.bits_per_byte_interval
    assert (found.text, found.length, found.seed) == ("texts.jsonl", 16, 0)


def test_a_cpu_computes_in_float32_unless_told(folder, documents):
    assert ssmcompress.evaluate(folder, perplexity=documents).dtype == "torch.float32"
    assert ssmcompress.evaluate(folder, perplexity=documents, dtype="bfloat16").dtype == "torch.bfloat16"
    assert compute_dtype("auto", "cpu") == torch.float32
    assert compute_dtype("float16", "cpu") == torch.float16


@pytest.mark.parametrize("device", ["toaster", "cuda:x", "meta", "mps", ""])
def test_a_device_there_is_no_such_kind_of(device):
    with pytest.raises(InputError, match="device"):
        compute_dtype("auto", device)


def test_a_device_that_this_machine_does_not_have():
    with pytest.raises(BackendError, match="cuda:99"):
        compute_dtype("float32", "cuda:99")


def test_the_kernels_are_recorded(folder, documents):
    assert set(ssmcompress.evaluate(folder, perplexity=documents, backend="reference").backend.values()) == {
        "reference"
    }


def test_documents_are_kept_for_paired_tests(folder, documents, tmp_path):
    events = []
    summary = ssmcompress.evaluate(folder, perplexity=documents, out=tmp_path / "a", emit=events.append)
    ssmcompress.evaluate(folder, perplexity=documents, out=tmp_path / "b", batch_size=1)
    rows = [kept(tmp_path / name) for name in "ab"]
    assert paired_difference(rows[0], rows[0]) == (0.0, 0.0, 0.0)
    difference, low, high = paired_difference(*rows)
    assert low <= difference <= high and abs(difference) < 1e-6
    assert Summary.model_validate_json((tmp_path / "a" / "summary.json").read_text()) == summary
    assert events[-1] == Finished(str(tmp_path / "a"))
    assert [event.name for event in events if isinstance(event, Metric)] == ["bits per byte", "token perplexity"]


def test_one_document_has_no_interval(folder, documents):
    events = []
    found = ssmcompress.evaluate(folder, perplexity=documents, limit=1, emit=events.append)
    assert (found.bits_per_byte_interval, found.perplexity_interval) == (None, None)
    assert all(event.low is None for event in events if isinstance(event, Metric))


def test_fewer_documents_are_the_first_ones(folder, documents):
    some = ssmcompress.evaluate(folder, perplexity=documents, limit=2)
    assert some.text_sha256 != ssmcompress.evaluate(folder, perplexity=documents).text_sha256


def test_only_what_is_asked_for_is_measured_and_else_the_shipped_text(folder, monkeypatch):
    monkeypatch.setattr(evaluation.text, "documents", lambda *_: ["w1 w2 w3", "w4 w5"])
    assert ssmcompress.evaluate(folder).text == "default"
    for tasks in (["openbookqa_local"], "openbookqa_local", " openbookqa_local,"):
        found = ssmcompress.evaluate(folder, tasks=tasks, limit=1)
        assert (found.text, len(found.tasks)) == (None, 2)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"suite": "nothing.yaml"}, "Nothing is asked for"),
        ({"tasks": " ,"}, "names no task"),
        ({"against": "ref:mamba3"}, "mamba3"),
        ({"speed": True, "lengths": "0,5"}, "--lengths holds 0"),
    ],
)
def test_what_will_not_do_is_refused_before_the_model_is_read(folder, tmp_path, monkeypatch, asked, said):
    (tmp_path / "nothing.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluation, "load", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(InputError, match=said):
        ssmcompress.evaluate(folder, out=tmp_path / "out", **asked)


ASKED = {  # by the command line, and by Python
    "nothing": ((), {}, ["text"]),
    "tasks": (("--tasks", "arc_easy_local"), {"tasks": "arc_easy_local"}, ["tasks"]),
    "recall": (("--recall",), {"recall": True}, ["memory"]),
    "both": (("--perplexity", "--recall"), {"perplexity": "default", "recall": True}, ["text", "memory"]),
    "suite": (("--suite", "mine.yaml"), {"suite": "mine.yaml"}, ["memory"]),
    "speed": (("--speed",), {"speed": True}, ["speed"]),
    "against": (("--against", "ref:mamba"), {"against": "ref:mamba"}, ["speed"]),
}


@pytest.mark.parametrize("asked", ASKED)
def test_the_command_line_and_python_measure_the_same(folder, tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("recall: true")
    given, options, expected = ASKED[asked]
    measured: list[str] = []

    def noting(what, answer=None):
        def note(checkpoint, told, *_):
            measured.extend([what] * (what != "tasks" or bool(told.entries)))
            return answer

        return note

    for name, what, answer in (("likelihood", "text", None), ("memory", "memory", []), ("tasks", "tasks", ((), []))):
        monkeypatch.setattr(evaluation, f"_{name}", noting(what, answer))
    monkeypatch.setattr(evaluation, "_speed", noting("speed"))
    ssmcompress.evaluate(folder, **options)
    with pytest.raises(SystemExit) as left:
        cli.main(["eval", folder, *given])
    assert not left.value.code and measured == expected * 2


def test_the_measures_are_known_before_anything_is_measured(documents):
    found = evaluation.measures(perplexity=documents, recall=True, tasks=["arc_easy_local"])
    assert found == [
        "text/bits_per_byte",
        *(f"recall/copy-{length}" for length in (8, 12, 16, 20)),
        *(f"recall/key-value-{pairs}" for pairs in (2, 4, 8)),
        "arc_easy_local/acc",
        "arc_easy_local/acc_norm",
    ]
    with pytest.raises(InputError, match="measures nothing"):
        evaluation.measures()


def test_a_model_without_a_tokenizer_is_refused(documents, tmp_path):
    folders.save("mamba", tmp_path / "bare")
    with pytest.raises(InputError, match="no tokenizer"):
        ssmcompress.evaluate(str(tmp_path / "bare"), perplexity=documents)


def test_memory_cannot_be_measured_with_any_tokenizer(folder, tmp_path):
    with pytest.raises(UnsupportedError, match="whole words"):
        ssmcompress.evaluate(folder, perplexity=None, recall=True, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused(folder, documents, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        ssmcompress.evaluate(folder, perplexity=documents, out=tmp_path)
    with pytest.raises(InputError, match="does not look like"):
        ssmcompress.evaluate(folder, perplexity=documents, out=tmp_path, overwrite=True)


def test_an_output_that_exists_is_refused_before_the_model_is_read(folder, documents, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(evaluation, "load", lambda *_, **__: pytest.fail("the model was read"))
    with pytest.raises(InputError, match="exists already"):
        ssmcompress.evaluate(folder, perplexity=documents, out=tmp_path)


def test_the_model_is_never_replaced_by_its_own_results(documents, tmp_path):
    folders.save("mamba2", tmp_path / "model", tokenizer=True)
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    with pytest.raises(InputError, match="holds the model"):
        ssmcompress.evaluate(str(tmp_path / "model"), perplexity=documents, out=tmp_path / "model", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
