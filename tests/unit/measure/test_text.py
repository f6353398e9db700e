"""Texts to measure on: shipped by name, and a user's own, cut into documents."""

import json

import pytest

from ssmcompress.calib import data
from ssmcompress.errors import InputError
from ssmcompress.measure import text


@pytest.mark.parametrize("name", ["default", "wikipedia", "novels"])
def test_shipped_texts_are_there_and_plain(name):
    found = text.documents(name)
    assert len(found) >= 3 and all(document.strip() for document in found)
    assert text.documents(name, 2) == found[:2]


def test_the_default_is_whole_pages():
    assert text.documents() == text.documents("default") == text.documents("wikipedia")
    assert len(text.documents()) == 62


def test_evaluation_and_calibration_text_are_disjoint():
    def phrases(documents):
        for document in documents:
            words = document.split()
            yield from zip(*(words[start:] for start in range(16)), strict=False)

    calibration = set(phrases(data.documents(None)))
    assert len(calibration) > 10_000
    for name in ("wikipedia", "novels"):
        assert calibration.isdisjoint(phrases(text.documents(name)))


def test_pages_are_cut_at_top_level_headings_only(tmp_path):
    path = tmp_path / "wiki.txt"
    pages = [" = One = \n\nfirst\n\n = = Part = = \n\nmore\n", " = Two = \n\nsecond\n"]
    path.write_text("".join(pages))
    assert text.documents(str(path)) == pages


def test_a_long_text_without_headings_is_cut_between_paragraphs(tmp_path):
    path = tmp_path / "long.txt"
    whole = "".join(f"Paragraph {i} " + "word " * 150 + "\n\n" for i in range(40))
    path.write_text(whole)
    found = text.documents(str(path))
    assert "".join(found) == whole
    assert len(found) > 3 and all(len(document) >= text.BLOCK for document in found[:-1])
    assert max(map(len, found)) < 2 * text.BLOCK


def test_a_short_text_is_one_document(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("One line.\n\nAnother, with an accent: é\n")
    assert text.documents(str(path)) == ["One line.\n\nAnother, with an accent: é\n"]


def test_json_lines_are_documents_as_they_are(tmp_path):
    path = tmp_path / "lines.jsonl"
    documents = ["a\n\nb" * 2000, "second", " = Not a heading = "]
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    assert text.documents(str(path)) == documents
    assert text.documents(str(path), 1) == documents[:1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\n ", "holds no text"),
        ("bad.jsonl", b'{"text": "a"}\nnot json\n', "Line 2"),
        ("other.jsonl", b'{"body": "a"}\n', "no column 'text'"),
        ("binary.txt", b"\xff\xfe", "not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=words):
        text.documents(str(path))


def test_a_text_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.txt"):
        text.documents(str(tmp_path / "nowhere.txt"))
    with pytest.raises(InputError, match="folder"):
        text.documents(str(tmp_path))
