"""What token reduction costs the reference checkpoints: every rule and control at 10, 20 and 30 % of the blocks' work.

python -m evals.tokens --data DIR    half an hour on two cores: it goes on where it was, in evals/results/tokens-*.json
python -m evals.tokens               writes the tables evals/results/tokens-*.md from what is kept

DIR holds gutenberg/, whose Jane Eyre is the validation text: the default rule is chosen on it, and on key-value items
apart from those that are reported. Of every window of 512 tokens the first 256 are the prompt, of which tokens leave,
and the others are scored.
"""

import argparse
import gzip
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evals.axes import documents
from ssmcompress.checkpoint.source import Checkpoint, load, special_ids
from ssmcompress.events import Emit, Note, Terminal
from ssmcompress.measure import text
from ssmcompress.measure.continuations import likelihoods
from ssmcompress.measure.exercises import Vocabulary
from ssmcompress.measure.perplexity import DocumentScore, paired_difference, perplexity
from ssmcompress.measure.recall import copy_probe, key_value_items, key_value_probe
from ssmcompress.policy import RULES
from ssmcompress.steps import ReduceTokens
from ssmcompress.tokens.schedule import resolved
from ssmcompress.tokens.selection import install

HERE = Path(__file__).parent
KEPT = HERE / "results"
LEVELS = (0.1, 0.2, 0.3)
CONTROL = "drop-earliest"
DENSE, LENGTH, CONTEXT, ITEMS, RESAMPLES = "dense", 512, 256, 500, 2000
VALIDATION = 1  # the seed of key-value items that nothing is reported on
COLUMNS = (
    "work saved",
    "rule",
    "novel",
    "8 pairs apart",
    "pages, against dense",
    "LAMBADA, nats",
    "pages, against drop-earliest",
    "LAMBADA, against drop-earliest",
    "LAMBADA right",
    "2 pairs",
    "4 pairs",
    "8 pairs",
    "asked early",
    "asked late",
    "copy 20",
)


def main() -> None:
    """Measures what is not measured yet where asked to, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["mamba", "mamba2"])
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    with Terminal() as tell:
        for model in options.models:
            path = KEPT / f"tokens-{model}.json"
            found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            if options.data:
                measure(model, path, found, documents(options.data), tell)
            (KEPT / f"tokens-{model}.md").write_text(table(model, found), encoding="utf-8")


def cases() -> Iterator[tuple[str, ReduceTokens | None, int]]:
    """Name, step and seed: dense, every rule at every level, the random one twice, and decay that is carried."""
    yield DENSE, None, 0
    for level in LEVELS:
        for rule in (rule for rule in RULES if rule != "pumer"):  # which is tome
            for seed in (0, 1) if rule == "random" else (0,):
                yield f"{level:.0%} {rule}{' again' * seed}", ReduceTokens(method=rule, flops=level), seed
        for rule in ("utrc", "tome", "stride"):
            yield f"{level:.0%} {rule}, decay carried", ReduceTokens(method=rule, flops=level, decay="carry"), 0


def measure(model: str, path: Path, found: dict[str, Any], novel: list[str], tell: Emit) -> None:
    """Measures what is not there yet, one case after the other."""
    checkpoint = load(f"ref:{model}", dtype=torch.float32)
    for name, step, seed in cases():
        each = found.setdefault(name, {})
        if PARTS.keys() <= each.keys():
            continue
        install(checkpoint.model, step and resolved(step, checkpoint.arch, special_ids(checkpoint), seed))
        for key, part in PARTS.items():
            if key not in each:
                each |= part(checkpoint, novel)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in found.items())
        path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        tell(Note(f"{model}, {name}: {each['novel']:.4f}"))


def text_figures(checkpoint: Checkpoint, novel: list[str]) -> dict[str, Any]:
    """Likelihood of the second halves of windows of the novel, and of pages."""
    how: dict[str, Any] = {"length": LENGTH, "context": CONTEXT}
    pages = perplexity(checkpoint.model, checkpoint.tokenizer, text.documents(), windows=1, **how)
    return {
        "novel": perplexity(checkpoint.model, checkpoint.tokenizer, novel, **how).bits_per_byte,
        "pages": pages.bits_per_byte,
        "documents": [asdict(each) for each in pages.documents],
    }


def lambada_figures(checkpoint: Checkpoint, novel: list[str]) -> dict[str, Any]:
    """Likelihood of LAMBADA's last words, and how many are right."""
    pairs = [[checkpoint.tokenizer(part)["input_ids"] for part in each] for each in lambada()]
    answers = sorted(likelihoods(checkpoint.model, pairs, batch=16, longest=2048))
    right = sum(hit for *_, hit in answers)
    return {"lambada": [round(nats, 5) for _, nats, _ in answers], "lambada_right": right}


def memory_figures(checkpoint: Checkpoint, novel: list[str]) -> dict[str, Any]:
    """Values found by key among so many pairs, and a copy."""
    words = Vocabulary.of(checkpoint.tokenizer)
    probes = [key_value_probe(checkpoint.model, words, pairs, 512, 0) for pairs in (2, 4, 8)]
    probes.append(copy_probe(checkpoint.model, words, 20, 128, 0))
    return {"recall": [(probe.accuracy, probe.standard_error, probe.measurable) for probe in probes]}


def distance_figures(checkpoint: Checkpoint, novel: list[str]) -> dict[str, Any]:
    """Of 8 pairs, values found by a key of the first four and of the others; of items apart, all together."""
    words = Vocabulary.of(checkpoint.tokenizer)
    ids = key_value_items(words, 8, 512, 0)
    place = (ids[:, 1:25:3] == ids[:, 27:28]).argmax(1)
    hits = np.array(key_value_probe(checkpoint.model, words, 8, 512, 0).hits)
    parts = [hits[place < 4], hits[place >= 4]]
    apart = key_value_probe(checkpoint.model, words, 8, 512, VALIDATION)
    told = [(float(part.mean()), float(part.std(ddof=1) / len(part) ** 0.5)) for part in parts]
    return {"distance": told, "apart": (apart.accuracy, apart.standard_error)}


PARTS = {"novel": text_figures, "lambada": lambada_figures, "recall": memory_figures, "distance": distance_figures}


def lambada() -> list[tuple[str, str]]:
    """Contexts and last words of the first passages."""
    with gzip.open(HERE / "data" / "lambada_openai.jsonl.gz", "rt", encoding="utf-8") as file:
        passages = [json.loads(line)["text"] for _, line in zip(range(ITEMS), file, strict=False)]
    return [(context, f" {word}") for context, _, word in (passage.rpartition(" ") for passage in passages)]


def table(model: str, found: dict[str, Any]) -> str:
    """Markdown: dense first, then each level."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [row(name, found) for name, _, _ in cases() if name in found]
    return f"### ref:{model}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    """Cells of one case; changes are paired, with 95 % intervals: to dense, and to the control of the same level."""
    level, _, rule = name.partition(" ")
    each, dense = found[name], found[DENSE]
    two, four, eight, copied = ((accuracy, error) for accuracy, error, _ in each["recall"])
    memory = tuple(_percent(*figure) for figure in (each["apart"], two, four, eight, *each["distance"], copied))
    right = f"{each['lambada_right'] / len(each['lambada']):.1%}"
    if name == DENSE:
        bits, nats = (f"{each['pages']:.4f}", f"{np.mean(each['lambada']):.3f}")
        return ("", DENSE, f"{each['novel']:.4f}", memory[0], bits, nats, "", "", right, *memory[1:])
    control = found.get(f"{level} {CONTROL}")
    apart = ("", "") if control is None or rule == CONTROL else _change(control, each)
    return (level, rule, f"{each['novel']:.4f}", memory[0], *_change(dense, each), *apart, right, *memory[1:])


def _change(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, str]:
    """Of bits per byte of the pages, and of the log-likelihood of LAMBADA."""
    pages = ([DocumentScore(**score) for score in side["documents"]] for side in (old, new))
    told = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*paired_difference(*pages))
    return told, _paired(old["lambada"], new["lambada"])


def _percent(accuracy: float, error: float) -> str:
    return f"{accuracy:.1%} ± {error:.1%}"


def _paired(old: list[float], new: list[float]) -> str:
    """Mean difference of log-likelihoods, with its bootstrap interval over passages."""
    change = np.array(new) - np.array(old)
    draws = np.random.Generator(np.random.PCG64(0)).integers(len(change), size=(RESAMPLES, len(change)))
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(change.mean(), *np.percentile(change[draws].mean(1), [2.5, 97.5]))


if __name__ == "__main__":
    main()
