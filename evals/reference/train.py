"""Trains one reference checkpoint: memory first and from scratch, then text with a share of exercises; resumes where it was cut.

    python evals/reference/train.py mamba2 --corpus BUILD --work DIR --minutes 80
"""

import argparse
import json
import math
import time
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
class Stage:
    """A stretch of training: its share of exercises, their difficulty, and the shape of a batch."""

    until: float  # minutes since the start
    rows: int
    length: int
    exercises: float
    words: int = 512
    keys: int = 64
    longest: int = 24


@dataclass(frozen=True)
class Settings:
    """How one checkpoint is trained; minutes count only time spent training, over all resumptions."""

    family: str
    minutes: float
    memory_minutes: float = 14.0
    memory_rate: float = 2e-3
    rate: float = 3e-3
    exercises: float = 0.12
    warmup: int = 100
    weight_decay: float = 0.1
    seed: int = 0

    def stage(self, minutes: float) -> Stage:
        """Memory first, with few words and short lists, then with all; then text with a share of exercises."""
        stages = (
            Stage(0.6 * self.memory_minutes, 16, 64, 1.0, words=64, keys=16, longest=15),
            Stage(self.memory_minutes, 8, 128, 1.0),
            Stage(math.inf, 4, 512, self.exercises),
        )
        return next(stage for stage in stages if minutes < stage.until)


class Batches:
    """Rows of token ids and targets: text windows in a shuffled order, exercises packed end to end."""

    def __init__(self, settings: Settings, corpus: Path, tokenizer: object) -> None:
        self.settings = settings
        self.text = np.fromfile(corpus / "train.bin", dtype=np.uint16)
        self.vocabulary = Vocabulary.of(tokenizer)

    def at(self, step: int, stage: Stage) -> tuple[Tensor, Tensor]:
        """Ids and targets [rows, length] of a step: they depend on step and seed alone, so that a resumed run sees the same."""
        rows = [self._row(step * stage.rows + row, stage) for row in range(stage.rows)]
        ids, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return ids, targets

    def _row(self, index: int, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.Generator(np.random.PCG64([self.settings.seed, index]))
        if rng.random() < stage.exercises:
            return self._exercises(int(rng.integers(2**31)), stage)
        return self._text(index, stage.length)

    def _text(self, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        windows = (len(self.text) - 1) // length
        lap, place = divmod(index, windows)
        order = np.random.Generator(np.random.PCG64([self.settings.seed, 7, lap])).permutation(windows)
        start = int(order[place]) * length
        row = self.text[start : start + length + 1].astype(np.int64)
        return row[:-1], row[1:]

    def _exercises(self, seed: int, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        ids, answers = [0], [False]
        made = stream(self.vocabulary.narrowed(stage.words, stage.keys), seed, stage.longest)
        while len(ids) <= stage.length:
            exercise = next(made)
            ids += [*exercise.ids.tolist(), 0]
            answers += [*exercise.answers.tolist(), False]
        targets = np.where(answers, ids, -100)
        return np.array(ids[: stage.length]), targets[1 : stage.length + 1]


def initialise(model: PreTrainedModel) -> None:
    """Unit-variance projections, and steps and decays that make a state readable from the start.

    The published initialisation writes to the state with steps of 0.001 to 0.1: its read-out then starts a hundredfold below
    the skip path, and recall takes long to appear. Here steps are 0.05 to 0.5 and memories last 2 to 1,000 tokens.
    """
    config = model.config
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("in_proj.weight", "x_proj.weight")):
                weight.normal_(0, weight.shape[1] ** -0.5)
            elif name.endswith("out_proj.weight"):
                weight.div_(math.sqrt(config.num_hidden_layers))
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                step = torch.empty_like(weight).uniform_(math.log(0.05), math.log(0.5)).exp()
                weight.copy_(step + torch.log(-torch.expm1(-step)))
            elif name.endswith("A_log"):
                weight.copy_(torch.empty_like(weight).uniform_(math.log(0.02), 0))


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
        ids, targets = batches.at(step, settings.stage(minutes))
        total += update(model, adam, ids, targets, rate(settings, step, minutes))
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


def update(model: nn.Module, adam: torch.optim.Optimizer, ids: Tensor, targets: Tensor, rate: float) -> float:
    """One optimiser step in bfloat16 autocast with float32 weights; targets of -100 do not count."""
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
