"""What pruning costs the shipped checkpoints: something, and a pattern more than free choice."""

import pytest

import ssmcompress
from ssmcompress.measure import text
from ssmcompress.measure.perplexity import paired_difference, perplexity
from tests.flow.conftest import SHIPPED

METHODS = {"wanda": {}, "2:4": {"pattern": "2:4"}}


@pytest.fixture(scope="module", params=SHIPPED)
def scores(request, tmp_path_factory):
    """Scores of the documents, dense and by method."""
    root = tmp_path_factory.mktemp("quality")
    folders = {"dense": request.param}
    for name, options in METHODS.items():
        options = options | {"windows": 16, "length": 192, "no_eval": True}
        folders[name] = str(ssmcompress.prune(request.param, out=root / name.replace(":", "-"), **options).folder)
    found = {}
    for name, folder in folders.items():
        checkpoint = ssmcompress.load(folder, dtype="auto")
        documents = text.documents("default", 40)
        found[name] = perplexity(checkpoint.model.float(), checkpoint.tokenizer, documents, length=192, windows=1)
    return found


@pytest.mark.parametrize(("better", "worse"), [("dense", "wanda"), ("wanda", "2:4")])
def test_the_order_of_methods_is_beyond_doubt(scores, better, worse):
    difference, low, high = paired_difference(scores[better].documents, scores[worse].documents)
    assert 0 < low <= difference <= high, (difference, low, high)
