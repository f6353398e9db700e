"""What a tuning run leaves beside the adapter: what was learned from what, how it went, and a card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from huggingface_hub import ModelCardData
from pydantic import BaseModel, ConfigDict, ValidationError

from ssmcompress.checkpoint.manifest import SourceRecord
from ssmcompress.checkpoint.output import TUNING
from ssmcompress.measure.metrics import Figure
from ssmcompress.measure.perplexity import DocumentScore, Perplexity, paired_difference, summarise
from ssmcompress.tune.examples import Example
from ssmcompress.tune.fit import Course
from ssmcompress.tuning import TuneState

MEASURED = "measured.json"


class Tuning(BaseModel):
    """`tuning.json`: the same run writes the same bytes, so it holds no times and no paths."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    base: SourceRecord
    method: str
    trainable: int
    parameters: int
    layers: tuple[int, ...]
    tensors: dict[str, tuple[int, ...]]
    examples: dict[str, int]
    recipe_sha256: str
    seed: int
    difference: float
    best_step: int
    versions: dict[str, str]

    @property
    def share(self) -> float:
        """Of the model's parameters, how many are learned."""
        return self.trainable / self.parameters


@dataclass(frozen=True)
class Scored:
    """Likelihood of one side's examples, and which completions the model would write itself."""

    likelihood: Perplexity
    right: tuple[bool, ...]

    @classmethod
    def of(cls, examples: Sequence[Example], found: Sequence[tuple[float, bool]], length: int, seed: int) -> "Scored":
        """The figures of examples from their scores."""
        documents = [
            DocumentScore(-nats, each.scored, each.bytes, each.sha256)
            for each, (nats, _) in zip(examples, found, strict=True)
        ]
        return cls(summarise(documents, length, seed), tuple(greedy for _, greedy in found))


@dataclass(frozen=True)
class Change:
    """The examples of a split under the model as it was, and with the adapter; how it does on the task, if on one."""

    split: str
    before: Scored
    after: Scored
    figures: Sequence[Figure] = ()

    @property
    def difference(self) -> tuple[float, float, float]:
        """Of bits per byte, with its paired 95 % interval."""
        return paired_difference(self.before.likelihood.documents, self.after.likelihood.documents)

    def rows(self) -> tuple[tuple[str, str, str, str], ...]:
        """What is told of it: measure, before, after, change."""
        old, new = self.before.likelihood, self.after.likelihood
        right = [sum(each.right) / len(each.right) for each in (self.before, self.after)]
        return (
            (
                "bits per byte",
                f"{old.bits_per_byte:.4f}",
                f"{new.bits_per_byte:.4f}",
                "{:+.4f} [{:+.4f}, {:+.4f}]".format(*self.difference),
            ),
            ("token perplexity", f"{old.perplexity:.2f}", f"{new.perplexity:.2f}", ""),
            (
                "whole completions right",
                f"{right[0]:.1%}",
                f"{right[1]:.1%}",
                f"{100 * (right[1] - right[0]):+.1f} points",
            ),
        )


def read(folder: Path) -> Tuning | None:
    """What a folder says of its adapter; None where it says nothing, or nothing that this version knows."""
    try:
        return Tuning.model_validate_json((folder / TUNING).read_bytes())
    except (OSError, ValidationError):
        return None


def write(folder: Path, tuning: Tuning, course: Course, change: Change, recipe: str) -> None:
    """Writes record, figures and card into the folder that holds the adapter."""
    (folder / TUNING).write_text(tuning.model_dump_json(indent=2) + "\n", encoding="utf-8")
    low, high = change.difference[1:]
    told: dict[str, Any] = {
        "split": change.split,
        "before": _scored(change.before),
        "after": _scored(change.after),
        "change": change.difference[0],
        "interval": (low, high),
        "figures": [asdict(figure) for figure in change.figures],
        "loss": course.loss,
        "validation": course.validation,
        "seconds_per_step": median(course.seconds) if course.seconds else None,
    }
    (folder / MEASURED).write_text(json.dumps(told) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(tuning, change, recipe), encoding="utf-8")


def said(step: TuneState, **rest: Any) -> dict[str, Any]:
    """The run as a recipe's keys: what is given beside the step, and the step."""
    return {**rest, "steps": [step.model_dump(mode="json")]}


def _scored(scored: Scored) -> Mapping[str, Any]:
    return asdict(scored.likelihood) | {"right": scored.right}


def _card(tuning: Tuning, change: Change, recipe: str) -> str:
    plain = tuning.method == "lora"
    meta = ModelCardData(
        base_model=tuning.base.name.partition("@")[0] if tuning.base.revision else None,
        library_name="peft" if plain else "ssmcompress",
        pipeline_tag="text-generation",
        tags=["ssmcompress", "state-space-model", "adapter", tuning.method],
    )
    table = "\n".join("| " + " | ".join(row) + " |" for row in (("", "before", "after", "change"), *change.rows()))
    figures = "".join(f"\n- {each.name}: {each.value:.1f} [{each.low:.1f}, {each.high:.1f}]" for each in change.figures)
    table = table.replace("\n", "\n| --- | --- | --- | --- |\n", 1)
    loads = (
        "Plain PEFT reads it too, but puts it only into models whose mixers call every projection."
        if plain
        else f"Its peft_type, {tuning.method.upper().replace('-', '_')}, is ssmcompress's own: plain PEFT knows none."
    )
    learned = (
        f"{tuning.trainable:,} parameters ({tuning.share:.3%} of the model's {tuning.parameters:,}) in"
        f" {len(tuning.layers)} layers, learned by ssmcompress from {tuning.examples['train']:,} examples: the state of"
        f" step {tuning.best_step}, which was best on {tuning.examples['valid']:,} validation examples."
    )
    count = len(change.before.right)
    return f"""---
{meta.to_yaml().strip()}
---

# {tuning.method} for {tuning.base.name}

{learned}

## Measured

On {count:,} {change.split} examples, on the completions alone; changes with their paired 95 % interval.

{table}
{figures}

## Loading

```python
import ssmcompress

checkpoint = ssmcompress.load("{tuning.base.name}", adapter="FOLDER")
```

{loads}

## Recipe

```yaml
{recipe.strip()}
```
"""
