"""lm-eval on our model: the figures of plain lm-eval, prompts of its own tasks, and every failure told."""

import copy
import json
import math
from pathlib import Path

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from ssmcompress.checkpoint.source import load
from ssmcompress.errors import InputError, ResourceError
from ssmcompress.evaluate import harness as module
from ssmcompress.evaluate.harness import Harness, Model
from ssmcompress.evaluate.suites import TASKS, Entry, shipped
from ssmcompress.events import Advance, Phase, ignore

OWN = {
    "lambada_openai_local": "lambada/lambada_openai.yaml",
    "arc_easy_local": "arc/arc_easy.yaml",
    "arc_challenge_local": "arc/arc_challenge.yaml",
    "openbookqa_local": "openbookqa/openbookqa.yaml",
    "wikitext_local": "wikitext/wikitext.yaml",
}
GENERATE = """
task: write_on
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
  cache_dir: {cache}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 24
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
PROMPTS = ("The", "Once upon a time there was a man who", "In the", "Chapter 2. It was the best of all the days that")


@pytest.fixture(scope="module")
def local():
    """The shipped tasks, as lm-eval loads them."""
    return TaskManager(include_path=str(shipped(TASKS)), include_defaults=False).load(list(OWN))["tasks"]


@pytest.fixture(scope="module")
def checkpoints():
    """Both shipped checkpoints in float32."""
    return {name: load(f"ref:{name}", dtype=torch.float32) for name in ("mamba", "mamba2")}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with one generation task over prompts of several lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"text": text, "target": "no"} for text in PROMPTS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "write_on.yaml").write_text(GENERATE.format(data=folder / "rows.jsonl", cache=folder / "cache"))
    return folder


@pytest.mark.parametrize("name", OWN)
def test_the_shipped_tasks_ask_what_those_of_lm_eval_ask(local, name):
    ours = local[name]
    folder = Path(lm_eval.__file__).parent / "tasks"
    config = load_yaml(folder / OWN[name], resolve_func=True, recursive=True)
    dataset = ours.dataset
    config |= {"custom_dataset": lambda **_: dataset, "tag": None}
    for split in ("training_split", "validation_split", "test_split"):
        if config.get(split) not in dataset:
            config.pop(split, None)
    theirs = ConfigurableTask(config=config)
    rng = np.random.default_rng(3)
    docs = list(ours.eval_docs)
    for doc in docs[:: len(docs) // 60]:
        assert ours.doc_to_text(doc) == theirs.doc_to_text(doc)
        assert ours.doc_to_target(doc) == theirs.doc_to_target(doc)
        if ours.OUTPUT_TYPE == "multiple_choice":
            assert ours.doc_to_choice(doc) == theirs.doc_to_choice(doc)
        requests = [task.construct_requests(doc, task.doc_to_text(doc)) for task in (ours, theirs)]
        asked = [[each.args for each in (found if isinstance(found, list) else [found])] for found in requests]
        assert asked[0] == asked[1]
        answers: list = [(-float(rng.uniform(1, 99)), bool(rng.integers(2))) for _ in asked[0]]
        if ours.OUTPUT_TYPE == "loglikelihood_rolling":
            answers = [likelihood for likelihood, _ in answers]
        assert ours.process_results(doc, copy.copy(answers)) == theirs.process_results(doc, copy.copy(answers))
    assert ours.aggregation() == theirs.aggregation()
    assert ours.higher_is_better() == theirs.higher_is_better()


def plain(model, names, limit, batch_size):
    """The results of lm-eval with its stock Hugging Face model."""
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": model, "dtype": "float32"},
        tasks=list(names),
        task_manager=TaskManager(include_path=str(shipped(TASKS)), include_defaults=False),
        limit=limit,
        device="cpu",
        batch_size=batch_size,
        bootstrap_iters=0,
    )
    return {(name, key): value for name in names for key, value in found["results"][name].items() if ",none" in key}


@pytest.mark.parametrize(("name", "batch_size"), [("mamba", 8), ("mamba2", 8), ("mamba2", 1)])
def test_the_figures_are_those_of_plain_lm_eval(checkpoints, tmp_path, name, batch_size):
    names = [task for task in OWN if task != "wikitext_local"]
    checkpoint = checkpoints[name]
    expected = plain(str(checkpoint.source.folder), names, 6, batch_size)
    expected |= plain(str(checkpoint.source.folder), ["wikitext_local"], 1, batch_size)
    tasks = Harness(list(OWN))
    found = {}
    for task in OWN:
        entry = Entry(task=task, limit=1 if task == "wikitext_local" else 6)
        scored = tasks.run(checkpoint, entry, tmp_path / task, batch_size=batch_size, seed=0, emit=ignore)
        found |= {(task, f"{score.metric},none"): score.value for score in scored.scores}
    assert found == pytest.approx({key: value for key, value in expected.items() if "_stderr" not in key[1]}, rel=1e-5)
    accuracies = {key for key in found if key[1].startswith("acc")}
    assert len(accuracies) == 7 and all(found[key] == expected[key] for key in accuracies)


def test_examples_in_the_prompt_are_those_of_plain_lm_eval(checkpoints, tmp_path):
    checkpoint = checkpoints["mamba2"]
    entry = Entry(task="arc_easy_local", limit=5, num_fewshot=2)
    scored = Harness([entry.task]).run(checkpoint, entry, tmp_path / "out", batch_size=4, seed=0, emit=ignore)
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(checkpoint.source.folder), "dtype": "float32"},
        tasks=[entry.task],
        task_manager=TaskManager(include_path=str(shipped(TASKS)), include_defaults=False),
        num_fewshot=2,
        limit=5,
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    expected = [sample["prompt_hash"] for sample in found["samples"][entry.task]]
    (path,) = (tmp_path / "out").rglob("samples_*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["prompt_hash"] for row in rows] == expected
    assert all(row["arguments"]["gen_args_0"]["arg_0"].count("Question:") == 3 for row in rows)
    for score in scored.scores:
        assert score.value == found["results"][entry.task][f"{score.metric},none"] and score.num_fewshot == 2


def test_the_items_of_a_measure_give_its_figure(checkpoints, tmp_path):
    tasks = Harness(["lambada_openai_local", "wikitext_local", "arc_easy_local"])
    run = {"batch_size": 4, "seed": 0, "emit": ignore}
    kinds = {}
    for task, limit in (("lambada_openai_local", 5), ("wikitext_local", 2), ("arc_easy_local", 5)):
        scored = tasks.run(checkpoints["mamba"], Entry(task=task, limit=limit), tmp_path / task, **run)
        for score in scored.scores:
            measure = f"{task}/{score.metric}"
            items = [item for item in scored.items if item.measure == measure]
            assert len(items) == score.samples == limit
            mean = sum(item.value for item in items) / sum(item.weight for item in items)
            figure = math.exp(mean) if measure.endswith("perplexity") else mean
            assert figure == pytest.approx(score.value, rel=1e-9)
            kinds[measure] = items[0].kind
            assert score.chance == (pytest.approx(0.25) if task == "arc_easy_local" else None)
    assert {name for name, kind in kinds.items() if kind == "accuracy"} == {
        "lambada_openai_local/acc",
        "arc_easy_local/acc",
        "arc_easy_local/acc_norm",
    }


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_padding_on_either_side_gives_the_same_likelihoods(checkpoints, name):
    checkpoint = checkpoints[name]
    rows = [checkpoint.tokenizer(text)["input_ids"] for text in PROMPTS]
    width = max(map(len, rows))
    for side in ("left", "right"):
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            held = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[i, held], mask[i, held] = torch.tensor(row), 1
        with torch.no_grad():
            logp = checkpoint.model(ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
            for i, row in enumerate(rows):
                held = slice(width - len(row), width) if side == "left" else slice(0, len(row))
                alone = checkpoint.model(torch.tensor([row]), use_cache=False).logits.log_softmax(-1)[0]
                assert torch.allclose(logp[i, held], alone, rtol=1e-4, atol=1e-4), side


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_a_padded_batch_writes_what_each_prompt_writes_alone(checkpoints, written, tmp_path, name):
    tasks, answers = Harness(["write_on"], written), []
    for batch_size in (1, 4):
        place = tmp_path / str(batch_size)
        tasks.run(checkpoints[name], Entry(task="write_on"), place, batch_size=batch_size, seed=0, emit=ignore)
        (path,) = place.rglob("samples_*.jsonl")
        answers.append([json.loads(line)["resps"][0][0] for line in path.read_text().splitlines()])
    assert answers[0] == answers[1]
    assert all("e" not in answer for answer in answers[0]) and any(answers[0])


def test_progress_is_told_and_nothing_else(checkpoints, tmp_path, capfd):
    events = []
    tasks = Harness(["arc_easy_local", "lambada_openai_local"])
    for task in ("arc_easy_local", "lambada_openai_local"):
        run = {"batch_size": 2, "seed": 0, "emit": events.append}
        tasks.run(checkpoints["mamba2"], Entry(task=task, limit=3), tmp_path / task, **run)
    assert capfd.readouterr() == ("", "")
    phases = [event for event in events if isinstance(event, Phase)]
    assert [(event.name, event.total) for event in phases] == [("arc_easy_local", 12), ("lambada_openai_local", 3)]
    assert sum(event.done for event in events if isinstance(event, Advance)) == 15
    assert len(events) == 17


def test_an_unknown_task_is_refused_with_what_may_have_been_meant():
    with pytest.raises(InputError, match="no task 'arc_esy_local'") as caught:
        Harness(["arc_esy_local"])
    assert "arc_easy_local" in caught.value.hint


def test_a_task_whose_data_cannot_be_fetched_is_refused():
    with pytest.raises(InputError, match=r"arc_easy cannot be fetched") as caught:
        Harness(["arc_easy"])
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_a_task_that_is_wrong_is_refused(tmp_path):
    (tmp_path / "odd.yaml").write_text("task: odd\ndataset_path: json\noutput_type: guessing\n")
    with pytest.raises(InputError, match="The task odd cannot be loaded"):
        Harness(["odd"], tmp_path)
    with pytest.raises(InputError, match="no folder"):
        Harness(["odd"], tmp_path / "nowhere")


OWN_CODE = """
task: own
custom_dataset: !function code.documents
output_type: loglikelihood
test_split: test
doc_to_text: "The"
doc_to_target: " x"
process_results: !function code.{function}
metric_list:
  - metric: ppl
    aggregation: perplexity
    higher_is_better: false
"""
CODE = """
from datasets import Dataset

def documents(**_):
    return {"test": Dataset.from_list([{"text": str(i)} for i in range(2)])}

def right(doc, results):
    return {"ppl": results[0][0]}

def wrong(doc, results):
    return {"ppl": doc["answer"]}
"""


@pytest.mark.parametrize("function", ["right", "wrong"])
def test_a_mistake_in_the_code_of_a_task_is_the_tasks(checkpoints, tmp_path, function):
    (tmp_path / "own.yaml").write_text(OWN_CODE.format(function=function))
    (tmp_path / "code.py").write_text(CODE)
    tasks = Harness(["own"], tmp_path)
    assert tasks.measures == {"own": ("own/ppl",)}
    run = {"batch_size": 2, "seed": 0, "emit": ignore}
    if function == "right":
        assert tasks.run(checkpoints["mamba"], Entry(task="own"), tmp_path / "out", **run).scores[0].metric == "ppl"
        return
    with pytest.raises(InputError, match="The task own fails in code of its own: KeyError: 'answer'"):
        tasks.run(checkpoints["mamba"], Entry(task="own"), tmp_path / "out", **run)


def test_a_mistake_of_ours_is_no_tasks(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "answered", lambda *_: {}["ours"])
    run = {"batch_size": 2, "seed": 0, "emit": ignore}
    with pytest.raises(KeyError, match="ours"):
        Harness(["arc_easy_local"]).run(checkpoints["mamba"], Entry(task="arc_easy_local", limit=1), tmp_path, **run)


GROUP = """
group: {name}
task: [{tasks}]
aggregate_metric_list:
  - metric: acc
    weight_by_size: true
"""


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """A folder of groups of shipped tasks, one of them over the other, and a tag."""
    folder = tmp_path_factory.mktemp("groups")
    for name, tasks in (("both", "arc_easy_local, openbookqa_local"), ("all", "both, lambada_openai_local")):
        (folder / f"{name}.yaml").write_text(GROUP.format(name=name, tasks=tasks))
    (folder / "again.yaml").write_text(GROUP.format(name="again", tasks="both, arc_easy_local"))
    return folder


@pytest.mark.parametrize("names", [("both", "arc_easy_local"), ("both", "all")])
def test_a_task_beside_its_group_is_refused(groups, names):
    assert set(Harness(["both"], groups).measures) == {"arc_easy_local", "openbookqa_local"}
    with pytest.raises(InputError, match=f"The task {names[1]} measures again what another one does"):
        Harness(names, groups)


@pytest.mark.parametrize("name", ["all", "again"])
def test_a_group_of_shipped_tasks_scores_each_item_of_its_tasks_once(checkpoints, groups, tmp_path, name):
    run = {"batch_size": 4, "seed": 0, "emit": ignore}
    tasks = Harness([name], groups)
    found = tasks.run(checkpoints["mamba2"], Entry(task=name, limit=3), tmp_path / "out", **run)
    assert {score.measure for score in found.scores} == {each for names in tasks.measures.values() for each in names}
    assert len({score.measure for score in found.scores}) == len(found.scores)
    for task in tasks.measures:
        alone = Harness([task]).run(checkpoints["mamba2"], Entry(task=task, limit=3), tmp_path / task, **run)
        assert [score for score in found.scores if score.task == task] == list(alone.scores)
        assert [item for item in found.items if item.measure.startswith(f"{task}/")] == list(alone.items)


def overflowing():
    """A checkpoint of finite weights whose logits are NaN."""
    checkpoint = load("ref:mamba", dtype=torch.float32)
    with torch.no_grad():
        checkpoint.model.backbone.layers[1].mixer.out_proj.weight.fill_(3e38)
    return checkpoint


@pytest.mark.parametrize("task", ["arc_easy_local", "lambada_openai_local", "write_on"])
def test_a_model_that_gives_nan_has_no_score(written, tmp_path, task):
    with pytest.raises(InputError, match="NaN") as caught:
        run = {"batch_size": 2, "seed": 0, "emit": ignore}
        Harness([task], written).run(overflowing(), Entry(task=task, limit=2), tmp_path / "out", **run)
    assert task in caught.value.message


@pytest.mark.parametrize("lost", ["save_results_aggregated", "save_results_samples"])
def test_files_that_lm_eval_did_not_write_are_missed(checkpoints, tmp_path, monkeypatch, lost):
    monkeypatch.setattr(EvaluationTracker, lost, lambda *_, **__: None)
    with pytest.raises(ResourceError, match="could not write"):
        run = {"batch_size": 2, "seed": 0, "emit": ignore}
        Harness(["arc_easy_local"]).run(
            checkpoints["mamba"], Entry(task="arc_easy_local", limit=2), tmp_path / "out", **run
        )


def test_what_lm_eval_swallows_on_a_full_disk_is_told(checkpoints, tmp_path, monkeypatch):
    write = Path.write_text

    def full(path, *args, **kwargs):
        if path.name.startswith("results_"):
            raise OSError(28, "No space left on device", str(path))
        return write(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResourceError, match="No space left") as caught:
        run = {"batch_size": 2, "seed": 0, "emit": ignore}
        Harness(["arc_easy_local"]).run(
            checkpoints["mamba"], Entry(task="arc_easy_local", limit=2), tmp_path / "out", **run
        )
    assert caught.value.exit_code == 4


def test_the_seeds_are_those_of_lm_eval_by_default():
    assert set(module.seeds(0).values()) == {0, 1234}
    assert issubclass(Model, module.HFLM)
