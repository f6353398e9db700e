"""The tables of the page: rows of words, made from checkpoints and their figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ssmcompress.checkpoint.card import coverage
from ssmcompress.evaluate.speed import Ratio, Spread
from ssmcompress.events import number, size
from ssmcompress.report import words
from ssmcompress.report.checkpoints import Checkpoint
from ssmcompress.report.measures import Figure, Figures, Measure

GROUPS = {"likelihood": "Likelihood", "memory": "Memory", "tasks": "Tasks"}


@dataclass(frozen=True)
class Cell:
    """What stands in a table: its words, smaller lines below, and how it is set (number, words, code, muted)."""

    text: str
    notes: tuple[str, ...] = ()
    kind: str = "number"


@dataclass(frozen=True)
class Table:
    """Rows under columns; a row of one cell is a heading."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """How each column is set: as words where its cells are, else as numbers."""
        whole = [row for row in self.rows if len(row) == len(self.columns)]
        kinds = [{row[i].kind for row in whole} - {"muted"} for i in range(len(self.columns))]
        return tuple("words" if each and "number" not in each else "number" for each in kinds)


@dataclass(frozen=True)
class Member:
    """A checkpoint of a family with its mark and figures."""

    checkpoint: Checkpoint
    mark: int
    figures: Figures

    @property
    def label(self) -> str:
        """Its name on the page."""
        return self.checkpoint.label

    @property
    def done(self) -> str:
        """What was done to it, in a few words."""
        made = self.checkpoint.made
        if made is not None:
            return words.brief(made.recipe, made.manifest.verb)
        if adapter := next((each.summary.adapter for each in self.checkpoint.evaluations if each.summary.adapter), ""):
            return f"with the adapter {adapter}"
        return "dense" if self.checkpoint.dense else "compressed; its folder was not given"


def glance(members: Sequence[Member], text: Measure | None, probes: Sequence[Measure]) -> Table:
    """Size, quality and speed of every member of a family, the dense one first."""
    columns = ["model", "parameters not zero", "weights stored", "bits per byte"]
    columns += ["change against dense"] * (len(members) > 1) + [probe.name for probe in probes] + ["decoding, tokens/s"]
    rows = []
    for member in members:
        figure = member.figures.get(text) if text else None
        elsewhere = any(measure.group == "likelihood" for measure in member.figures) and figure is None
        bits = Cell("on other text", kind="muted") if elsewhere else _figure(figure)
        row = [Cell(member.label, (member.done,), "words"), _left(member), _stored(member), bits]
        if len(members) > 1:
            row.append(_change(figure))
        rows.append((*row, *(_figure(member.figures.get(probe)) for probe in probes), _decoding(member)))
    return Table(tuple(columns), tuple(rows))


def measures(members: Sequence[Member]) -> Table | None:
    """Every measure of every member, with its paired change; None where nothing was measured."""
    every = list(dict.fromkeys(measure for member in members for measure in member.figures))
    rows: list[tuple[Cell, ...]] = []
    for group, title in GROUPS.items():
        found = [measure for measure in every if measure.group == group]
        rows += [(Cell(title, kind="words"),)] * bool(found)
        for measure in found:
            cells = [_whole(member.figures.get(measure)) for member in members]
            rows.append((Cell(measure.name, (measure.about,), "words"), *cells))
    return Table(("measure", *(member.label for member in members)), tuple(rows)) if rows else None


def speed(members: Sequence[Member]) -> Table | None:
    """How fast each member was, as measured; None where none was."""
    rows = []
    for member in members:
        for each in (found.speed for found in member.checkpoint.evaluations if found.speed):
            own = each.model
            reading = "; ".join(f"{part.length}: {_median(part.tokens_per_s)}" for part in own.prefill)
            first = "; ".join(f"{part.length}: {_median(part.time_to_first_token_s, 1e3)}" for part in own.prefill)
            busy = f"{each.threads} thread{'s' * (each.threads > 1)}, load {each.load[0]:.1f} to {each.load[1]:.1f}"
            memory = Cell(size(own.peak_memory_bytes), (f"{size(own.memory_before_bytes)} before work",))
            ratios = "; ".join(_ratio(ratio) for ratio in each.ratios)
            against = Cell(ratios, (f"against {each.against.model}",), "words") if each.against else MUTED
            figures = (Cell(reading), Cell(first), Cell(_median(own.decode_tokens_per_s)))
            rows.append((Cell(member.label, (each.machine, busy), "words"), *figures, memory, against))
    columns = ("model", "prompt, tokens/s", "first token, ms", "decoding, tokens/s", "most memory", "times as fast")
    return Table(columns, tuple(rows)) if rows else None


def covered(members: Sequence[Member]) -> Table | None:
    """What became of every kind of tensor; None where no folder tells."""
    told = [(each, each.checkpoint.made.manifest.tensors) for each in members if each.checkpoint.made]
    told = [(member, tensors) for member, tensors in told if tensors]
    kinds: dict[str, dict[str, list[tuple[str, ...]]]] = {}
    for member, tensors in told:
        for kind, *happened in coverage(tensors):
            kinds.setdefault(kind, {}).setdefault(member.label, []).append(tuple(happened))
    rows = []
    for kind, by_member in kinds.items():
        numbers = max(sum(int(tensors) for tensors, *_ in parts) for parts in by_member.values())
        cells = [_happened(by_member.get(member.label, [])) for member, _ in told]
        rows.append((Cell(kind, (f"{numbers} tensor{'s' * (numbers > 1)}",), "code"), *cells))
    return Table(("weight", *(member.label for member, _ in told)), tuple(rows)) if rows else None


def environment(members: Sequence[Member]) -> Table:
    """Versions, kernels, precision and seeds of every run and evaluation, equal ones in one row."""
    rows: dict[tuple[str, str, str, str], list[str]] = {}
    for member in members:
        made = member.checkpoint.made
        if made is not None:
            told = made.manifest
            dtype: str = made.recipe.dtype if made.recipe else ""
            seed = "" if told.seed is None else f"seed {told.seed}"
            facts = (_pairs(told.versions), _pairs(told.backend), dtype, seed)
            rows.setdefault(facts, []).append(f"{member.label} ({told.verb})")
        for found in (each.summary for each in member.checkpoint.evaluations):
            seeds = _pairs({"seed": str(found.seed)} | {name: str(seed) for name, seed in found.seeds.items()})
            facts = (_pairs(found.versions | found.harness_versions), _pairs(found.backend), found.dtype, seeds)
            rows.setdefault(facts, []).append(f"{member.label} (eval)")
    cells = [tuple(Cell(text, kind="words") for text in (", ".join(who), *facts)) for facts, who in rows.items()]
    return Table(("run", "versions", "kernels", "dtype", "seeds"), tuple(cells))


def hashes(members: Sequence[Member]) -> Table:
    """What identifies weights, recipes and calibration text."""
    rows = []
    for member in members:
        rows += [_hash(member.label, "weights", digest) for digest in sorted(member.checkpoint.weights)]
        if (made := member.checkpoint.made) is not None:
            told = made.manifest
            rows += [_hash(member.label, "recipe", told.recipe_sha256)] * (told.recipe_sha256 is not None)
            rows += [_hash(member.label, "calibration", told.calibration.sha256)] if told.calibration else []
        texts = {each.summary.text_sha256 for each in member.checkpoint.evaluations} - {None}
        rows += [_hash(member.label, "evaluation text", digest) for digest in sorted(filter(None, texts))]
    return Table(("model", "what", "SHA-256"), tuple(rows))


MUTED = Cell("–", kind="muted")
UNMEASURED = Cell(words.NOT_MEASURED, kind="muted")


def _left(member: Member) -> Cell:
    each = member.checkpoint
    if each.nonzero is None:
        if each.params is None:
            return UNMEASURED
        return Cell(words.count(each.params), ("zeros not counted",))
    return Cell(words.count(each.nonzero), (f"{each.nonzero / max(1, each.params or 0):.1%} of all",))


def _stored(member: Member) -> Cell:
    each = member.checkpoint
    if each.weight_bytes is None:
        return UNMEASURED
    state = next((found.summary.state_bytes for found in each.evaluations), None)
    return Cell(size(each.weight_bytes), () if state is None else (f"state {size(state)}",))


def _figure(figure: Figure | None) -> Cell:
    if figure is None:
        return UNMEASURED
    return _split(words.value(figure), *([] if figure.measurable else ["not measurable"]))


def _change(figure: Figure | None) -> Cell:
    if figure is None or figure.change is None:
        return MUTED
    return _split(words.change(figure.change, figure.unit))


def _whole(figure: Figure | None) -> Cell:
    if figure is None or figure.change is None:
        return _figure(figure)
    said = (figure.change.verdict,) if figure.change.verdict else ()
    return _split(words.value(figure), words.change(figure.change, figure.unit), *said)


def _split(told: str, *others: str) -> Cell:
    """A figure above its interval."""
    main, bracket, held = told.partition(" [")
    return Cell(main, (*([f"[{held}"] if bracket else []), *others))


def _decoding(member: Member) -> Cell:
    found = next((each.speed for each in member.checkpoint.evaluations if each.speed), None)
    if found is None:
        return UNMEASURED
    return _split(_median(found.model.decode_tokens_per_s))


def _median(found: Spread, scale: float = 1.0) -> str:
    low, median, high = scale * found.low, scale * found.median, scale * found.high
    return f"{number(median)} [{number(low)}, {number(high)}]"


def _ratio(found: Ratio) -> str:
    held = f" [{found.interval[0]:.2f}, {found.interval[1]:.2f}]" if found.interval else ""
    return f"{found.figure.replace('_', ' ')} {found.ratio:.2f}{held}"


def _happened(parts: Sequence[tuple[str, ...]]) -> Cell:
    if not parts:
        return MUTED
    said = "; ".join(happened for _, happened, _ in parts)
    shares = tuple(f"{share} not zero" for _, _, share in parts)
    return Cell(said, shares, "words pruned" if "pruned" in said else "words")


def _pairs(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _hash(label: str, what: str, digest: str | None) -> tuple[Cell, ...]:
    return Cell(label, kind="words"), Cell(what, kind="words"), Cell(digest or "", kind="code")
