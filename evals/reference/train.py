"""Trains one reference checkpoint: memory first, then text with a share of exercises; resumes where it was cut.

python evals/reference/train.py mamba2 --corpus BUILD --work DIR --minutes 80
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from curriculum import COPIED, LOOKED_UP, TEXT, Curriculum
from fast import TrainingBackend, VocabularyLoss
from torch import Tensor, nn
from transformers import AutoTokenizer, Mamba2Config, MambaConfig, PreTrainedModel

from ssmcompress import kernels
from ssmcompress.arch.mixer import use_backend
from ssmcompress.arch.registry import arch_for
from ssmcompress.measure.exercises import Vocabulary
from ssmcompress.measure.recall import copy_probe, key_value_probe

REPORT = 50  # steps between lines of the log
MEASURE = 500  # steps between measurements
SAVE_MINUTES = 3

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
    memory_minutes: float = 15.0  # at most: text begins as soon as the curriculum is finished
    memory_rate: float = 3e-3
    rate: float = 2.5e-3
    exercises: float = 0.12  # share of the rows once text has begun
    unfinished_exercises: float = 0.2  # the same while the curriculum is not finished
    first_shape: tuple[int, int] = (
        16,
        64,
    )  # rows, length while lists are short: few exercises a row, few stale bindings
    memory_shape: tuple[int, int] = (8, 128)
    shape: tuple[int, int] = (4, 512)
    muon_factor: float = 2.0  # of the rate
    warmup: int = 50
    weight_decay: float = 0.1
    seed: int = 0


@dataclass
class Progress:
    """How far a run has come: all that a resumption needs beside the weights and the optimiser."""

    step: int = 0
    minutes: float = 0.0
    text_from: float | None = None
    curriculum: Curriculum = field(default_factory=Curriculum)

    def advance(self, settings: Settings, seconds: float) -> None:
        """Counts one step and lets text begin when memory is learned or its time is up."""
        self.step += 1
        self.minutes += seconds / 60
        if self.text_from is None and (self.curriculum.finished or self.minutes >= settings.memory_minutes):
            self.text_from = self.minutes

    def rate(self, settings: Settings) -> float:
        """Warm-up, a constant rate while memory is taught, then a linear descent to zero at the last minute."""
        warm = min(1.0, (self.step + 1) / settings.warmup)
        if self.text_from is None:
            return settings.memory_rate * warm
        left = (settings.minutes - self.minutes) / (settings.minutes - self.text_from)
        return settings.rate * warm * max(left, 0.0)

    def shape(self, settings: Settings) -> tuple[int, int]:
        """Rows and length of the next batch."""
        if self.text_from is not None:
            return settings.shape
        return settings.first_shape if self.curriculum.levels[0] < 3 else settings.memory_shape

    def share(self, settings: Settings) -> float:
        """The share of rows that are exercises."""
        if self.text_from is None:
            return 1.0
        return settings.exercises if self.curriculum.finished else settings.unfinished_exercises


class Batches:
    """Rows of token ids and targets: text windows in a shuffled order, exercises packed end to end."""

    def __init__(self, settings: Settings, corpus: Path, tokenizer: object) -> None:
        self.settings = settings
        self.text = np.fromfile(corpus / "train.bin", dtype=np.uint16)
        self.vocabulary = Vocabulary.of(tokenizer)

    def at(self, progress: Progress) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, targets and kinds of answer [rows, length]; kind -1 is not scored.

        They depend on the seed and the progress alone, so that a resumed run sees what an uncut one would.
        """
        settings = self.settings
        rows, length = progress.shape(settings)
        made = [self._row(progress, progress.step * rows + row, length) for row in range(rows)]
        ids, kinds = (torch.from_numpy(np.stack(part)) for part in zip(*made, strict=True))
        return ids[:, :-1], ids[:, 1:], kinds[:, 1:]

    def _row(self, progress: Progress, index: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.Generator(np.random.PCG64([self.settings.seed, index]))
        if rng.random() < progress.share(self.settings):
            ids, kinds = progress.curriculum.row(self.vocabulary, length, rng)
            return ids, np.where(kinds == TEXT, -1, kinds)
        ids = self._text(index, length)
        return ids, np.full(len(ids), TEXT)

    def _text(self, index: int, length: int) -> np.ndarray:
        windows = (len(self.text) - 1) // length
        lap, place = divmod(index, windows)
        order = self._order(lap, windows)
        start = int(order[place]) * length
        return self.text[start : start + length + 1].astype(np.int64)

    @lru_cache(maxsize=2)  # noqa: B019
    def _order(self, lap: int, windows: int) -> np.ndarray:
        return np.random.Generator(np.random.PCG64([self.settings.seed, 7, lap])).permutation(windows)


def initialise(model: PreTrainedModel) -> None:
    """Unit-variance projections, and steps and decays that make a state readable from the start.

    The published initialisation writes to the state with steps of 0.001 to 0.1: its read-out then starts far below the
    skip path, and recall takes long to appear. Here steps are 0.05 to 0.5 and memories last 2 to 1,000 tokens.
    """
    config = model.config
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("out_proj.weight"):
                weight.div_(math.sqrt(config.num_hidden_layers))
            elif name.endswith(("in_proj.weight", "x_proj.weight")):
                weight.normal_(0, weight.shape[1] ** -0.5)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                step = torch.empty_like(weight).uniform_(math.log(0.05), math.log(0.5)).exp()
                weight.copy_(step + torch.log(-torch.expm1(-step)))
            elif name.endswith("A_log"):
                weight.copy_(torch.empty_like(weight).uniform_(math.log(0.02), 0))


class Optimiser:
    """AdamW; once text has begun the projections of the blocks are left to Muon (Jordan, 2024)."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.settings = settings
        named = dict(model.named_parameters())
        projections = [p for name, p in named.items() if name.endswith(("in_proj.weight", "out_proj.weight"))]
        matrices = [p for p in named.values() if p.dim() >= 2]
        others = [p for p in named.values() if p.dim() < 2]
        decay = settings.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self.muon = torch.optim.Muon(projections, weight_decay=decay, adjust_lr_fn="match_rms_adamw")

    def step(self, progress: Progress) -> None:
        """One step at the rate of this moment; gradients are gone afterwards."""
        rate = progress.rate(self.settings)
        for group in self.adam.param_groups:
            group["lr"] = rate
        if progress.text_from is not None:
            [group] = self.muon.param_groups
            group["lr"] = rate * self.settings.muon_factor
            for weight in group["params"]:
                if weight not in self.muon.state and weight in self.adam.state:
                    self.muon.state[weight]["momentum_buffer"] = self.adam.state[weight]["exp_avg"].clone()
            self.muon.step()
            for weight in group["params"]:
                weight.grad = None
        self.adam.step()
        self.adam.zero_grad()

    def state_dict(self) -> dict[str, object]:
        """The state of both."""
        return {"adam": self.adam.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Takes up the state of both."""
        self.adam.load_state_dict(state["adam"])
        if "muon" in state:
            self.muon.load_state_dict(state["muon"])


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


@torch.compiler.set_stance("force_eager")
def measure(model: nn.Module, batches: Batches, corpus: Path) -> dict[str, float]:
    """Validation bits per byte and the memory probes at a few loads, with seeds of their own."""
    model.eval()
    use_backend(model, kernels.AUTO)
    found = {"valid_bits_per_byte": bits_per_byte(model, corpus, "valid", 24)}
    found["copy_20"] = copy_probe(model, batches.vocabulary, 20, 64, seed=10_001).accuracy
    for pairs in (2, 4, 8):
        found[f"pairs_{pairs}"] = key_value_probe(model, batches.vocabulary, pairs, 128, seed=10_001).accuracy
    use_backend(model, TrainingBackend())
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
    use_backend(model, TrainingBackend())
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.compile(dynamic=False)
    optimiser = Optimiser(model, settings)
    progress = resume(work, model, optimiser)
    log = (work / "log.jsonl").open("a")
    saved, since, total = progress.minutes, progress.step, torch.zeros(())
    while progress.minutes < settings.minutes:
        started = time.perf_counter()
        total += update(model, optimiser, batches, progress)
        progress.advance(settings, time.perf_counter() - started)
        over = progress.minutes >= settings.minutes
        if progress.step % REPORT == 0 or over:
            entry = {"step": progress.step, "minutes": round(progress.minutes, 2)}
            entry |= {"loss": round(float(total) / (progress.step - since), 4), **asdict(progress.curriculum)}
            if progress.step % MEASURE == 0 or over:
                entry |= {k: round(v, 4) for k, v in measure(model, batches, corpus).items()}
            log.write(json.dumps(entry) + "\n")
            log.flush()
            since, total = progress.step, torch.zeros(())
        if progress.minutes - saved > SAVE_MINUTES or over:
            save(work, model, optimiser, progress)
            saved = progress.minutes
    (work / "settings.json").write_text(json.dumps(asdict(settings) | {"steps": progress.step}, indent=2) + "\n")


def update(model: nn.Module, optimiser: Optimiser, batches: Batches, progress: Progress) -> Tensor:
    """One optimiser step in bfloat16 autocast with float32 weights; returns the loss."""
    ids, targets, kinds = batches.at(progress)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.backbone(ids, use_cache=False).last_hidden_state
    scored = kinds >= 0
    kinds = kinds[scored]
    loss, right = VocabularyLoss.apply(hidden[scored], model.lm_head.weight, targets[scored], kinds > TEXT)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimiser.step(progress)
    for kind in (LOOKED_UP, COPIED):
        answers = right[kinds[kinds > TEXT] == kind]
        if len(answers):
            progress.curriculum.graded(kind, float(answers.float().mean()))
    return loss.detach()


def save(work: Path, model: nn.Module, optimiser: Optimiser, progress: Progress) -> None:
    """Writes everything a resumption needs, whole or not at all."""
    state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "progress": asdict(progress)}
    torch.save(state, work / "state.partial")
    (work / "state.partial").replace(work / "state.pt")


def resume(work: Path, model: nn.Module, optimiser: Optimiser) -> Progress:
    """Where to go on from: the start, where nothing was saved."""
    if not (work / "state.pt").exists():
        return Progress()
    state = torch.load(work / "state.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state.get("optimiser", state))
    kept = state["progress"]
    return Progress(**{**kept, "curriculum": Curriculum(**kept["curriculum"])})


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
