"""What is written runs under lm-eval's stock Hugging Face model, without a network."""

import json

import pytest
import torch

import ssmcompress
from tests.flow.conftest import MODELS, WORDS

TASK = """
task: next_word
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with one multiple-choice task over eight lines."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"context": " ".join(WORDS[i : i + 5]), "choices": WORDS[i + 5 : i + 8], "label": i % 3} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "next_word.yaml").write_text(TASK.format(data=folder / "rows.jsonl", cache=folder / "cache"))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_lm_eval_runs_on_an_output(models, small, tasks, tmp_path, name):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    out = ssmcompress.prune(models[name], out=tmp_path / "out", **small).folder
    results = simple_evaluate(
        model="hf",
        model_args=f"pretrained={out},dtype=float32",
        tasks=["next_word"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        limit=4,
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    assert results["n-samples"]["next_word"]["effective"] == 4
    assert 0 <= results["results"]["next_word"]["acc,none"] <= 1
    checkpoint = ssmcompress.load(str(out))
    for sample in results["samples"]["next_word"]:
        for choice, (found, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            assert float(found) == pytest.approx(likelihood(checkpoint, sample["doc"]["context"], choice), rel=1e-3)


def likelihood(checkpoint, context, choice):
    """Log-likelihood of a choice after its context, with our own forward in float32."""
    tokenizer, model = checkpoint.tokenizer, checkpoint.model.float()
    start = tokenizer(context).input_ids
    ids = tokenizer(f"{context} {choice}").input_ids
    with torch.no_grad():
        logp = model(torch.tensor([ids[:-1]]), use_cache=False).logits.log_softmax(-1)[0]
    return sum(float(logp[i - 1, ids[i]]) for i in range(len(start), len(ids)))
