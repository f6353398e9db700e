"""The training run: transformers' Trainer on what a method learns, which goes on where a killed run was."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging

from ssmcompress import parallel
from ssmcompress.errors import BackendError, InputError, SsmcompressError
from ssmcompress.events import Advance, Emit, Note, Phase
from ssmcompress.measure.continuations import likelihoods
from ssmcompress.tune.examples import Example, order
from ssmcompress.tune.objective import IGNORED, Objective
from ssmcompress.tuning import TuneState

LEARNED, WHOLE, RUNS = "learned.safetensors", "whole", "runs"
LOSS = "eval_loss"
CURVE = 50  # points of the curve of the loss


@dataclass
class Course:
    """How a run went: (step, loss) of training and of validation in nats a token, and seconds of each update."""

    loss: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    best: int = 0
    seconds: list[float] = field(default_factory=list)


def fit(
    objective: Objective,
    learned: Mapping[str, nn.Parameter],
    train: Sequence[Example],
    valid: Sequence[Example],
    step: TuneState,
    *,
    lr: float,
    seed: int,
    store: Path,
    tracker: str | None = None,
    emit: Emit,
) -> Course:
    """Trains in place and leaves what was best on the validation examples; `store` keeps what a killed run needs.

    What a tracker writes to files lies there too, in `RUNS`. Raises InputError for a loss that is no
    number, SsmcompressError for a tensor that nothing is learned in.
    """
    model: Any = objective.model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in learned.values():
        parameter.requires_grad_(True)
    if step.checkpointing:
        model.activation_checkpointing_enable()
    rows = [{"input_ids": each.ids, "scored": each.scored} for each in train]
    turns = order([len(each.ids) for each in train], step.batch_size * step.accumulate, step.steps, seed)
    course, last = Course(), _last(store)
    logging.set_verbosity_error()
    trainer = _Fit(
        model=objective,
        args=_arguments(step, lr, seed, store, model.device, tracker, fresh=last is None),
        train_dataset=[rows[index] for index in turns],
        eval_dataset=[{}],
        data_collator=batch,
        callbacks=[_Progress(course, learned, emit)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.learned, trainer.valid, trainer.lr = learned, valid, lr
    emit(Phase("tuning", step.steps))
    with parallel.not_lost():
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    model.activation_checkpointing_disable()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            course.loss.append((int(entry["step"]), entry["loss"]))
        if LOSS in entry:
            course.validation.append((int(entry["step"]), entry[LOSS]))
    course.best = trainer.state.best_global_step or 0
    model.eval()
    return course


def require_tracker(name: str | None) -> None:
    """BackendError for a tracker of experiments that the Trainer does not find."""
    if name is not None and name not in (there := get_available_reporting_integrations()):
        raise BackendError(
            f"There is no tracker {name!r} that transformers finds here; it finds {', '.join(there) or 'none'}.",
            hint=f"pip install {name}, if it is one of the Trainer's.",
        )


def require_shares(step: TuneState) -> None:
    """InputError for a batch that cannot be shared out."""
    if step.batch_size % parallel.size():
        raise InputError(
            f"A batch of {step.batch_size} examples cannot be shared out to {parallel.size()} processes.",
            hint="Give a --batch-size that is a multiple of their number.",
        )


def batch(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Ids and labels [B, L] of rows, padded behind."""
    length = max(len(row["input_ids"]) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    for b, row in enumerate(rows):
        tokens = torch.tensor(row["input_ids"])
        ids[b, : len(tokens)] = tokens
        labels[b, len(tokens) - row["scored"] : len(tokens)] = tokens[-row["scored"] :]
    return {"input_ids": ids, "labels": labels}


def _arguments(
    step: TuneState,
    lr: float,
    seed: int,
    store: Path,
    device: torch.device,
    tracker: str | None,
    *,
    fresh: bool,
) -> TrainingArguments:
    """AdamW without decay, linear to zero (the recipe of Kang et al., 2025)."""
    found = TrainingArguments(
        output_dir=str(store),
        max_steps=step.steps,
        learning_rate=lr,
        weight_decay=0.0,
        per_device_train_batch_size=step.batch_size // parallel.size(),
        gradient_accumulation_steps=step.accumulate,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=step.pace,
        eval_on_start=fresh,
        save_strategy="steps",
        save_steps=step.pace,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=LOSS,
        greater_is_better=False,
        logging_steps=max(1, step.steps // CURVE),
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        report_to=tracker or "none",
        disable_tqdm=True,
        seed=seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
    )
    found._n_gpu = min(found.n_gpu, 1)  # more would split batches behind the back of the loss
    return found


class _Fit(Trainer):
    """The Trainer, whose checkpoints hold what is learned alone, and whose loss is a mean over scored tokens."""

    learned: Mapping[str, nn.Parameter]
    valid: Sequence[Example]
    lr: float

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True  # it is divided by the tokens of all batches of an update

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = model(**inputs) / num_items_in_batch * self.accelerator.num_processes
        if not bool(loss.isfinite()):
            raise InputError(
                f"The loss is {loss.item()} at step {self.state.global_step + 1}.",
                hint=f"Give a lower --lr than {self.lr:g}, or --dtype float32.",
            )
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        model = self.accelerator.unwrap_model(self.model).model
        model.eval()
        nats = score(model, self.valid, self.args.per_device_train_batch_size)
        found = {LOSS: -sum(n for n, _ in nats) / sum(each.scored for each in self.valid)}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        parallel.wait()  # every process looks next whether the best state is there

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: each.detach().cpu().contiguous() for name, each in self.learned.items()}, folder / LEARNED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._restore(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._restore(Path(str(self.state.best_model_checkpoint)))

    @torch.no_grad()
    def _restore(self, folder: Path) -> None:
        for name, tensor in load_file(folder / LEARNED).items():
            self.learned[name].copy_(tensor)


def score(model: nn.Module, examples: Sequence[Example], batch_size: int) -> list[tuple[float, bool]]:
    """The log-likelihood of each example's scored tokens in nats, and whether they are the greedy ones."""
    pairs = [(each.ids[: -each.scored], each.ids[-each.scored :]) for each in examples]
    mine, longest = parallel.share(range(len(pairs))), max(len(each.ids) for each in examples)
    found = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for i, nats, greedy in likelihoods(model, [pairs[i] for i in mine], batch=batch_size, longest=longest):
        found[mine[i]] = torch.tensor([nats, greedy], dtype=torch.float64)
    return [(nats, bool(greedy)) for nats, greedy in parallel.total(found).tolist()]


class _Progress(TrainerCallback):
    """Tells how far it is, looks that everything learns, and marks checkpoints that are whole."""

    def __init__(self, course: Course, learned: Mapping[str, nn.Parameter], emit: Emit) -> None:
        self.course, self.learned, self.emit = course, learned, emit
        self.still = set(learned)
        self.started = 0.0
        self.begun: int | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        if self.begun is None:
            self.begun = state.global_step
            self.emit(Advance(state.global_step))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The factors of a product that begins at zero learn from the second update on."""
        first, looked = self.begun or 0, state.global_step - (self.begun or 0)
        if looked > 1 or first:
            return
        gradients = {name: self.learned[name].grad for name in self.still}
        self.still = {name for name, gradient in gradients.items() if gradient is None or not gradient.any()}
        if self.still and looked == 1:
            raise SsmcompressError(
                f"Nothing is learned in {min(self.still)} and {len(self.still) - 1} more: their gradient is zero.",
                hint="Please report this.",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.course.seconds.append(time.perf_counter() - self.started)
        self.emit(Advance())
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.emit(Note(f"step {state.global_step}: validation {metrics[LOSS]:.4f} nats a token"))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if parallel.first():
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


def _last(store: Path) -> Path | None:
    """The last checkpoint that was written to its end."""
    found = [path.parent for path in store.glob(f"checkpoint-*/{WHOLE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
