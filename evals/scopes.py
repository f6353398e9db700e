"""Where scores should compete: WANDA at 50 % by row and by tensor, module by module, on the validation novel.

python evals/scopes.py --data DIR    kept in evals/results/scopes.md (a quarter of an hour on one core)

DIR holds gutenberg/, whose Jane Eyre was kept out of training and is no test text either.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from evals.reference.corpus import VALIDATION_NOVELS, novel
from ssmcompress.calib import data
from ssmcompress.checkpoint.source import load
from ssmcompress.events import Note, Terminal
from ssmcompress.measure.perplexity import Perplexity, paired_difference, perplexity
from ssmcompress.prune.apply import find_edits
from ssmcompress.steps import Prune

HERE = Path(__file__).parent
PARTS, CHARACTERS = 40, 6000  # of the novel, spread evenly
COLUMNS = ("model", "compared over the whole tensor", "bits per byte", "against magnitude, paired 95 %")


def main() -> None:
    """Measures and keeps the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    text = novel(parser.parse_args().data, VALIDATION_NOVELS[0])
    starts = range(0, len(text) - CHARACTERS, len(text) // PARTS)
    documents = [text[start : start + CHARACTERS] for start in starts]
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    with Terminal() as tell:
        for model in ("ref:mamba", "ref:mamba2"):
            for row in rows(model, documents):
                tell(Note(" ".join(row)))
                lines.append(row)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    (HERE / "results" / "scopes.md").write_text(table + "\n", encoding="utf-8")


def rows(model: str, documents: list[str]) -> list[tuple[str, ...]]:
    """A row for magnitude, and for WANDA by row but for none, each, and all of the modules."""
    modules = load(model).arch.projections
    magnitude = measured(model, documents, "magnitude", {})
    found = [(model, "magnitude", f"{magnitude.bits_per_byte:.4f}", "")]
    for whole in ((), *((module,) for module in modules), modules):
        scopes = {module: "tensor" if module in whole else "row" for module in modules}
        score = measured(model, documents, "wanda", scopes)
        change, low, high = paired_difference(magnitude.documents, score.documents)
        told = f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"
        name = "all" if len(whole) == len(modules) else ", ".join(whole) or "none"
        found.append((model, f"WANDA: {name}", f"{score.bits_per_byte:.4f}", told))
    return found


@torch.no_grad()
def measured(model: str, documents: list[str], method: str, scopes: Mapping[str, str]) -> Perplexity:
    """The likelihood of the novel under a checkpoint pruned in memory."""
    checkpoint = load(model, dtype=torch.float32)
    windows = data.windows(None, checkpoint.tokenizer, count=64, length=512, seed=0).ids
    step = Prune.model_validate({"method": method, "scope": dict(scopes) or None})
    find_edits(checkpoint.model, checkpoint.arch, step, windows)
    return perplexity(checkpoint.model, checkpoint.tokenizer, documents)


if __name__ == "__main__":
    main()
