"""The shipped suites and those of a user: read, filled in, and refused where they are wrong."""

import hashlib
from pathlib import Path

import pytest

from ssmcompress.errors import InputError
from ssmcompress.evaluate import suites
from ssmcompress.evaluate.harness import Harness
from ssmcompress.evaluate.suites import Entry, Suite

DATA = Path(__file__).parents[3] / "evals" / "data"


@pytest.mark.parametrize("name", ["smoke", "standard"])
def test_the_shipped_suites_name_tasks_that_are_there(name):
    suite = suites.read(name)
    assert suite.name == name and suite.description
    Harness([entry.task for entry in suite.tasks])


def test_what_is_given_goes_before_what_the_suite_says():
    suite = Suite(limit=9, num_fewshot=2, tasks=(Entry(task="a", limit=3), Entry(task="b", num_fewshot=0)))
    assert suite.entries(None, None) == (
        Entry(task="a", limit=3, num_fewshot=2),
        Entry(task="b", limit=9, num_fewshot=0),
    )
    assert suite.entries(1, 5) == tuple(Entry(task=name, limit=1, num_fewshot=5) for name in "ab")
    assert [entry.task for entry in suite.with_tasks(["c", "a", "c"]).tasks] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tasks: [", "not YAML"),
        ("task: a", "task"),
        ("tasks: [{task: a, limit: 0}]", "limit"),
        ("- a", "the file: expected a mapping"),
        ("tasks: [a]", "tasks.0: expected a mapping, such as {task: NAME}"),
        ("tasks: [{task: a, limt: 3}]\nrecal: true", "did you mean 'limit'.; recal: .*did you mean 'recall'"),
        ("limit: 3\nlimit: 4\n", "line 2: limit: this key is there twice"),
        ("tasks:\n- task: a\n- task: b\n  limit: 3\n  task: c", "line 5: task: this key is there twice"),
        ("tasks: &a [*a]", "not YAML: it holds itself"),
        ("tasks: [{task: a}, {task: b}, {task: a, num_fewshot: 5}]", "tasks: there twice: a;"),
    ],
)
def test_a_suite_that_is_wrong_is_refused(tmp_path, text, said):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=said):
        suites.read(str(tmp_path / "mine.yaml"))


def test_a_suite_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        suites.read(str(tmp_path / "mine.yaml"))


def test_a_suite_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="no suite") as caught:
        suites.read("standrad")
    assert "standard" in caught.value.hint
    with pytest.raises(InputError, match="cannot be read"):
        suites.read(str(tmp_path / "mine.yaml"))


def test_the_shipped_data_are_those_of_the_sums():
    sums = dict(reversed(line.split("  ")) for line in (DATA / "SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.name for path in DATA.glob("*.jsonl*")}
    for name, told in sums.items():
        assert hashlib.sha256((DATA / name).read_bytes()).hexdigest() == told
