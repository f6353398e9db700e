import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from ssmcompress.errors import UnsupportedError
from ssmcompress.measure.exercises import KEYS, VALUES, Vocabulary, copying, exercise_documents, key_value, stream
from tests.unit.measure.fakes import TOKENIZER

WORDS = Vocabulary.of(TOKENIZER)


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def test_every_word_is_one_token_and_the_marks_are_what_they_look_like():
    for index in (*WORDS.words[:40], *WORDS.keys[-5:], *WORDS.values[-5:]):
        text = TOKENIZER.decode([index])
        assert text.startswith(" ") and text[1:].isalpha() and len(text) > 3
        assert TOKENIZER.encode(text, add_special_tokens=False) == [index]
    assert TOKENIZER.decode([WORDS.equals, WORDS.newline]) == " =\n"
    assert len(set(WORDS.keys) | set(WORDS.values)) == KEYS + VALUES


@pytest.mark.parametrize("length", [1, 5, 20])
def test_copying_repeats_the_words(length):
    exercise = copying(WORDS, length, rng())
    words, repeated = exercise.ids[:length], exercise.ids[length + 1 : 2 * length + 1]
    assert (words == repeated).all()
    assert exercise.ids[length] == WORDS.equals and exercise.ids[-1] == WORDS.newline
    assert exercise.answers.sum() == length + 1 and exercise.answers[length + 1 :].all()


@pytest.mark.parametrize("pairs", [1, 2, 4, 8])
def test_every_answer_is_the_value_written_beside_its_key(pairs):
    for seed in range(50):
        exercise = key_value(WORDS, pairs, 2 * pairs, rng(seed))
        lines = exercise.ids[: 3 * pairs].reshape(pairs, 3)
        written = dict(lines[:, :2].tolist())
        assert len(written) == pairs and len(set(written.values())) == pairs
        asked = exercise.ids[3 * pairs + 2 :].reshape(2 * pairs, 3)
        assert all(written[key] == value for key, value, _ in asked.tolist())
        assert pairs == 1 or asked[0, 0] != lines[-1, 0]
        assert np.flatnonzero(exercise.answers).tolist() == [3 * pairs + 3 + 3 * i for i in range(2 * pairs)]


def test_the_last_pair_comes_first_only_where_allowed():
    firsts = set()
    for seed in range(60):
        exercise = key_value(WORDS, 3, 1, rng(seed), last_first=True)
        firsts.add(exercise.ids[:9:3].tolist().index(exercise.ids[11]))
    assert firsts == {0, 1, 2}


def test_the_stream_mixes_both_kinds_and_repeats_with_its_seed():
    first = [next(made).ids.tolist() for made in [stream(WORDS, 4)] for _ in range(40)]
    assert first == [next(made).ids.tolist() for made in [stream(WORDS, 4)] for _ in range(40)]
    assert first != [next(made).ids.tolist() for made in [stream(WORDS, 5)] for _ in range(40)]
    ends = [ids.index(WORDS.equals) + 1 for ids in first]
    kinds = {ids[end] == WORDS.newline for ids, end in zip(first, ends, strict=True)}
    assert kinds == {True, False}


def test_documents_read_back_as_the_same_tokens():
    texts = exercise_documents(TOKENIZER, 12, seed=9)
    made = stream(WORDS, 9)
    assert len(texts) == 12
    assert all(TOKENIZER.encode(text, add_special_tokens=False) == next(made).ids.tolist() for text in texts)


def test_a_tokenizer_without_words_is_refused():
    small = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    with pytest.raises(UnsupportedError, match="0 whole words"):
        Vocabulary.of(small)
