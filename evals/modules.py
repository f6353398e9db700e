"""Which projection a model can least do without: WANDA at 50 % and 75 % in one kind of module alone.

python -m evals.modules    kept in evals/results/modules.md (a quarter of an hour on one core)

Figures are those of the shipped test pages; nothing is chosen by them.
"""

from pathlib import Path

import torch

from ssmcompress.calib import data
from ssmcompress.checkpoint.source import load
from ssmcompress.events import Note, Terminal
from ssmcompress.measure.glance import Glance, glance
from ssmcompress.measure.perplexity import paired_difference
from ssmcompress.prune.apply import find_edits
from ssmcompress.steps import Prune

KEPT = Path(__file__).parent / "results" / "modules.md"
COLUMNS = ("model", "module", "share of the projections", "sparsity", "pages, against dense", "copy 20", "4 pairs")


def main() -> None:
    """Measures and keeps the table."""
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    with Terminal() as tell:
        for model in ("ref:mamba", "ref:mamba2"):
            for row in rows(model):
                tell(Note(" ".join(row)))
                lines.append(row)
    KEPT.write_text("\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n", encoding="utf-8")


def rows(model: str) -> list[tuple[str, ...]]:
    """A row for dense, and for each projection and sparsity."""
    checkpoint = load(model)
    arch, stored = checkpoint.arch, checkpoint.stored
    entries = {module: stored.shape(arch.weight(0, module)).numel() for module in arch.projections}
    dense = measured(model)
    found = [(model, "dense", "", "", f"{dense.bits_per_byte:.4f}", *_memory(dense))]
    for module in arch.projections:
        for sparsity in (0.5, 0.75):
            seen = measured(model, Prune(include=(module,), sparsity=sparsity))
            change, low, high = paired_difference(dense.likelihood.documents, seen.likelihood.documents)
            told = f"{change:+.4f} [{low:+.4f}, {high:+.4f}]"
            share = f"{entries[module] / sum(entries.values()):.1%}"
            found.append((model, module, share, f"{sparsity:.0%}", told, *_memory(seen)))
    return found


@torch.no_grad()
def measured(model: str, step: Prune | None = None) -> Glance:
    """Likelihood of the pages and memory of a checkpoint pruned in memory."""
    checkpoint = load(model, dtype=torch.float32)
    if step is not None:
        windows = data.windows(None, checkpoint.tokenizer, count=64, length=512, seed=0).ids
        find_edits(checkpoint.model, checkpoint.arch, step, windows)
    return glance(checkpoint.model, checkpoint.tokenizer)


def _memory(seen: Glance) -> tuple[str, ...]:
    return tuple(f"{probe.accuracy:.1%} ± {probe.standard_error:.1%}" for probe in seen.memory)


if __name__ == "__main__":
    main()
