"""summary.json: the figures of one evaluation, typed and versioned, with what they were measured on."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ssmcompress.checkpoint.manifest import describe, versions
from ssmcompress.checkpoint.source import Checkpoint, state_dict
from ssmcompress.measure.perplexity import Perplexity
from ssmcompress.measure.recall import Recall

NAME = "summary.json"
DOCUMENTS = "documents.jsonl"


class Summary(BaseModel):
    """Figures of a checkpoint; bytes are those of the weights as stored and of one sequence's recurrent state."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    model: str
    model_sha256: dict[str, str]
    versions: dict[str, str]
    backend: dict[str, str]
    dtype: str
    seed: int
    params: int
    weight_bytes: int
    state_bytes: int
    text: str | None = None
    text_sha256: str | None = None
    length: int | None = None
    bits_per_byte: float | None = None
    bits_per_byte_interval: tuple[float, float] | None = None
    perplexity: float | None = None
    perplexity_interval: tuple[float, float] | None = None
    recall: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        likelihood: Perplexity | None,
        memory: list[Recall] | None,
        *,
        text: str | None,
        **fields: Any,
    ) -> "Summary":
        """The summary of what was measured."""
        source, weights = describe(checkpoint.source), checkpoint.stored
        if likelihood is not None:
            fields |= {
                "text": Path(text or "").name,
                "text_sha256": _identity(likelihood),
                "length": likelihood.length,
                "bits_per_byte": likelihood.bits_per_byte,
                "bits_per_byte_interval": likelihood.bits_per_byte_interval,
                "perplexity": likelihood.perplexity,
                "perplexity_interval": likelihood.perplexity_interval,
            }
        return cls(
            model=source.name,
            model_sha256=source.sha256,
            versions=versions(),
            params=sum(tensor.numel() for tensor in state_dict(checkpoint.model).values()),
            weight_bytes=sum(weights.shape(name).numel() * weights.dtype(name).itemsize for name in weights),
            state_bytes=checkpoint.arch.state_bytes(),
            recall=tuple(probe.to_dict() for probe in memory or ()),
            **fields,
        )

    def write(self, folder: Path, likelihood: Perplexity | None) -> None:
        """Writes summary.json, and one line for each document for paired tests."""
        (folder / NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        if likelihood is not None:
            rows = (json.dumps(vars(document)) + "\n" for document in likelihood.documents)
            (folder / DOCUMENTS).write_text("".join(rows), encoding="utf-8")


def _identity(likelihood: Perplexity) -> str:
    """A hash that is equal where the same documents were read by the same tokenizer."""
    sizes = json.dumps([(d.sha256, d.tokens, d.bytes) for d in likelihood.documents])
    return hashlib.sha256(sizes.encode()).hexdigest()
