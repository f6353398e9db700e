"""Trains one reference checkpoint: memory first and from scratch, then text with a share of exercises; resumes where it was cut.

    python evals/reference/train.py mamba2 --corpus BUILD --work DIR --minutes 80
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, Mamba2Config, MambaConfig, PreTrainedModel

from ssmcompress.arch.registry import arch_for
from ssmcompress.measure.exercises import Vocabulary, stream
from ssmcompress.measure.recall import copy_probe, key_value_probe

SHARED = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
CONFIGS = {
    "mamba": MambaConfig(**SHARED, state_size=16),
    "mamba2": Mamba2Config(**SHARED, num_heads=8, head_dim=64, state_size=64, n_groups=1, chunk_size=64),
}


@dataclass(frozen=True)
class Settings:
    """How one checkpoint is trained; minutes count only time spent training, over all resumptions."""

    family: str
    minutes: float
    memory_minutes: float = 8.0
    memory_rate: float = 4e-3
    rate: float = 3e-3
    exercises: float = 0.12
    rows: int = 4
    length: int = 512
    warmup: int = 100
    weight_decay: float = 0.1
    seed: int = 0


class Batches:
    """Rows of token ids and targets: text windows in a shuffled order, exercises packed end to end."""

    def __init__(self, settings: Settings, corpus: Path, tokenizer: object) -> None:
        self.settings = settings
        self.text = np.fromfile(corpus / "train.bin", dtype=np.uint16)
        self.vocabulary = Vocabulary.of(tokenizer)

    def row(self, index: int, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Row number `index` of the run: it depends on the index and the seed alone, so that a resumed run sees the same."""
        rng = np.random.Generator(np.random.PCG64([self.settings.seed, index]))
        if rng.random() < share:
            return self._exercises(int(rng.integers(2**31)))
        return self._text(index)

    def _text(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        length = self.settings.length
        windows = (len(self.text) - 1) // length
        lap, place = divmod(index, windows)
        order = np.random.Generator(np.random.PCG64([self.settings.seed, 7, lap])).permutation(windows)
        start = int(order[place]) * length
        row = self.text[start : start + length + 1].astype(np.int64)
        return row[:-1], row[1:]

    def _exercises(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        length, ids, answers = self.settings.length, [0], [False]
        made = stream(self.vocabulary, seed)
        while len(ids) <= length:
            exercise = next(made)
            ids += [*exercise.ids.tolist(), 0]
            answers += [*exercise.answers.tolist(), False]
        target = np.where(answers, ids, -100)
        return np.array(ids[:length]), target[1 : length + 1]


def initialise(model: PreTrainedModel) -> None:
    """Residual projections scaled down by depth; Mamba-2 decays spread over 1 … 16 (Mamba-2, §9)."""
    config = model.config
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("out_proj.weight"):
                weight.div_(math.sqrt(config.num_hidden_layers))
            if name.endswith("A_log") and config.model_type == "mamba2":
                weight.copy_(torch.empty_like(weight).uniform_(1, 16).log())


def optimiser(model: nn.Module, settings: Settings) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.dim() >= 2 and not getattr(p, "_no_weight_decay", False)]
    kept = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in kept]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), fused=True)


def rate(settings: Settings, step: int, minutes: float) -> float:
    """Warm-up, a constant rate while memory is taught, then a linear descent to zero at the last minute."""
    warm = min(1.0, (step + 1) / settings.warmup)
    if minutes < settings.memory_minutes:
        return settings.memory_rate * warm
    left = (settings.minutes - minutes) / (settings.minutes - settings.memory_minutes)
    return settings.rate * warm * max(left, 0.0)


@torch.no_grad()
def bits_per_byte(model: nn.Module, corpus: Path, split: str, windows: int) -> float:
    """Bits per byte of the first windows of a split, 512 tokens each, the first token of a window not scored."""
    ids = torch.from_numpy(np.fromfile(corpus / f"{split}.bin", dtype=np.uint16).astype(np.int64))
    record = json.loads((corpus / "corpus.json").read_text())[split]
    rows = ids[: len(ids) // 512 * 512].view(-1, 512)[:windows]
    nats, count = 0.0, 0
    for part in rows.split(8):
        logits = model(part, use_cache=False).logits[:, :-1]
        nats += float(nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
        count += part[:, 1:].numel()
    return nats / count / math.log(2) * record["tokens"] / record["bytes"]


def measure(model: nn.Module, batches: Batches, corpus: Path) -> dict[str, float]:
    """Validation bits per byte and the memory probes at a few loads, with seeds of their own."""
    model.eval()
    found = {"valid_bits_per_byte": bits_per_byte(model, corpus, "valid", 24)}
    found["copy_20"] = copy_probe(model, batches.vocabulary, 20, 64, seed=10_001).accuracy
    for pairs in (2, 4, 8):
        found[f"pairs_{pairs}"] = key_value_probe(model, batches.vocabulary, pairs, 128, seed=10_001).accuracy
    model.train()
    return found


def train(settings: Settings, corpus: Path, work: Path) -> None:
    """Runs until the minutes are used up; state.pt lets a cut run go on, log.jsonl tells its story."""
    torch.set_num_threads(1)
    torch.manual_seed(settings.seed)
    work.mkdir(parents=True, exist_ok=True)
    batches = Batches(settings, corpus, AutoTokenizer.from_pretrained(corpus / "tokenizer"))
    model = arch_for(CONFIGS[settings.family]).build("cpu").train()
    initialise(model)
    adam = optimiser(model, settings)
    step, minutes = resume(work, model, adam)
    log = (work / "log.jsonl").open("a")
    total, seen, saved = 0.0, 0, minutes
    while minutes < settings.minutes:
        started = time.perf_counter()
        share = 1.0 if minutes < settings.memory_minutes else settings.exercises
        total += update(model, adam, batches, step, share, rate(settings, step, minutes))
        seen, step = seen + 1, step + 1
        minutes += (time.perf_counter() - started) / 60
        if step % 250 == 0 or minutes >= settings.minutes:
            entry = {"step": step, "minutes": round(minutes, 2), "loss": round(total / seen, 4)}
            entry |= {k: round(v, 4) for k, v in measure(model, batches, corpus).items()}
            log.write(json.dumps(entry) + "\n")
            log.flush()
            total, seen = 0.0, 0
        if minutes - saved > 3 or minutes >= settings.minutes:
            save(work, model, adam, step, minutes)
            saved = minutes
    (work / "settings.json").write_text(json.dumps(asdict(settings) | {"steps": step}, indent=2) + "\n")


def update(
    model: nn.Module, adam: torch.optim.Optimizer, batches: Batches, step: int, share: float, rate: float
) -> float:
    """One optimiser step in bfloat16 autocast with float32 weights."""
    rows = batches.settings.rows
    ids, targets = (torch.from_numpy(np.stack(part)) for part in zip(*_rows(batches, step, rows, share), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.backbone(ids, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[targets != -100])
    loss: Tensor = nn.functional.cross_entropy(logits.float(), targets[targets != -100])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in adam.param_groups:
        group["lr"] = rate
    adam.step()
    adam.zero_grad()
    return float(loss.detach())


def _rows(batches: Batches, step: int, rows: int, share: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    return (batches.row(step * rows + row, share) for row in range(rows))


def save(work: Path, model: nn.Module, adam: torch.optim.Optimizer, step: int, minutes: float) -> None:
    """Writes everything a resumption needs, whole or not at all."""
    state = {"model": model.state_dict(), "adam": adam.state_dict(), "step": step, "minutes": minutes}
    torch.save(state, work / "state.partial")
    (work / "state.partial").replace(work / "state.pt")


def resume(work: Path, model: nn.Module, adam: torch.optim.Optimizer) -> tuple[int, float]:
    """Step and minutes to go on from: zero where nothing was saved."""
    if not (work / "state.pt").exists():
        return 0, 0.0
    state = torch.load(work / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    adam.load_state_dict(state["adam"])
    return state["step"], state["minutes"]


def main() -> None:
    """Reads the options and trains."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", choices=list(CONFIGS))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--memory-minutes", type=float, default=Settings.memory_minutes)
    parser.add_argument("--rate", type=float, default=Settings.rate)
    parser.add_argument("--memory-rate", type=float, default=Settings.memory_rate)
    options = vars(parser.parse_args())
    corpus, work = options.pop("corpus"), options.pop("work")
    train(Settings(**options), corpus, work)


if __name__ == "__main__":
    main()
