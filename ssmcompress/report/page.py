"""The verb `report`: one HTML page, complete in itself, of what was done and what it cost."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmcompress.errors import BackendError, InputError
from ssmcompress.events import Emit, Finished, ignore, number
from ssmcompress.report.gather import NOTE, Subject, gather

COPIES, LOOKUPS = "copy", "key-value"


def report(*folders: str | Path, out: str | Path = "report.html", overwrite: bool = False, emit: Emit = ignore) -> Path:
    """Writes a page about these folders of `prune`, `run` and `eval --out`, in any mix: same folders, same bytes.

    Raises InputError for a folder that is neither or a page that exists, BackendError without Jinja2 and matplotlib.
    """
    target = Path(out).expanduser()
    if not folders:
        raise InputError("There is nothing to report on.", hint="Give folders of `prune --out` or `eval --out`.")
    if target.is_dir():
        raise InputError(f"{target} is a folder.", hint="Give a file name with --out: report.html.")
    if target.exists() and not overwrite:
        raise InputError(f"{target} exists already.", hint="Choose another --out, or replace it with --overwrite.")
    html = rendered(gather(folders))
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        part.write_text(html, encoding="utf-8")
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    emit(Finished(os.fspath(out)))
    return target


def rendered(subjects: Sequence[Subject]) -> str:
    """The page as text."""
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f"The report needs {error.name}.", hint="pip install 'ssmcompress[report]' brings what it needs."
        ) from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": _signed, "percent": _percent}
    return environment.get_template("page.html.j2").render(
        subjects=subjects,
        summary=[_summary(each) for each in subjects],
        charts=_charts(subjects),
        tasks=_tasks(subjects),
        masks=NOTE if any(each.masked for each in subjects) else "",
        glances=any(each.glance for each in subjects),
    )


def _summary(subject: Subject) -> dict[str, Any]:
    """The first table's row: size, quality and speed of one model."""
    found = subject.evaluated.summary if subject.evaluated else None
    change = next((each for each in subject.against if each.measure == "text/bits_per_byte"), None)
    probes = {(probe["probe"], probe["load"]): probe for probe in (found.recall if found else ())}
    speed = subject.speed.model if subject.speed else None
    return {
        "subject": subject,
        "done": _done(subject),
        "weight_bytes": found.weight_bytes if found else None,
        "state_bytes": found.state_bytes if found else None,
        "bits": found,
        "change": change,
        "copying": _longest(probes, COPIES),
        "by_key": _longest(probes, LOOKUPS),
        "prefill": speed.prefill[-1] if speed else None,
        "decode": speed.decode_tokens_per_s if speed else None,
    }


def _longest(probes: dict[tuple[str, int], Any], kind: str) -> Any:
    loads = [load for name, load in probes if name == kind]
    return probes[kind, max(loads)] if loads else None


def _done(subject: Subject) -> str:
    """What was done to a model, in words."""
    if subject.made is None:
        return "dense"
    import yaml

    steps = (yaml.safe_load(subject.recipe) or {}).get("steps", []) if subject.recipe else []
    told = []
    for step in steps:
        how = f"keeps {step['pattern']}" if step.get("pattern") else f"zeroes {step.get('sparsity') or 0:.0%}"
        where = " and ".join(step["include"]) if step.get("include") else "projections"
        told.append(f"{step.get('step')}: {step.get('method')} {how} of the {where}")
    return "; ".join(told) or subject.made.verb


def _tasks(subjects: Sequence[Subject]) -> list[tuple[str, list[Any]]]:
    """Task by task, the score of every model."""
    scores = [
        {(score.task, score.metric): score for score in each.evaluated.summary.tasks} if each.evaluated else {}
        for each in subjects
    ]
    names = list(dict.fromkeys(name for found in scores for name in found))
    return [(f"{task} · {metric}", [found.get((task, metric)) for found in scores]) for task, metric in names]


def _charts(subjects: Sequence[Subject]) -> list[tuple[str, str, str]]:
    """Title, what it shows in words, and the drawing of every chart there are numbers for."""
    from ssmcompress.report import figures

    shades = [figures.colour(i) for i in range(len(subjects))]
    found = []
    if points := _tradeoff(subjects, shades):
        told = "Rise of bits per byte over the dense model, paired by document, with 95 % intervals."
        found.append(("Quality against size", told, figures.tradeoff(points, "bits per byte against dense, %")))
    if errors := [
        (each.label, shade, [layer + 1 for layer, _ in each.errors], [error for _, error in each.errors])
        for each, shade in zip(subjects, shades, strict=True)
        if each.errors
    ]:
        told = (
            "How far the residual stream behind each block moves from that of the dense block, on the calibration text."
        )
        found.append(("Error by layer", told, figures.lines(errors, "block", "relative change")))
    for kind, title, x in ((COPIES, "Copying words", "words"), (LOOKUPS, "Finding values by key", "pairs")):
        probes = [_probes(each, kind) for each in subjects]
        memory = [
            (each.label, shade, [p["load"] for p in seen], [p["accuracy"] for p in seen])
            for each, shade, seen in zip(subjects, shades, probes, strict=True)
            if seen
        ]
        if memory:
            first = next(filter(None, probes))
            chance = [p["load"] for p in first], [p["chance"] for p in first]
            told = "Accuracy by load; dotted: chance. Perplexity does not show what is lost here."
            found.append((title, told, figures.lines(memory, x, "accuracy", chance=chance)))
    return found


def _tradeoff(subjects: Sequence[Subject], shades: Sequence[str]) -> list[Any]:
    """The models whose likelihood was compared with that of the dense one, and the dense ones, which stand at zero."""
    points, origins = [], {str(each.made.source.sha256) for each in subjects if each.made and each.against}
    for each, shade in zip(subjects, shades, strict=True):
        found = next((row for row in each.against if row.measure == "text/bits_per_byte"), None)
        if each.nonzero is None:
            continue
        if found is not None and found.interval is not None:
            low, high = (100 * end for end in found.interval)
            points.append((each.label, shade, each.nonzero / 1e6, 100 * found.change, (low, high)))
        elif each.made is None and str(each.weights) in origins:
            points.append((each.label, shade, each.nonzero / 1e6, 0.0, (0.0, 0.0)))
    return points if len(points) > 1 else []


def _probes(subject: Subject, kind: str) -> list[dict[str, Any]]:
    """The memory probes of one kind, by load."""
    return [p for p in (subject.evaluated.summary.recall if subject.evaluated else ()) if p["probe"] == kind]


def _signed(value: float) -> str:
    return f"{value:+.4f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"
