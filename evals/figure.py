"""The picture of the README: how far each layer's output moves when half of its weights are zeroed.

python evals/figure.py
"""

import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

import ssmcompress
from ssmcompress.events import Event, LayerDone

matplotlib.use("Agg")

OUT = Path(__file__).parent / "results" / "layer-error.png"
WAYS = {
    "WANDA 50 %": {"method": "wanda"},
    "WANDA 2:4": {"method": "wanda", "pattern": "2:4"},
    "SparseGPT 50 %": {"method": "sparsegpt"},
}
COLOURS = ("#1f6f8b", "#e07a3f", "#6a994e")


def main() -> None:
    """Prunes both reference checkpoints in each way and draws the errors the walk reports."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for panel, model in zip(panels, ("mamba", "mamba2"), strict=True):
        for (way, options), colour in zip(WAYS.items(), COLOURS, strict=True):
            errors = layer_errors(f"ref:{model}", options)
            panel.plot(range(len(errors)), errors, "o-", color=colour, label=way, linewidth=1.8, markersize=5)
        panel.set_title(f"ref:{model}", fontsize=11)
        panel.set_xlabel("block")
        panel.set_xticks(range(len(errors)))
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("relative change of the\nresidual stream after the block")
    panels[0].set_ylim(bottom=0)
    panels[1].legend(frameon=False, fontsize=9)
    OUT.parent.mkdir(exist_ok=True)
    figure.savefig(OUT, dpi=150)


def layer_errors(model: str, options: dict[str, str]) -> list[float]:
    """The relative error of every block, as `prune` reports it."""
    errors: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, LayerDone) and event.error is not None:
            errors.append(event.error)

    with tempfile.TemporaryDirectory() as work:
        ssmcompress.prune(model, out=Path(work) / "out", no_eval=True, emit=listen, **options)
    return errors


if __name__ == "__main__":
    main()
