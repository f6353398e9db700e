"""Evaluation folders as `eval --out` writes them, of made-up scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ssmcompress.evaluate.results import Summary, TaskScore

LEAST = {
    "model": "m",
    "model_sha256": {},
    "versions": {},
    "backend": {},
    "dtype": "torch.float32",
    "seed": 0,
    "params": 1,
    "weight_bytes": 4,
    "state_bytes": 0,
}


def results(
    folder: Path,
    values: Mapping[str, np.ndarray],
    *,
    weights: Mapping[str, np.ndarray] | None = None,
    chance: float | None = 0.25,
    items: str = "item",
    order: np.ndarray | None = None,
    task: Mapping[str, Any] | None = None,
    **summary: Any,
) -> str:
    """Writes a folder with these scores an item by measure, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tasks = [_task(name, row, {"chance": chance} | dict(task or {})) for name, row in values.items() if "acc" in name]
    written = Summary(**LEAST | {"label": folder.name} | summary, tasks=tuple(tasks))
    (folder / "summary.json").write_text(written.model_dump_json())
    lines = []
    for name, row in values.items():
        kind = "log_likelihood" if name.endswith(("perplexity", "bits_per_byte")) else "accuracy"
        weight = (weights or {}).get(name, np.ones(len(row)))
        for i in range(len(row)) if order is None else order:
            item = f"{items}-{name}-{i}"
            told = {"measure": name, "kind": kind, "item": item, "value": float(row[i]), "weight": float(weight[i])}
            lines.append(json.dumps(told))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def _task(name: str, row: np.ndarray, fields: Mapping[str, Any]) -> TaskScore:
    task, _, metric = name.partition("/")
    told = {"filter": "none", "higher_is_better": True, "samples_sha256": "0", "version": "1", "num_fewshot": 0}
    scored = {"task": task, "metric": metric, "value": float(row.mean()), "samples": len(row)}
    return TaskScore(**told | scored | dict(fields))
