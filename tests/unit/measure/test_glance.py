"""What a run prints of its cost: intervals that hold at 100 %, and changes of accuracies in points."""

from ssmcompress.events import Table
from ssmcompress.measure.exercises import Vocabulary
from ssmcompress.measure.glance import Glance, tell_change
from ssmcompress.measure.perplexity import perplexity
from ssmcompress.measure.recall import copy_probe
from tests.unit.measure.fakes import TOKENIZER, Forgetful, Seer


def look(model):
    likelihood = perplexity(Seer(9.0), TOKENIZER, ["one text", "another text"], length=16)
    return Glance(likelihood, (copy_probe(model, Vocabulary.of(TOKENIZER), 6, 64, 3),))


def test_the_table_before_and_after():
    before, after = look(Seer(9.0)), look(Forgetful(9.0))
    events = []
    tell_change(before, after, events.append)
    (row,) = [row for event in events if isinstance(event, Table) for row in event.rows if "copying" in row[0]]
    low, high = before.memory[0].interval
    assert high == 1 and 0.9 < low < 0.95  # Wilson's for 64 of 64
    assert row[1] == f"100.0% [{low:.1%}, 100.0%]"
    lost = 100 * (after.memory[0].accuracy - 1)
    assert -100 < lost < 0 and row[3] == f"{lost:+.1f} points"
