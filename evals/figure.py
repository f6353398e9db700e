"""The picture of the README: how far each layer's output moves when half of its weights are zeroed.

python evals/figure.py
"""

import tempfile
from pathlib import Path

import ssmcompress
from ssmcompress.events import Event, LayerDone
from ssmcompress.report import figures

OUT = Path(__file__).parent / "results" / "layer-error.svg"
WAYS = {
    "WANDA 50 %": {"method": "wanda"},
    "WANDA 2:4": {"method": "wanda", "pattern": "2:4"},
    "SparseGPT 50 %": {"method": "sparsegpt"},
}
DESCRIBED = "Relative change of the residual stream after each layer"


def main() -> None:
    """Prunes both reference checkpoints in each way and draws the errors the walk reports, on one scale."""
    names = [(way, i) for i, way in enumerate(WAYS, 1)]
    found = {
        model: [(way, i, layer_errors(model, WAYS[way])) for way, i in names] for model in ("ref:mamba", "ref:mamba2")
    }
    reach = max(max(errors.values()) for series in found.values() for *_, errors in series)
    panels = {model: figures.lines(series, f"{DESCRIBED} of {model}", reach=reach) for model, series in found.items()}
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(figures.standalone(panels, names, DESCRIBED), encoding="utf-8")


def layer_errors(model: str, options: dict[str, str]) -> dict[int, float]:
    """The relative error of every layer, as `prune` reports it."""
    errors: dict[int, float] = {}

    def listen(event: Event) -> None:
        if isinstance(event, LayerDone) and event.error is not None:
            errors[event.layer] = event.error

    with tempfile.TemporaryDirectory() as work:
        ssmcompress.prune(model, out=Path(work) / "out", no_eval=True, emit=listen, **options)
    return errors


if __name__ == "__main__":
    main()
