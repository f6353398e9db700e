"""Token windows: which text they hold, that they are the same again, and text that cannot be read."""

import gzip
import hashlib
import json
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ssmcompress.calib.data import documents, windows
from ssmcompress.errors import InputError, ResourceError

END = 256


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ssmcompress" / "windows"


def byte_tokenizer(first: int = 0) -> PreTrainedTokenizerFast:
    """One token a byte, and one for the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: (i + first) % 256 for i, letter in enumerate(alphabet)} | {"<end>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


TOKENIZER = byte_tokenizer()


def write(path: Path, *texts: str) -> str:
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)), "utf-8")
    return str(path)


def draw(source, count=4, length=8, seed=0, tokenizer=TOKENIZER, **rest):
    return windows(source, tokenizer, count=count, length=length, seed=seed, **rest)


def texts(found):
    return [TOKENIZER.decode(row) for row in found.ids]


LONG = ["".join(chr(ord("a") + i) + str(j % 10) for j in range(20)) for i in range(9)]  # 40 bytes each


def test_long_documents_give_one_crop_each(tmp_path):
    found = draw(write(tmp_path / "a.jsonl", *LONG), count=5)
    assert found.ids.shape == (5, 8) and found.ids.dtype == torch.int64
    assert found.documents == 9
    homes = [[text for text in LONG if crop in text] for crop in texts(found)]
    assert all(homes)
    letters = {next(letter for letter in crop if letter.isalpha()) for crop in texts(found)}
    assert len(letters) == 5


def test_crops_start_anywhere(tmp_path):
    source = write(tmp_path / "a.jsonl", *["0123456789"] * 50)
    starts = {crop[0] for seed in range(4) for crop in texts(draw(source, count=40, seed=seed))}
    assert starts == {"0", "1", "2"}


def test_the_same_seed_gives_the_same_windows_and_another_one_others(tmp_path):
    source = write(tmp_path / "a.jsonl", *LONG)
    first, again, other = (draw(source, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256
    assert not torch.equal(first.ids, other.ids) and first.sha256 != other.sha256


def test_the_hash_is_that_of_the_ids_as_little_endian_int32(tmp_path):
    found = draw(write(tmp_path / "a.jsonl", *LONG))
    raw = b"".join(int(token).to_bytes(4, "little") for token in found.ids.flatten())
    assert found.sha256 == hashlib.sha256(raw).hexdigest()


def test_short_documents_are_joined_by_the_end_of_text(tmp_path):
    found = draw(write(tmp_path / "a.jsonl", *(letter * 3 for letter in "abcdefghijkl")), count=3)
    joined = "".join(texts(found))
    assert len(joined.replace("<end>", "#")) == 24
    assert set(joined.split("<end>")[:-1]) <= {letter * 3 for letter in "abcdefghijkl"}


@pytest.mark.parametrize("count", [5, 6, 100])
def test_text_that_holds_no_more_than_asked_for_is_used_in_order_and_whole(tmp_path, count):
    found = draw(write(tmp_path / "a.jsonl", LONG[0], "xyz", LONG[1][:5]), count=count, length=10)
    assert "".join(texts(found)) == f"{LONG[0]}<end>xyz<end>{LONG[1][:5]}"
    assert found.ids.shape == (5, 10)


def test_a_plain_text_gives_windows_that_do_not_overlap(tmp_path):
    (tmp_path / "a.txt").write_text("".join(f"{i:04}" for i in range(500)))
    found = draw(str(tmp_path / "a.txt"), count=30, length=40)
    assert found.documents == 1 and found.ids.shape == (30, 40)
    everything = (tmp_path / "a.txt").read_text()
    places = [everything.index(crop) for crop in texts(found)]
    assert all(later - place >= 40 for place, later in pairwise(places))
    assert places[-1] > 1600  # drawn from all of it, not from its start
    assert torch.equal(
        draw(str(tmp_path / "a.txt"), count=50, length=40).ids.flatten(),
        TOKENIZER((tmp_path / "a.txt").read_text(), return_tensors="pt")["input_ids"].flatten(),
    )


def test_windows_of_a_plain_text_start_anywhere(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789" * 20 + "0123456")
    starts = {texts(draw(str(tmp_path / "a.txt"), count=2, length=10, seed=seed))[0][0] for seed in range(60)}
    assert starts == set("01234567")


@pytest.mark.parametrize("seed", range(4))
def test_as_many_documents_as_windows_are_used_in_order(tmp_path, seed):
    found = draw(write(tmp_path / "a.jsonl", "0123456789", "abcdefghij"), count=2, length=10, seed=seed)
    assert texts(found) == ["0123456789", "<end>abcdefghi"]


def test_a_share_of_the_windows_comes_from_the_extra_texts(tmp_path):
    source = write(tmp_path / "a.jsonl", *LONG)
    extra = [f"{i:03}=" for i in range(40)]
    found = draw(source, count=8, extra=extra, share=0.25)
    mixed = texts(found)
    assert ["=" in text for text in mixed] == [False] * 6 + [True] * 2
    assert torch.equal(found.ids[:6], draw(source, count=6).ids)
    assert found.sha256 != draw(source, count=8).sha256
    assert torch.equal(draw(source, count=8, extra=extra, share=0.0).ids, draw(source, count=8).ids)


def test_the_shipped_text_is_the_default():
    found = draw(None, count=3, length=64)
    assert found.ids.shape == (3, 64)
    assert found.source == "calibration.jsonl"
    assert found.documents > 100


def test_gzipped_files_and_other_columns(tmp_path):
    lines = "".join(json.dumps({"body": text, "text": 3}) + "\n" for text in LONG) + "\n"
    for name in ("a.json.gz", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(lines.encode()))
        assert documents(str(tmp_path / name), column="body") == LONG
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    assert documents(str(tmp_path / "a.txt.gz")) == ["hello"]


def test_text_is_read_as_it_is(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\ntwo\u2028three".encode())
    assert documents(str(tmp_path / "a.txt")) == ["one\r\ntwo\u2028three"]
    (tmp_path / "a.jsonl").write_bytes('{"text": "x\u2028y"}\r\n\n{"text": "\\ud800 z"}\n{"text": " "}'.encode())
    assert documents(str(tmp_path / "a.jsonl")) == ["x\u2028y", "? z"]


WRONG = {
    "empty.txt": (b"", "empty.txt holds no text"),
    "blank.txt": (b" \n\n", "blank.txt holds no text"),
    "blank.jsonl": (b'{"text": ""}\n', "blank.jsonl holds no text"),
    "short.txt": (b"abc", "short.txt holds 3 tokens, less than one window of 8"),
    "latin.txt": (b"caf\xe9", "latin.txt is not UTF-8 text: byte 3"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', "latin.jsonl is not UTF-8"),
    "column.jsonl": (
        b'{"text": "a"}\n{"body": "b", "id": 1}',
        "Line 2 of .*column.jsonl has no column 'text'.*body, id",
    ),
    "number.jsonl": (b'{"text": 3}', "Line 1 of .*has no text in column 'text'"),
    "null.jsonl": (b'{"text": null}', "has no text in column"),
    "malformed.jsonl": (b'{"text": "a"}\n\n{"text": ', "Line 3 of .*malformed.jsonl is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "Line 1 of .*deep.jsonl is not JSON"),
    "list.json": (b'[{"text": "a"}]', "Line 1 of .*list.json is not an object"),
    "plain.jsonl": (b"once upon a time", "Line 1 of .*plain.jsonl is not JSON"),
    "no.txt.gz": (b"plain", "not a sound gzip file"),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}' * 50)[:-12], "not a sound gzip file"),
    "flipped.txt.gz": (gzip.compress(b"hello")[:10] + b"\xff" * 20, "not a sound gzip file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_text_that_cannot_be_read_is_told_in_a_sentence(tmp_path, name):
    content, sentence = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=sentence) as told:
        draw(str(tmp_path / name))
    assert told.value.message.endswith(".") and told.value.hint


def test_sources_that_are_no_file(tmp_path):
    for source in ("missing.txt", "./missing", "a/b/missing", "missing.jsonl", str(tmp_path / "x.json.gz")):
        with pytest.raises(InputError, match="There is no file"):
            draw(source)
    with pytest.raises(InputError, match="is a folder"):
        draw(str(tmp_path))


def test_options_that_a_file_cannot_have_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(InputError, match="no split 'test'"):
        draw(str(tmp_path / "a.txt"), split="test")
    with pytest.raises(InputError, match="no column 'text'"):
        draw(str(tmp_path / "a.txt"), column="text")


def test_a_model_without_a_tokenizer_cannot_read(tmp_path):
    with pytest.raises(InputError, match="without a tokenizer"):
        draw(write(tmp_path / "a.jsonl", *LONG), tokenizer=None)


def hub(monkeypatch, answer):
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options["split"]))
        if isinstance(answer, Exception):
            raise answer
        return datasets.Dataset.from_list(answer).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_data_set_is_read_no_further_than_needed(monkeypatch):
    asked = hub(monkeypatch, [{"body": text} for text in LONG])
    assert documents("owner/name:config", split="test", column="body") == LONG
    assert documents("name", column="body", limit=80) == LONG[:2]
    assert asked == [("owner/name", "config", "test"), ("name", None, "train")]


def test_a_data_set_without_the_column_names_those_it_has(monkeypatch):
    hub(monkeypatch, [{"body": "a", "id": 1}])
    with pytest.raises(InputError, match="The train split of owner/name has no column 'text'; its columns: body, id"):
        draw("owner/name")


@pytest.mark.parametrize(
    ("trouble", "kind", "sentence"),
    [
        (datasets.exceptions.DatasetNotFoundError("no"), InputError, "no data set of this name"),
        (
            ValueError('Unknown split "x". Should be one of [...].\nMore'),
            InputError,
            'cannot be read: Unknown split "x"',
        ),
        (ConnectionError("no"), ResourceError, "the hub cannot be reached"),
    ],
)
def test_a_data_set_that_cannot_be_had_is_told(monkeypatch, trouble, kind, sentence):
    hub(monkeypatch, trouble)
    with pytest.raises(kind, match=sentence):
        draw("owner/name")


def test_offline_the_hub_is_not_reached():
    with pytest.raises(ResourceError, match="no file nobody/nothing; the hub cannot be reached") as told:
        draw("nobody/nothing")
    assert told.value.hint


def counting(monkeypatch):
    calls = []
    plain = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", lambda *a, **k: calls.append(1) or plain(*a, **k))
    return calls


def test_windows_are_kept_and_drawn_anew_when_anything_changes(tmp_path, cache, monkeypatch):
    source = write(tmp_path / "a.jsonl", *LONG)
    first = draw(source)
    calls = counting(monkeypatch)
    assert torch.equal(draw(source).ids, first.ids)
    assert not calls
    changes = [{"seed": 1}, {"count": 3}, {"length": 7}, {"extra": LONG}, {"tokenizer": byte_tokenizer(7)}]
    for number, change in enumerate(changes, 2):
        calls.clear()
        draw(source, **change)
        assert calls and len(list(cache.iterdir())) == number
    calls.clear()
    draw(write(tmp_path / "a.jsonl", *LONG[::-1]))
    assert calls


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:-4], lambda raw: raw[:-4] + b"\0\0\0\1"])
def test_a_damaged_cache_is_drawn_anew(tmp_path, cache, damage):
    source = write(tmp_path / "a.jsonl", *LONG)
    first = draw(source)
    (file,) = cache.iterdir()
    raw = file.read_bytes()
    file.write_bytes(damage(raw))
    assert torch.equal(draw(source).ids, first.ids)
    assert file.read_bytes() == raw
    assert list(cache.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_no_trouble(tmp_path, cache):
    cache.parent.parent.write_text("a file where the folder should be")
    assert draw(write(tmp_path / "a.jsonl", *LONG)).ids.shape == (4, 8)
