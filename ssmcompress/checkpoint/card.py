"""`README.md` of an output: a model card that says what was done, what it cost, and what it does not bring."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from ssmcompress.checkpoint.manifest import Manifest, ShapeRecord, TensorRecord, TokenRecord
from ssmcompress.checkpoint.source import Source
from ssmcompress.events import number

MASKS = (
    "Zeros are stored like any other value: a mask alone changes neither the bytes this model takes in memory "
    "nor its speed. They pay only with a format or a kernel that skips zeros."
)
MEMORYLESS = (
    "A memoryless entry of A_log is not removed: it is stored as 20, so that its state h = Δ B x is made anew by every "
    "token. It takes the memory and the time of any other. In Mamba-2, one entry is the whole memory of a head."
)
OWN = (
    "No config of transformers says the sizes of these blocks. `modeling_ssmcompress.py`, which ssmcompress wrote "
    "here, does; transformers runs it only with `trust_remote_code=True`. It needs torch and transformers, nothing "
    "else. `ssmcompress` itself has no need of it, and runs no code from a folder."
)
IGNORED = (
    "Only ssmcompress lets tokens leave, by the token_policy in config.json: stock transformers reads every token, and "
    "gives the numbers of the model without the policy."
)
NUMBER = r"\d+"


@dataclass(frozen=True)
class Measure:
    """A number before and after, and the change with its paired 95 % interval as text where there is one."""

    name: str
    before: float
    after: float
    interval: str = ""


def write(
    folder: Path,
    *,
    title: str,
    summary: str,
    manifest: Manifest,
    recipe: str = "",
    measures: Sequence[Measure] = (),
    measured_on: str = "",
    license: str | None = None,
) -> None:
    """Writes the card; `summary` is a sentence or two of what was done, `recipe` the resolved recipe as YAML."""
    loaders = _loaders(manifest)
    parts = [
        f"---\n{_front_matter(manifest, license, stock='transformers' in loaders)}\n---",
        f"# {title}",
        summary,
        _measured(measures, measured_on),
        _shape(manifest.shape),
        _tokens(manifest.tokens),
        _coverage(manifest),
        _loading(manifest, loaders),
        f"## Recipe\n\n```yaml\n{recipe.strip()}\n```" if recipe else "",
        _provenance(manifest),
    ]
    (folder / "README.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def license_of(source: Source) -> str | None:
    """The licence that the source's own card names, if it has one."""
    path = source.folder / "README.md"
    if not path.exists():
        return None
    try:
        metadata = metadata_load(path)
    except (ValueError, yaml.YAMLError):  # a card that cannot be read names no licence
        return None
    found = (metadata or {}).get("license")
    return found if isinstance(found, str) else None


def coverage(tensors: Sequence[TensorRecord]) -> list[tuple[str, str, str, str]]:
    """Rows (weight, tensors, what happened, share that is not zero), in the order of the model.

    Tensors of a kind share one, even if they were cut to different sizes: it tells the least and the largest.
    """
    kinds: dict[str, dict[tuple[str, ...], list[TensorRecord]]] = {}
    for tensor in tensors:
        alike = (tensor.status, *re.split(NUMBER, tensor.reason))
        kinds.setdefault(_kind(tensor.name), {}).setdefault(alike, []).append(tensor)
    rows = []
    for kind, (status, *_), members in ((kind, *each) for kind, found in kinds.items() for each in found.items()):
        reason = _spanned([tensor.reason for tensor in members])
        size = sum(tensor.size for tensor in members)
        kept = sum(tensor.size * tensor.nonzero for tensor in members) / max(1, size)
        rows.append((kind, str(len(members)), f"{status}: {reason}" if reason else status, f"{kept:.1%}"))
    return rows


def _spanned(texts: Sequence[str]) -> str:
    """One text for several that differ in their numbers."""
    numbers = zip(*(map(int, re.findall(NUMBER, text)) for text in texts), strict=True)
    spans = iter([f"{min(each)}–{max(each)}" if min(each) < max(each) else str(each[0]) for each in numbers])
    return re.sub(NUMBER, lambda _: next(spans), texts[0])


def _front_matter(manifest: Manifest, license: str | None, *, stock: bool) -> str:
    pruned = manifest.shape is not None or any(each.status in ("pruned", "memoryless") for each in manifest.tensors)
    tags = ["ssmcompress", "state-space-model", "mamba", *(["pruned"] if pruned else [])]
    tags += ["token-reduction"] if manifest.tokens else []
    fields = ModelCardData(
        base_model=manifest.source.name.partition("@")[0] if manifest.source.revision else None,
        library_name="transformers" if stock else "ssmcompress",
        license=license,
        pipeline_tag="text-generation",
        tags=tags,
    )
    return fields.to_yaml().strip()


def _measured(measures: Sequence[Measure], measured_on: str) -> str:
    if not measures:
        return ""
    rows = [
        (measure.name, number(measure.before), number(measure.after), measure.interval or "–") for measure in measures
    ]
    caption = f"Measured on {measured_on}." if measured_on else ""
    table = _table(("measure", "before", "after", "change [paired 95 % interval]"), rows)
    return "\n\n".join(part for part in ("## Measured", caption, table) if part)


def _shape(shape: ShapeRecord | None) -> str:
    if shape is None:
        return ""
    amounts = (("parameters", "params"), ("weight bytes", "weight_bytes"), ("state bytes a sequence", "state_bytes"))
    rows = [(f"{axis}s", *pair) for axis, pair in shape.changes().items()]
    rows += [(name, f"{getattr(shape.before, key):,}", f"{getattr(shape.after, key):,}") for name, key in amounts]
    spread = {axis: sizes for axis, sizes in shape.after.axes.items() if min(sizes) < max(sizes)}
    told = "; ".join(f"{axis}s {', '.join(map(str, sizes))}" for axis, sizes in spread.items())
    table = _table(("", "before", "after"), rows)
    return "\n\n".join(part for part in ("## Size", table, f"Layer by layer: {told}." if told else "") if part)


def _tokens(tokens: TokenRecord | None) -> str:
    if tokens is None:
        return ""
    details = (f"{name.replace('_', ' ')} {value}" for name, value in tokens.policy.details.items())
    every = f"The policy: {', '.join(details)}. Tokens that are predicted, special ones and the last never leave."
    return "\n\n".join(part for part in ("## Tokens", f"{tokens.told} {IGNORED}", every, tokens.table) if part)


def _coverage(manifest: Manifest) -> str:
    if not manifest.tensors:
        return ""
    table = _table(("weight", "tensors", "what happened", "not zero"), coverage(manifest.tensors))
    share = f"Of the pruned tensors, {manifest.sparsity:.1%} of the entries are zero." if manifest.sparsity else ""
    forgets = MEMORYLESS if any(tensor.status == "memoryless" for tensor in manifest.tensors) else ""
    return "\n\n".join(part for part in ("## What was touched", table, share, MASKS if share else "", forgets) if part)


def _loading(manifest: Manifest, loaders: Sequence[str]) -> str:
    told = f"Loads in {' and '.join(loaders)}, with the logits of the model that was written." if loaders else ""
    own = manifest.verification is not None and manifest.verification.trust_remote_code
    usage = _usage(own) if "transformers" in loaders else ""
    return "\n\n".join(part for part in ("## Loading" if told else "", told, OWN if own else "", usage) if part)


def _usage(own: bool) -> str:
    trusted = ", trust_remote_code=True" if own else ""
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER"{trusted})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trusted})\n'
        "```"
    )


def _provenance(manifest: Manifest) -> str:
    source = manifest.source
    lines = [f"- Source: `{source.name}`" + (f" at commit `{source.revision}`" if source.revision else "")]
    lines += [f"- SHA-256 of its `{file}`: `{digest}`" for file, digest in source.sha256.items()]
    lines += [f"- Before that: `{run.verb}` of `{run.source.name}`" for run in reversed(manifest.earlier)]
    if manifest.calibration is not None:
        calibration = manifest.calibration
        lines.append(
            f"- Calibration: {calibration.windows} windows of {calibration.length} tokens of {calibration.source},"
            f" SHA-256 `{calibration.sha256}`"
        )
    if manifest.seed is not None:
        lines.append(f"- Seed: {manifest.seed}")
    lines.append("- Versions: " + ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    return "## Where it comes from\n\n" + "\n".join(lines)


def _loaders(manifest: Manifest) -> list[str]:
    verified = manifest.verification
    names = ("transformers", "ssmcompress")
    return [name for name in names if verified is not None and getattr(verified, name) is not None]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _kind(name: str) -> str:
    return (
        ".".join(part for part in name.split(".") if not part.isdigit())
        .removeprefix("backbone.")
        .removeprefix("layers.")
    )
