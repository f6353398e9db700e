"""Examples: what is read from every kind of file, what is learned of it, and what is refused."""

import gzip
import json

import pytest

from ssmcompress.checkpoint.source import resolve
from ssmcompress.errors import InputError
from ssmcompress.tune.examples import MOST, drawn, held_out, order, padding, read, shared
from ssmcompress.tune.fit import batch
from ssmcompress.tune.objective import IGNORED
from ssmcompress.tuning import TuneState

TOKENIZER = resolve("ref:mamba").tokenizer()
END = TOKENIZER.eos_token_id


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def step(**fields):
    return TuneState(data="unused", **fields)


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_completion_is_learned_and_its_prompt_is_not(tmp_path):
    source = lines(tmp_path / "a.jsonl", {"prompt": "The sun is", "completion": " hot. Très chaud."})
    (found,) = read(source, TOKENIZER, step()).items
    assert list(found.ids) == [*ids("The sun is"), *ids(" hot. Très chaud."), END]
    assert list(found.ids[-found.scored :]) == [*ids(" hot. Très chaud."), END]
    assert found.bytes == len(" hot. Très chaud.".encode())


def test_templates_fill_in_columns_of_a_table(tmp_path):
    (tmp_path / "a.csv").write_text('mr,the ref\n"name[The Vaults], eatType[pub]","It is {a} pub."\n')
    given = step(prompt="{mr} =", completion=" {the ref}")
    (found,) = read(str(tmp_path / "a.csv"), TOKENIZER, given).items
    assert TOKENIZER.decode(found.ids[:-1]) == "name[The Vaults], eatType[pub] = It is {a} pub."


def test_tables_of_tabs_and_gzipped_files_are_read(tmp_path):
    (tmp_path / "a.tsv").write_text("sentence\tlabel\ngood\t1\nbad\t0\n")
    given = step(prompt="{sentence}", completion=" {label}")
    assert len(read(str(tmp_path / "a.tsv"), TOKENIZER, given)) == 2
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "hello there"}))
    assert len(read(str(tmp_path / "b.jsonl.gz"), TOKENIZER, step())) == 1


def test_plain_text_is_cut_into_windows_of_which_every_token_counts_once(tmp_path):
    text = "It was the best of times, it was the worst of times. " * 9
    (tmp_path / "a.txt").write_text(text)
    found = read(str(tmp_path / "a.txt"), TOKENIZER, step(length=16)).items
    assert all(each.ids[0] == END and each.scored == len(each.ids) - 1 <= 16 for each in found)
    assert [token for each in found for token in each.ids[1:]] == ids(text)


def test_what_is_too_long_is_left_out_and_counted(tmp_path):
    source = lines(
        tmp_path / "a.jsonl",
        {"prompt": "short", "completion": " enough"},
        {"prompt": "word " * 99, "completion": " x"},
        {"prompt": "x", "completion": " word" * 99},
    )
    found = read(source, TOKENIZER, step(length=32))
    assert (len(found), found.skipped) == (1, 2)


def test_examples_of_one_prompt_stay_together(tmp_path):
    rows = [{"prompt": f"number {i // 3}", "completion": f" answer {i}"} for i in range(300)]
    data = read(lines(tmp_path / "a.jsonl", *rows), TOKENIZER, step())
    train, valid = held_out(data, seed=0)
    assert len(train) + len(valid) == 300
    assert len(valid) == 15
    assert not {each.prompt_sha256 for each in train.items} & {each.prompt_sha256 for each in valid.items}
    assert shared(train, valid) == 0 and shared(data, valid) == 15
    assert held_out(data, seed=0)[1] == valid != held_out(data, seed=1)[1]


def test_no_more_validate_than_are_needed(tmp_path):
    rows = [{"prompt": f"number {i}", "completion": " x"} for i in range(MOST + 9)]
    data = read(lines(tmp_path / "a.jsonl", *rows), TOKENIZER, step())
    assert len(drawn(data, 0)) == MOST
    assert drawn(data, 0) == drawn(data, 0) != drawn(data, 1)


def test_a_batch_pads_behind_and_labels_what_is_scored():
    found = batch([{"input_ids": (5, 6, 7, 8), "scored": 2}, {"input_ids": (9, 4), "scored": 1}])
    assert found["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    x = IGNORED
    assert found["labels"].tolist() == [[x, x, 7, 8], [x, 4, x, x]]


@pytest.mark.parametrize(
    ("name", "content", "fields", "words"),
    [
        ("a.jsonl", '{"prompt": "a", "completion": "b"}\nnot json\n', {}, "Line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", "[1]\n", {}, "Line 1 of .* is not an object"),
        ("a.jsonl", '{"prompt": "a"}\n', {}, "Line 1 of .* has no column 'completion'; its columns: prompt"),
        ("a.jsonl", '{"prompt": "a", "completion": null}\n', {}, "has no text in the column 'completion'"),
        ("a.jsonl", '{"prompt": "a", "completion": " "}\n', {}, "Line 1 of .* has an empty completion"),
        ("a.jsonl", '{"question": "a"}\n', {}, "has no column 'text'; its columns: question"),
        ("a.jsonl", '{"a": "x"}\n', {"completion": "{b}"}, "has no column 'b'; its columns: a"),
        ("a.jsonl", "", {}, "gives no example to learn from: it is empty"),
        ("a.txt", "", {}, "gives no example to learn from: it is empty"),
        ("a.txt", "x", {"completion": "{b}"}, "plain text: it has no columns"),
        ("a.csv", "a,b\n1,2,3\n", {"completion": "{b}"}, "Line 2 of .* has more columns"),
        ("a.csv", "a,b\n1\n", {"completion": "{b}"}, "Line 2 of .* has fewer columns"),
        ("a.csv", 'a\n"x\n', {"completion": "{a}"}, "cannot be read after line 1"),
        ("a.jsonl", '{"prompt": "a", "completion": "%s"}' % ("x " * 99), {"length": 9}, "all 1 are longer than 9"),
    ],
)
def test_what_is_malformed_is_named(tmp_path, name, content, fields, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=words):
        read(str(tmp_path / name), TOKENIZER, step(**fields))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match=r"There is no file .*nowhere\.jsonl"):
        read(str(tmp_path / "nowhere.jsonl"), TOKENIZER, step())
    with pytest.raises(InputError, match="is a folder"):
        read(str(tmp_path), TOKENIZER, step())


def test_one_prompt_cannot_validate_too(tmp_path):
    data = read(lines(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}), TOKENIZER, step())
    with pytest.raises(InputError, match="One prompt"):
        held_out(data, 0)


def test_the_padding_that_is_told_is_that_of_the_batches(tmp_path):
    rows = [{"prompt": "one two", "completion": " three" * (1 + i % 7)} for i in range(40)]
    data, given = read(lines(tmp_path / "a.jsonl", *rows), TOKENIZER, step()), step(steps=5, batch_size=4, accumulate=2)
    turns = [data.items[i] for i in order([len(each.ids) for each in data.items], 8, 5, 3)]
    batches = [batch([vars(each) | {"input_ids": each.ids} for each in turns[i : i + 4]]) for i in range(0, 40, 4)]
    read_at_all = sum(each["input_ids"].numel() for each in batches)
    assert 0 < padding(data, given, 3) == pytest.approx(1 - sum(len(each.ids) for each in turns) / read_at_all)
