"""Folders as `prune` and `eval --out` write them, with figures that are made up."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ssmcompress.checkpoint import manifest
from ssmcompress.evaluate.results import Item, Summary

LEAST: dict[str, Any] = {
    "versions": {"ssmcompress": "0.1.0", "torch": "2.13.0", "lm_eval": "0.4.13"},
    "backend": {"conv": "native"},
    "dtype": "torch.float32",
    "seed": 7,
    "params": 12_345_678,
    "weight_bytes": 24_691_356,
    "state_bytes": 4_096,
}
DOCUMENTS = 40


def weights_of(folder: Path) -> dict[str, str]:
    """The hashes of a model folder's weights, as an evaluation records them."""
    return {"model.safetensors": manifest.read(folder).files["model.safetensors"]}


def source_of(folder: Path) -> dict[str, str]:
    """The hashes of the weights that a model folder was made from."""
    return manifest.read(folder).source.sha256


def evaluation(
    folder: Path, weights: dict[str, str], label: str, *, loss: float = 0.0, accuracy: float = 0.8, **fields: Any
) -> Path:
    """An evaluation with a text, a probe and a task; `loss` in bits per byte, `accuracy` of the task."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(900, 1100, DOCUMENTS)
    bits = sizes * (1.75 + 0.1 * rng.standard_normal(DOCUMENTS) + loss)
    right = np.arange(50) < round(50 * accuracy)
    items = [
        Item(measure="text/bits_per_byte", kind="log_likelihood", item=f"d{i}", value=bits[i], weight=sizes[i])
        for i in range(DOCUMENTS)
    ]
    items += [
        Item(measure="arc_easy_local/acc", kind="accuracy", item=f"q{i}", value=float(hit), weight=1)
        for i, hit in enumerate(right)
    ]
    value = float(bits.sum() / sizes.sum())
    told = LEAST | {
        "model": label,
        "label": label,
        "model_sha256": weights,
        "text": "default",
        "text_sha256": "7e" * 32,
        "length": 512,
        "bits_per_byte": value,
        "bits_per_byte_interval": (value - 0.04, value + 0.04),
        "recall": (probe(0.925), probe(1.0, load=4, kind="key-value", chance=0.25)),
        "tasks": (task(accuracy),),
    }
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(Summary(**(told | fields)).model_dump_json())
    (folder / "samples.jsonl").write_text("".join(f"{item.model_dump_json(exclude_none=True)}\n" for item in items))
    return folder


def probe(accuracy: float, *, load: int = 20, kind: str = "copy", chance: float = 0.002) -> dict[str, Any]:
    """A memory probe of 64 items."""
    error = 0.0 if accuracy == 1 else 0.013
    held = {"accuracy": accuracy, "standard_error": error, "chance": chance, "log_probability": -0.3}
    return {"probe": kind, "load": load, "items": 64, "items_sha256": f"{kind}{load}", "measurable": True} | held


def task(accuracy: float) -> dict[str, Any]:
    """A multiple-choice score of 50 items."""
    error = (accuracy * (1 - accuracy) / 49) ** 0.5
    said = {"task": "arc_easy_local", "metric": "acc", "filter": "none", "value": accuracy, "standard_error": error}
    count = {"samples": 50, "samples_sha256": "ab" * 32, "version": "1.0", "num_fewshot": 0, "chance": 0.25}
    return said | count | {"higher_is_better": True, "measurable": accuracy > 0.6}


def look(bits: float, copied: float) -> dict[str, Any]:
    """What `prune` measures on its way."""
    rows = [{"nats": 700.0 * bits + i, "tokens": 300, "bytes": 1000, "sha256": f"p{i}"} for i in range(8)]
    value = sum(row["nats"] for row in rows) / 8000 / np.log(2)
    held = {"bits_per_byte": value, "bits_per_byte_interval": (value - 0.05, value + 0.05), "perplexity": 60.0}
    return held | {"length": 512, "documents": rows, "recall": [probe(copied)]}


def measured(folder: Path, before: float = 1.6, after: float = 1.7) -> None:
    """Gives a model folder the figures of its run."""
    said = {"before": look(before, 0.97), "after": look(after, 0.55), "change": 0.1, "interval": (0.09, 0.11)}
    (folder / "measured.json").write_text(json.dumps(said))
