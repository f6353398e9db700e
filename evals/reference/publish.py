"""Writes a trained state as a checkpoint that stock transformers loads, and measures it from disk.

python evals/reference/publish.py mamba2 --corpus BUILD --work DIR [--data DIR]
"""

import argparse
import hashlib
import json
import shutil
from pathlib import Path

import torch
from corpus import HELD_OUT_NOVELS, novel
from safetensors.torch import save_file
from train import CONFIGS
from transformers import AutoTokenizer, GenerationConfig

from ssmcompress.arch.registry import arch_for
from ssmcompress.checkpoint.source import load
from ssmcompress.measure import text
from ssmcompress.measure.perplexity import Perplexity, perplexity
from ssmcompress.measure.recall import Recall, recall

SHIPPED = Path(__file__).parents[2] / "ssmcompress" / "reference"
KEPT_WIDE = ("A_log", "D", "dt_bias")  # float32 on disk: small, and what the decays hang on
NAMES = {"mamba": "Mamba-1", "mamba2": "Mamba-2"}


def main() -> None:
    """Reads the options, publishes and measures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=list(CONFIGS))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="also score the held-out novels whole")
    parser.add_argument("--items", type=int, default=512, help="of each memory probe")
    parser.add_argument("--limit", type=int, help="documents of each shipped text to score")
    options = parser.parse_args()
    folder = SHIPPED / options.family
    write(options.family, options.corpus, options.work, folder)
    record = {"training": training(options.work), "sizes": sizes(folder), "measured": measured(folder, options)}
    logs = Path(__file__).parent / options.family
    logs.mkdir(exist_ok=True)
    shutil.copy(options.work / "log.jsonl", logs / "log.jsonl")
    shutil.copy(options.corpus / "corpus.json", Path(__file__).parent / "corpus.json")
    (logs / "figures.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(card(options.family, record))


def write(family: str, corpus: Path, work: Path, folder: Path) -> None:
    """The folder of a checkpoint: bfloat16 weights but for the state's dynamics, config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    state = torch.load(work / "state.pt", weights_only=True)["model"]
    state.pop("lm_head.weight")  # tied to the embeddings
    kept = {
        name: tensor.contiguous() if name.rsplit(".", 1)[-1] in KEPT_WIDE else tensor.to(torch.bfloat16).contiguous()
        for name, tensor in state.items()
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = CONFIGS[family]
    config.architectures = [arch_for(config).model_class.__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=0).save_pretrained(folder)
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(folder)


def training(work: Path) -> dict[str, object]:
    """How long the state was trained, and on what schedule."""
    progress = torch.load(work / "state.pt", weights_only=True)["progress"]
    settings = work / "settings.json"
    return progress | ({"settings": json.loads(settings.read_text())} if settings.exists() else {})


def sizes(folder: Path) -> dict[str, object]:
    """Parameters, bytes and hash of the weights."""
    weights = folder / "model.safetensors"
    parameters = sum(p.numel() for p in load(str(folder)).model.parameters())
    return {
        "parameters": parameters,
        "bytes": weights.stat().st_size,
        "sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }


def measured(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Bits per byte of the held-out texts and the memory probes, in float32, from disk."""
    checkpoint = load(str(folder), dtype=torch.float32)
    texts = {name: text.documents(name, options.limit) for name in ("wikipedia", "novels")}
    if options.data:
        texts |= {name: [novel(options.data, name)] for name in HELD_OUT_NOVELS}
    scores = {name: perplexity(checkpoint.model, checkpoint.tokenizer, texts[name]) for name in texts}
    probes = recall(checkpoint.model, checkpoint.tokenizer, items=options.items)
    return {"likelihood": {k: _figures(v) for k, v in scores.items()}, "memory": [probe.to_dict() for probe in probes]}


def _figures(score: Perplexity) -> dict[str, object]:
    kept = ("bits_per_byte", "bits_per_byte_interval", "perplexity", "perplexity_interval", "length")
    values = score.to_dict()
    return {key: values[key] for key in kept} | {"documents": len(score.documents)}


CARD = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# ref:{family}

A small {name} language model of {millions:.2f} million parameters, trained for ssmcompress: what its demo, tests and
regression baselines compress. It knows some English prose, mostly of the nineteenth century, and has a memory that can
be measured. It is too small to be useful for anything else.

| text, kept out of training | bits per byte | token perplexity |
|---|---|---|
{likelihood}

| memory | accuracy | standard error | chance | measurable |
|---|---|---|---|---|
{memory}

`ssmcompress eval ref:{family} --perplexity wikipedia --recall` and `--perplexity novels` print the figures of the
shipped texts and of memory, `evals/reference/publish.py` those of the whole novels. Computed in float32 from the
stored weights. Windows of 512 tokens, each read after one end-of-text token; every byte is scored; 95 % bootstrap
intervals over documents.

Copying: greedy token accuracy on the second half of a random word sequence. Key-value: the right value ranks first
among those in context; the key asked for is never the last. The exercises of training had this form and other seeds.

Trained for {minutes:.0f} minutes on one CPU core ({steps:,} steps): memory exercises first, then novels, WikiText-2,
C4, TinyStories and a few training questions of benchmarks, with a share of exercises. `evals/reference/README.md` has
the scripts, data hashes and log. Weights are bfloat16 but for `A_log`, `D` and `dt_bias`, which are float32; load
with `dtype=torch.float32` to compute as measured. Its training text is old fiction and web text, prejudices included.
"""


def card(family: str, record: dict) -> str:
    """The model card, with the figures just measured."""
    measured, progress = record["measured"], record["training"]
    memory = [Recall(**{k: v for k, v in probe.items() if k != "measurable"}) for probe in measured["memory"]]
    return CARD.format(
        family=family,
        name=NAMES[family],
        millions=record["sizes"]["parameters"] / 1e6,
        likelihood="\n".join(_text_row(name, score) for name, score in measured["likelihood"].items()),
        memory="\n".join(_row(probe) for probe in memory),
        minutes=progress["minutes"],
        steps=progress["step"],
    )


def _text_row(name: str, score: dict) -> str:
    held = score["bits_per_byte_interval"] if score["documents"] > 1 else None
    interval = f" ({held[0]:.3f} to {held[1]:.3f})" if held else ""
    title = name.rsplit("_", 1)[0].replace("-", " ") + ", whole" if name in HELD_OUT_NOVELS else f"shipped `{name}`"
    return f"| {title} | {score['bits_per_byte']:.3f}{interval} | {score['perplexity']:.2f} |"


def _row(probe: Recall) -> str:
    load = f"{probe.load} words" if probe.probe == "copy" else f"{probe.load} pairs"
    figures = f"{probe.accuracy:.3f} | {probe.standard_error:.3f} | {probe.chance:.3f}"
    return f"| {probe.probe}, {load} | {figures} | {'yes' if probe.measurable else 'no'} |"


if __name__ == "__main__":
    main()
