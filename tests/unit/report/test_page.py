"""The page: what is in the folders stands on it, nothing is loaded or run, and the same folders give the same bytes."""

import json
import os
from html.parser import HTMLParser
from itertools import pairwise

import pytest

import ssmcompress
from ssmcompress.checkpoint.card import MASKS
from ssmcompress.errors import InputError, ResourceError
from ssmcompress.evaluate.results import Summary
from ssmcompress.events import Finished
from tests.unit.report import outputs

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The tags of a page in order, its text, and whether every tag is closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def folders(models, tmp_path):
    """Both models, and evaluations of the dense one and of that by WANDA."""
    wanda = models["wanda"]
    outputs.measured(wanda)
    dense = outputs.evaluation(tmp_path / "r0", outputs.source_of(wanda), "source")
    other = outputs.evaluation(tmp_path / "r1", outputs.weights_of(wanda), "w", loss=0.05, accuracy=0.6)
    return [*models.values(), dense, other]


def written(folders, tmp_path, **options):
    return ssmcompress.report(*folders, out=tmp_path / "report.html", **options).read_text(encoding="utf-8")


def test_the_numbers_of_the_files_stand_on_the_page(folders, tmp_path):
    text = Page(written(folders, tmp_path)).text
    summary = Summary.model_validate_json((folders[3] / "summary.json").read_text())
    manifest = json.loads((folders[1] / "ssmcompress.json").read_text())
    low, high = summary.bits_per_byte_interval
    assert f"{summary.bits_per_byte:.4f} [{low:.4f}, {high:.4f}]" in text
    assert "60.0%" in text and "92.5%" in text and "+0.0500" in text and "−20.0" in text
    for hashed in (manifest["recipe_sha256"], manifest["files"]["model.safetensors"], *summary.model_sha256.values()):
        assert hashed in text
    assert manifest["calibration"]["sha256"] in text and "4 windows of 32 tokens" in text
    assert " ".join((folders[1] / "recipe.yaml").read_text().split()) in text
    assert "WANDA sets 25% of every projection to zero" in text
    assert MASKS in text and "not measured" in text and "seed 7" in text


def test_coverage_names_every_kind_of_weight(folders, tmp_path):
    text = Page(written(folders, tmp_path)).text
    for name in ("mixer.A_log", "mixer.D", "mixer.conv1d.weight", "mixer.dt_proj.weight", "norm_f.weight"):
        assert name in text
    assert "kept: on purpose" in text and "kept: not chosen" in text and "75.0% not zero" in text


def test_the_same_folders_give_the_same_bytes(folders, tmp_path):
    first = written(folders, tmp_path)
    assert written(folders, tmp_path, overwrite=True) == first


def test_nothing_is_loaded_or_run(folders, tmp_path):
    page = Page(written(folders, tmp_path))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "img"}
    for _, attributes in page.tags:
        assert not {"src", "href", "srcset", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    policy = next(each["content"] for _, each in page.tags if each.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    html = (tmp_path / "report.html").read_text()
    assert "url(" not in html and "@import" not in html


def test_names_are_not_markup(models, tmp_path):
    bad = '<script>alert("x")</script>'
    wanda = models["wanda"]
    told = json.loads((wanda / "ssmcompress.json").read_text())
    told["source"]["name"] = told["versions"]["torch"] = bad
    (wanda / "ssmcompress.json").write_text(json.dumps(told))
    recipe = (wanda / "recipe.yaml").read_text().replace("description: ''", f"description: '{bad}'")
    (wanda / "recipe.yaml").write_text(recipe)
    wicked = [{**outputs.probe(0.9), "probe": bad}]
    folder = outputs.evaluation(tmp_path / "r", {"m": "1f" * 32}, bad, text=bad, recall=wicked)
    html = written([wanda, folder], tmp_path)
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.tags} and "<script" not in html
    assert page.text.count(bad) >= 4


def test_it_reads_aloud(folders, tmp_path):
    page = Page(written(folders, tmp_path))
    figures = [each for tag, each in page.tags if tag == "svg" and each.get("role") == "img"]
    assert figures and all(each["aria-label"] for each in figures)
    keys = [each for tag, each in page.tags if tag == "svg" and each.get("role") != "img"]
    assert all(each["aria-hidden"] == "true" for each in keys)
    assert [tag for tag, _ in page.tags].count("table") == [tag for tag, _ in page.tags].count("caption")
    scrolling = [each for _, each in page.tags if each.get("class") == "scroll"]
    assert all(each["tabindex"] == "0" and each["aria-label"] for each in scrolling)
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in pairwise(levels))


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [2, 3], [0, 1]])
def test_any_part_may_be_missing(folders, tmp_path, chosen):
    page = Page(written([folders[i] for i in chosen], tmp_path))
    assert "NaN" not in page.text and "None" not in page.text


def test_figures_on_another_text_do_not_stand_in_one_column(folders, tmp_path):
    extra = outputs.evaluation(tmp_path / "r2", {"m": "2f" * 32}, "x", source="source", text_sha256="8f" * 32)
    text = Page(written([*folders, extra], tmp_path)).text
    assert "compressed; its folder was not given" in text and text.count("on other text") == 1


def test_an_adapted_model_is_not_called_compressed(folders, tmp_path):
    extra = outputs.evaluation(tmp_path / "r2", {"m": "2f" * 32}, "x + lora", source="source", adapter="lora")
    text = Page(written([*folders, extra], tmp_path)).text
    assert "with the adapter lora" in text and "compressed; its folder" not in text


def test_a_model_alone_shows_its_own_figures(folders, tmp_path):
    text = Page(written([folders[1]], tmp_path)).text
    assert "first 512 tokens" in text and "55.0%" in text and "97.0%" in text


def test_speed_is_shown_as_measured(folders, tmp_path):
    half = {"median": 159.02, "low": 157.7, "high": 159.94}
    read = {"length": 128, "tokens_per_s": half, "time_to_first_token_s": half, "flops_per_token": 7e6}
    sizes = {"weight_bytes": 1, "weight_bytes_in_memory": 1, "state_bytes": 1, "peak_memory_bytes": 462_330_000}
    model = {"model": "m", "dtype": "float32", "prefill": [read], "decode_tokens_per_s": half} | sizes
    model |= {"decode_flops_per_token": 7e6, "memory_before_bytes": 453_160_000}
    ratio = {"figure": "decode", "ratio": 1.01, "interval": [0.98, 1.04]}
    about = {"batch": 1, "decode_tokens": 64, "repetitions": 10, "warm_up": 2, "seed": 0, "device": "cpu"}
    machine = {"backend": {}, "threads": 2, "load": [3.25, 3.31], "machine": "a processor", "torch": "2"}
    told = {"model": model, "against": model, "ratios": [ratio]} | about | machine
    (folders[2] / "speed.json").write_text(json.dumps(told))
    text = Page(written(folders, tmp_path)).text
    assert "159.0 [157.7, 159.9]" in text and "462.33 MB" in text and "2 threads, load 3.2 to 3.3" in text
    assert "decode 1.01 [0.98, 1.04]" in text


def test_it_says_what_it_wrote(folders, tmp_path):
    seen = []
    written(folders, tmp_path, emit=seen.append)
    assert seen[-1] == Finished(str(tmp_path / "report.html"))
    assert sorted(path.name for path in tmp_path.iterdir() if "report" in path.name) == ["report.html"]


def test_what_is_there_is_not_replaced_unasked(folders, tmp_path):
    first = written(folders[2:3], tmp_path)
    with pytest.raises(InputError, match="exists already"):
        written(folders, tmp_path)
    assert (tmp_path / "report.html").read_text() == first
    assert written(folders, tmp_path, overwrite=True) != first


def test_other_files_are_never_replaced(folders, tmp_path):
    (tmp_path / "report.html").write_text("my thesis")
    with pytest.raises(InputError, match="no report of ssmcompress"):
        written(folders, tmp_path, overwrite=True)
    assert (tmp_path / "report.html").read_text() == "my thesis"


@pytest.mark.parametrize("place", ["wanda/report.html", "r0", "r0/summary.json/x.html"])
def test_places_that_will_not_do(folders, tmp_path, place):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError):
        ssmcompress.report(*folders, out=tmp_path / place, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_without_folders_there_is_nothing_to_say(tmp_path):
    with pytest.raises(InputError, match="nothing to report"):
        ssmcompress.report(out=tmp_path / "report.html")


def test_a_write_that_fails_leaves_the_old_page(folders, tmp_path, monkeypatch):
    first = written(folders[2:3], tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        written(folders, tmp_path, overwrite=True)
    assert (tmp_path / "report.html").read_text() == first
    assert [path.name for path in tmp_path.iterdir() if "report" in path.name] == ["report.html"]
