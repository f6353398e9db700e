"""How a model does on a task: its completions of the test prompts, judged as the task's authors do."""

from collections.abc import Sequence

from ssmcompress.checkpoint.source import Checkpoint
from ssmcompress.events import Emit
from ssmcompress.measure.continuations import likelihoods
from ssmcompress.measure.metrics import Figure, likeness, plain, right
from ssmcompress.measure.writing import written
from ssmcompress.tune.examples import pairs
from ssmcompress.tune.tasks import TASKS
from ssmcompress.tuning import TuneState

BATCH = 32


def judged(checkpoint: Checkpoint, step: TuneState, emit: Emit) -> list[Figure]:
    """The metrics of a task on its test prompts; none without a task and a test."""
    if step.task is None or step.test is None:
        return []
    task, references = TASKS[step.task], dict[str, list[str]]()
    for prompt, completion in pairs(step.test, step, step.limit):
        references.setdefault(prompt, []).append(completion.strip())
    asked = list(references)
    answers = [references[prompt] for prompt in asked]
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in asked]
    if task.judged == "label":
        chosen = _likeliest(
            checkpoint, ids, [tokenizer(label, add_special_tokens=False)["input_ids"] for label in task.labels]
        )
        return [right([task.labels[best].strip() in each for best, each in zip(chosen, answers, strict=True)])]
    texts = written(checkpoint.model, tokenizer, ids, most=task.tokens, batch=BATCH, emit=emit)
    if task.judged == "query":
        hits = [plain(text) in map(plain, each) for text, each in zip(texts, answers, strict=True)]
        return [right(hits, "exact match")]
    return likeness(texts, answers)


def _likeliest(checkpoint: Checkpoint, prompts: Sequence[list[int]], labels: Sequence[list[int]]) -> list[int]:
    """Which of the labels is likeliest after each prompt."""
    pairs = [(prompt, label) for prompt in prompts for label in labels]
    longest = max(len(prompt) for prompt in prompts) + max(map(len, labels))
    nats = [0.0] * len(pairs)
    for i, value, _ in likelihoods(checkpoint.model, pairs, batch=BATCH, longest=longest):
        nats[i] = value
    rows = (nats[start : start + len(labels)] for start in range(0, len(nats), len(labels)))
    return [row.index(max(row)) for row in rows]
