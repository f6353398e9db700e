import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Mamba2Config, MambaConfig

from ssmcompress.arch.mixer import use_backend
from ssmcompress.arch.registry import arch_for
from ssmcompress.kernels import cpu
from ssmcompress.measure.exercises import Vocabulary
from tests.unit.measure.fakes import TOKENIZER

SCRIPTS = Path(__file__).parents[3] / "evals" / "reference"
sys.path.insert(0, str(SCRIPTS))

import train  # noqa: E402
from curriculum import COPIED, COPYING, LOOKED_UP, RECALL, Curriculum  # noqa: E402
from fast import TrainingBackend, VocabularyLoss  # noqa: E402

SHARED = {"vocab_size": 4096, "hidden_size": 32, "num_hidden_layers": 1, "tie_word_embeddings": True}
TINY = {
    "mamba": MambaConfig(**SHARED, state_size=4),
    "mamba2": Mamba2Config(**SHARED, num_heads=4, head_dim=16, state_size=8, n_groups=1),
}
SETTINGS = train.Settings("mamba2", 60, first_shape=(2, 64), shape=(2, 64))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    np.random.default_rng(0).integers(1, 4096, 1000).astype(np.uint16).tofile(tmp_path / "train.bin")
    return tmp_path


def start(family: str, corpus: Path) -> tuple:
    torch.manual_seed(0)
    model = arch_for(TINY[family]).build("cpu").train()
    train.initialise(model)
    use_backend(model, TrainingBackend())
    return model, train.Optimiser(model, SETTINGS), train.Batches(SETTINGS, corpus, TOKENIZER)


def advance(model, optimiser, batches, progress, steps: int) -> None:
    for _ in range(steps):
        train.update(model, optimiser, batches, progress)
        progress.advance(SETTINGS, 60.0)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("text_from", [None, 0.0])
def test_a_resumed_run_is_the_run_that_was_not_cut(family: str, text_from: float | None, corpus: Path):
    whole = start(family, corpus)
    advance(*whole, train.Progress(text_from=text_from), 5)

    cut = start(family, corpus)
    progress = train.Progress(text_from=text_from)
    advance(*cut, progress, 2)
    train.save(corpus, cut[0], cut[1], progress)

    resumed = start(family, corpus)
    progress = train.resume(corpus, resumed[0], resumed[1])
    assert progress.step == 2 and progress.text_from == text_from
    advance(*resumed, progress, 3)
    for (name, ours), theirs in zip(resumed[0].named_parameters(), whole[0].parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_run_cut_before_its_first_save_starts_over(tmp_path: Path):
    assert train.resume(tmp_path, torch.nn.Linear(1, 1), None) == train.Progress()


def test_the_rate_falls_to_zero_and_text_begins_in_time():
    progress = train.Progress(step=1000)
    assert progress.rate(SETTINGS) == SETTINGS.memory_rate and progress.share(SETTINGS) == 1
    progress.advance(SETTINGS, 60 * SETTINGS.memory_minutes)
    assert progress.text_from == SETTINGS.memory_minutes
    assert progress.rate(SETTINGS) == SETTINGS.rate
    progress.advance(SETTINGS, 60 * (SETTINGS.minutes - SETTINGS.memory_minutes))
    assert progress.rate(SETTINGS) == 0


def test_the_curriculum_climbs_only_on_right_answers():
    curriculum = Curriculum()
    for _ in range(100):
        curriculum.graded(LOOKED_UP, 0.9)
    assert curriculum.levels == [0, 0]
    for _ in range(500):
        curriculum.graded(LOOKED_UP, 1.0)
        curriculum.graded(COPIED, 1.0)
    assert curriculum.levels == [len(RECALL) - 1, len(COPYING) - 1] and curriculum.finished


def test_a_row_of_exercises_marks_its_answers():
    words = Vocabulary.of(TOKENIZER)
    ids, kinds = Curriculum(levels=[2, 2]).row(words, 256, np.random.default_rng(0))
    assert len(ids) == len(kinds) == 257 and set(kinds) == {0, LOOKED_UP, COPIED}
    assert set(ids[kinds == LOOKED_UP]) <= set(words.values)


def test_the_training_scan_agrees_with_the_kernel_in_values_and_gradients():
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 192, 3, 8), (2, 192, 3), (3,), (2, 192, 1, 5), (2, 192, 1, 5), (3,), (3,)]
    inputs = [torch.randn(*shape, generator=generator) for shape in shapes]
    inputs[1], inputs[2] = inputs[1] - 1, -inputs[2].exp()
    grad = torch.randn(shapes[0], generator=generator)

    def run(ssd) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        y, _ = ssd(*leaves, (0.0, float("inf")), None)
        y.float().backward(grad)
        return [y.detach(), *(leaf.grad for leaf in leaves)]

    for name, ours, theirs in zip(
        ("y", "x", "dt", "A", "B", "C", "D", "bias"), run(TrainingBackend().ssd), run(cpu.ssd), strict=True
    ):
        assert (ours.float() - theirs).norm() < 0.01 * theirs.norm(), name


def test_the_loss_is_the_cross_entropy_of_the_tied_head():
    generator = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 16, generator=generator).bfloat16().float().requires_grad_() for n in (300, 97))
    targets = torch.randint(97, (300,), generator=generator)
    graded = targets % 2 == 0
    loss, right = VocabularyLoss.apply(hidden, head, targets, graded)
    loss.backward()
    found = hidden.grad, head.grad
    hidden.grad = head.grad = None
    logits = hidden @ head.T
    expected = torch.nn.functional.cross_entropy(logits, targets)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    for ours, theirs in zip(found, (hidden.grad, head.grad), strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
    assert (right == (logits.bfloat16().argmax(1) == targets)[graded]).float().mean() > 0.97
