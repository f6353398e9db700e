"""Tasks: the files that their authors publish are read, and completions are judged as they should be."""

import json

import pytest

import ssmcompress
from ssmcompress.errors import InputError, RecipeError
from ssmcompress.tune.examples import pairs
from ssmcompress.tuning import TuneState

E2E = 'mr,ref\n"name[Aromi], eatType[pub]","Aromi is a ""pub""."\n"name[Aromi], eatType[pub]",A pub.\nname[B],B.\n'
DART = [
    {"tripleset": [["A", "IN", "B"], ["A", "IS", "old"]], "annotations": [{"text": "A, old, is in B."}, {"text": "x"}]}
]
SST2 = 'sentence\tlabel\na "good one \t1\ndull\t0\n'
RTE = "index\tsentence1\tsentence2\tlabel\n0\tIt rains.\tIt is wet.\tentailment\n1\tA.\tB.\tnot_entailment\n"
SPIDER = [
    {"db_id": "shop", "question": "How many?", "query": "SELECT count(*) FROM item"},
    {"db_id": "shop", "SpiderQuestion": "Which names?", "query": "SELECT name FROM item"},
]
TABLES = [
    {
        "db_id": "shop",
        "table_names_original": ["item"],
        "column_names_original": [[-1, "*"], [0, "id"], [0, "name"]],
    }
]
FILES = {
    "e2e": ("a.csv", E2E),
    "dart": ("a.json", json.dumps(DART)),
    "sst2": ("a.tsv", SST2),
    "rte": ("a.tsv", RTE),
    "spider": ("a.json", json.dumps(SPIDER)),
}


def written(folder, task, content=None):
    (folder / "tables.json").write_text(json.dumps(TABLES))
    name, usual = FILES[task]
    (folder / name).write_text(usual if content is None else content)
    return str(folder / name)


def read(folder, task, content=None, limit=None):
    return list(pairs(written(folder, task, content), TuneState(data="-", task=task), limit))


def test_the_files_are_read_as_they_are_published(tmp_path):
    assert read(tmp_path, "e2e")[0] == ("name[Aromi], eatType[pub] =", ' Aromi is a "pub".')
    assert read(tmp_path, "dart") == [
        ("A : IN : B | A : IS : old =", " A, old, is in B."),
        ("A : IN : B | A : IS : old =", " x"),
    ]
    assert read(tmp_path, "sst2") == [('a "good one . It was', " good"), ("dull. It was", " bad")]
    assert [answer for _, answer in read(tmp_path, "rte")] == [" yes", " no"]
    first, second = read(tmp_path, "spider")
    assert first == ("item(id, name)\nHow many? =", " SELECT count(*) FROM item")
    assert second[0].endswith("Which names? =")


def test_a_limit_counts_prompts_and_not_their_texts(tmp_path):
    assert len(read(tmp_path, "e2e", limit=1)) == 2
    assert len(read(tmp_path, "e2e", limit=2)) == 3


@pytest.mark.parametrize(
    ("task", "content", "words"),
    [
        ("dart", "{", "is not JSON"),
        ("dart", "{}", "is no list of objects"),
        ("dart", '[{"tripleset": 3}]', "Object 1 of .* has no tripleset and annotations"),
        ("dart", '[{"tripleset": [["a"]], "annotations": [{}]}]', "has no text in the column 'text'"),
        ("sst2", "sentence\tlabel\na\t2\n", "has the label '2'; expected one of 0, 1"),
        ("spider", '[{"db_id": "bank"}]', "asks a database .* does not know: 'bank'"),
        ("e2e", "a,b\n1,2\n", "has no column 'mr'"),
    ],
)
def test_other_files_are_refused(tmp_path, task, content, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, task, content)


def test_a_schema_belongs_beside_the_questions(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(SPIDER))
    with pytest.raises(InputError, match=r"tables.json is not beside"):
        list(pairs(str(tmp_path / "a.json"), TuneState(data="-", task="spider")))


@pytest.mark.parametrize("task", FILES)
def test_completions_of_the_test_are_judged(tmp_path, task):
    source = written(tmp_path, task)
    options = {"valid": source, "test": source, "steps": 1, "batch_size": 2, "limit": 2}
    made = ssmcompress.tune_state("ref:mamba", task=task, data=source, out=tmp_path / "out", **options)
    names = {"e2e": ["BLEU", "chrF2", "ROUGE-L"], "sst2": ["accuracy"], "rte": ["accuracy"], "spider": ["exact match"]}
    assert [figure.name for figure in made.change.figures] == names.get(task, names["e2e"])
    assert all(0 <= figure.low <= figure.value <= figure.high + 1e-9 for figure in made.change.figures)
    kept = json.loads((tmp_path / "out" / "measured.json").read_text())["figures"]
    assert [each["name"] for each in kept] == [figure.name for figure in made.change.figures]


def test_a_task_has_templates_of_its_own(tmp_path):
    with pytest.raises(RecipeError, match="templates of its own"):
        ssmcompress.tune_state("ref:mamba", task="e2e", completion="{x}", data="a.csv", out=tmp_path / "a")
    with pytest.raises(RecipeError, match="there is no test"):
        ssmcompress.tune_state("ref:mamba", limit=3, data="a.csv", out=tmp_path / "a")
