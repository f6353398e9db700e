"""What pruning costs the shipped checkpoints: WANDA less than magnitude, and a pattern more than free choice."""

import pytest

import ssmcompress
from ssmcompress.measure import text
from ssmcompress.measure.perplexity import paired_difference, perplexity
from tests.flow.conftest import SHIPPED

METHODS = {"magnitude": {"method": "magnitude"}, "wanda": {}, "2:4": {"pattern": "2:4"}}


@pytest.fixture(scope="module", params=SHIPPED)
def scores(request, tmp_path_factory):
    """Scores of the documents, dense and by method."""
    root = tmp_path_factory.mktemp("quality")
    folders = {"dense": request.param}
    for name, options in METHODS.items():
        out = root / name.replace(":", "-")
        folders[name] = str(ssmcompress.prune(request.param, out=out, no_eval=True, **options).folder)
    found = {}
    for name, folder in folders.items():
        checkpoint = ssmcompress.load(folder, dtype="auto")
        found[name] = perplexity(checkpoint.model.float(), checkpoint.tokenizer, text.documents(), windows=1)
    return found


@pytest.mark.parametrize(("better", "worse"), [("dense", "wanda"), ("wanda", "magnitude"), ("wanda", "2:4")])
def test_the_order_of_methods_is_beyond_doubt(scores, better, worse):
    difference, low, high = paired_difference(scores[better].documents, scores[worse].documents)
    assert 0 < low <= difference <= high, (difference, low, high)
