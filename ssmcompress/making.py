"""What the steps of a recipe make of a model in memory, and the text that they look at."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ssmcompress import edits as editing
from ssmcompress import parallel
from ssmcompress.arch.backbone import dense
from ssmcompress.arch.surgery import Surgery
from ssmcompress.calib import data
from ssmcompress.calib.stream import Room
from ssmcompress.checkpoint.shards import Shards
from ssmcompress.checkpoint.source import Checkpoint, edited_pages, require_embedded, special_ids
from ssmcompress.edits import Edit, Reduce
from ssmcompress.errors import InputError
from ssmcompress.events import Emit, Note
from ssmcompress.journal import Journal
from ssmcompress.measure import exercises
from ssmcompress.prune.apply import find_edits
from ssmcompress.prune.cut import cut
from ssmcompress.prune.sizes import weigh
from ssmcompress.recipe import Recipe
from ssmcompress.steps import Cut, Prune, ReduceTokens
from ssmcompress.tokens.schedule import resolved
from ssmcompress.tokens.selection import install

EXERCISE_TOKENS = 30  # of the shorter ones on average
MIX_SHARE = 0.25  # of the calibration windows, where memory exercises are mixed in


def edit(
    checkpoint: Checkpoint,
    recipe: Recipe,
    windows: data.Windows | None,
    tell: Emit,
    journal: Journal,
    room: Room | None = None,
) -> tuple[list[Edit], Checkpoint]:
    """The edits of all steps, in terms of the source, and what they make of it: the model at hand is used up.

    With `room` for the residual stream one block of the model is in memory at a time.
    """
    stored, ids = checkpoint.stored, None
    if windows is not None:
        parallel.require(len(windows.ids), "calibration windows")
        ids = parallel.share(windows.ids).to(checkpoint.model.device)
    if dropped := journal.calibrate("" if windows is None else windows.sha256):
        tell(Note(f"The calibration tokens are not those of the earlier run: the layers it finished ({dropped}) go."))
    shapes = {name: stored.shape(name) for name in stored}
    found: list[Edit] = []
    edited = checkpoint
    for i, step in enumerate(recipe.made):
        surgery, layers = Surgery(checkpoint.arch, found), journal.step(i)
        if layers:
            done = sum(layer < edited.arch.layers for layer in layers)  # beside them lies a choice for all
            tell(Note(f"Going on from an earlier run: {done} of {edited.arch.layers} layers are done."))
        dtypes = {new: dtype_of(surgery, stored, old) for new, old in surgery.names(stored).items()}
        made: list[Edit]
        with dense(edited.model):  # scores are those of whole text
            if isinstance(step, ReduceTokens):
                if edited.arch.policy is not None:
                    tell(
                        Note(
                            "Tokens leave by a policy already, by which before is measured: it is replaced.", "warning"
                        )
                    )
                made = [Reduce(resolved(step, edited.arch, special_ids(edited), recipe.seed))]
            elif isinstance(step, Cut):
                left = weigh(stored).after(surgery)
                made = cut(edited.model, edited.arch, step, left, ids, dtypes, recipe.seed, tell, layers, room)
            else:
                made = find_edits(edited.model, edited.arch, step, ids, dtypes, tell, layers, room)
        if room is None and not isinstance(step, Prune):  # which has changed the weights already
            edited = edited_by(edited, made)
        found = editing.compose(found, [surgery.lift(edit, shapes) for edit in made])
        if room is not None:
            edited = edited_pages(checkpoint, found)
    if room is None and editing.reshaping(found):  # in one pass, so that a replay writes the same config
        edited = replace(edited, arch=Surgery(checkpoint.arch, found).arch)
        edited.model.config = edited.arch.config
    return found, edited


def dtype_of(surgery: Surgery, stored: Shards, name: str) -> torch.dtype:
    """What a tensor of the source, or one that is new, is stored in."""
    return surgery.added[name].dtype if name in surgery.added else stored.dtype(name)


def edited_by(checkpoint: Checkpoint, found: Sequence[Edit]) -> Checkpoint:
    """What edits make of a checkpoint in memory, which is used up."""
    editing.apply(found, dict(checkpoint.model.named_parameters()))
    if not editing.reshaping(found):
        return checkpoint
    surgery = Surgery(checkpoint.arch, found)
    model = surgery.operate(checkpoint.model)
    install(model, surgery.policy and surgery.arch.policy)
    return replace(checkpoint, model=model, arch=surgery.arch)


def calibrating(checkpoint: Checkpoint, recipe: Recipe, tell: Emit) -> data.Windows | None:
    """The tokens that statistics are taken from; None where no step needs them."""
    if not any(step.calibrated for step in recipe.made):
        return None
    wanted, seed = recipe.calibrate, recipe.seed
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise InputError(
            f"{checkpoint.source.name} has no tokenizer, so there is no calibration.",
            hint="Put its tokenizer files into the folder, or use --method magnitude.",
        )
    require_embedded(checkpoint)
    share = MIX_SHARE if wanted.mix else 0.0
    count = int(share * wanted.windows * wanted.length / EXERCISE_TOKENS) + 1
    extra = exercises.exercise_documents(tokenizer, count, seed) if share else ()
    found = data.windows(
        wanted.text,
        tokenizer,
        count=wanted.windows,
        length=wanted.length,
        seed=seed,
        split=wanted.split,
        column=wanted.column,
        extra=extra,
        share=share,
    )
    if len(found.ids) < wanted.windows:
        tell(
            Note(f"The text holds {len(found.ids)} windows of {wanted.length} tokens, not {wanted.windows}.", "warning")
        )
    return found
