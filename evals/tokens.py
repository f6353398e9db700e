"""What token reduction costs the reference checkpoints: every rule and control at 10, 20 and 30 % of the blocks' work.

python -m evals.tokens --data DIR    half an hour on two cores: it goes on where it was, in evals/results/tokens-*.json
python -m evals.tokens               writes the tables evals/results/tokens-*.md from what is kept

DIR holds gutenberg/, whose Jane Eyre is the validation text: the default rule is chosen on it. Of every window of 512
tokens the first 256 are the prompt, of which tokens leave, and the others are scored.
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
from ssmcompress.evaluate.continuations import likelihoods
from ssmcompress.events import Emit, Note, Terminal
from ssmcompress.measure import text
from ssmcompress.measure.exercises import Vocabulary
from ssmcompress.measure.perplexity import DocumentScore, paired_difference, perplexity
from ssmcompress.measure.recall import copy_probe, key_value_probe
from ssmcompress.policy import RULES
from ssmcompress.steps import ReduceTokens
from ssmcompress.tokens.schedule import resolved
from ssmcompress.tokens.selection import install

HERE = Path(__file__).parent
KEPT = HERE / "results"
LEVELS = (0.1, 0.2, 0.3)
DENSE, LENGTH, CONTEXT, ITEMS, RESAMPLES = "dense", 512, 256, 500, 2000
COLUMNS = (
    "work saved",
    "rule",
    "novel",
    "pages, against dense",
    "LAMBADA, nats",
    "2 pairs",
    "4 pairs",
    "8 pairs",
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
        for rule in RULES:
            for seed in (0, 1) if rule == "random" else (0,):
                yield f"{level:.0%} {rule}{' again' * seed}", ReduceTokens(method=rule, flops=level), seed
        for rule in ("utrc", "tome", "stride"):
            yield f"{level:.0%} {rule}, decay carried", ReduceTokens(method=rule, flops=level, decay="carry"), 0


def measure(model: str, path: Path, found: dict[str, Any], novel: list[str], tell: Emit) -> None:
    """Measures the cases that are not there yet, one after the other."""
    checkpoint = load(f"ref:{model}", dtype=torch.float32)
    for name, step, seed in cases():
        if name in found:
            continue
        arch = checkpoint.arch
        install(checkpoint.model, step and resolved(step, arch, special_ids(checkpoint), seed))
        found[name] = figures(checkpoint, novel)
        lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(each)}" for key, each in found.items())
        path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        tell(Note(f"{model}, {name}: {found[name]['novel']:.4f}"))


def figures(checkpoint: Checkpoint, novel: list[str]) -> dict[str, Any]:
    """Likelihood of the second halves of windows of novel and pages, of LAMBADA's last words, and memory."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    how: dict[str, Any] = {"length": LENGTH, "context": CONTEXT}
    words = Vocabulary.of(tokenizer)
    probes = [key_value_probe(model, words, pairs, 512, 0) for pairs in (2, 4, 8)]
    probes.append(copy_probe(model, words, 20, 128, 0))
    pages = perplexity(model, tokenizer, text.documents(), windows=1, **how)
    pairs = [[tokenizer(part)["input_ids"] for part in each] for each in lambada()]
    answers = sorted(likelihoods(model, pairs, batch=16, longest=2048))
    return {
        "novel": perplexity(model, tokenizer, novel, **how).bits_per_byte,
        "pages": pages.bits_per_byte,
        "documents": [asdict(each) for each in pages.documents],
        "lambada": [round(nats, 5) for _, nats, _ in answers],
        "lambada_right": sum(right for *_, right in answers),
        "recall": [(probe.accuracy, probe.standard_error, probe.measurable) for probe in probes],
    }


def lambada() -> list[tuple[str, str]]:
    """Contexts and last words of the first passages."""
    with gzip.open(HERE / "data" / "lambada_openai.jsonl.gz", "rt", encoding="utf-8") as file:
        passages = [json.loads(line)["text"] for _, line in zip(range(ITEMS), file, strict=False)]
    return [(context, f" {word}") for context, _, word in (passage.rpartition(" ") for passage in passages)]


def table(model: str, found: dict[str, Any]) -> str:
    """Markdown: dense first, then each level."""
    rows = [COLUMNS, ("---",) * len(COLUMNS)]
    rows += [row(name, found[name], found[DENSE]) for name, _, _ in cases() if name in found]
    return f"### ref:{model}\n\n" + "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n"


def row(name: str, each: dict[str, Any], dense: dict[str, Any]) -> tuple[str, ...]:
    """Cells of one case; changes are paired with dense, with 95 % intervals."""
    level, _, rule = name.partition(" ")
    memory = tuple(f"{accuracy:.1%} ± {error:.1%}" for accuracy, error, _ in each["recall"])
    if name == DENSE:
        return ("", DENSE, f"{each['novel']:.4f}", f"{each['pages']:.4f}", f"{np.mean(each['lambada']):.3f}", *memory)
    old, new = ([DocumentScore(**score) for score in side["documents"]] for side in (dense, each))
    told = "{:+.4f} [{:+.4f}, {:+.4f}]".format(*paired_difference(old, new))
    return (level, rule, f"{each['novel']:.4f}", told, _paired(dense["lambada"], each["lambada"]), *memory)


def _paired(old: list[float], new: list[float]) -> str:
    """Mean difference of log-likelihoods, with its bootstrap interval over passages."""
    change = np.array(new) - np.array(old)
    draws = np.random.Generator(np.random.PCG64(0)).integers(len(change), size=(RESAMPLES, len(change)))
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(change.mean(), *np.percentile(change[draws].mean(1), [2.5, 97.5]))


if __name__ == "__main__":
    main()
