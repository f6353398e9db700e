"""lm-eval on a loaded checkpoint: one task a call, its own files as it writes them, our scores beside them."""

import difflib
import functools
import hashlib
import json
import math
import shutil
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from lm_eval import simple_evaluate
from lm_eval.api.model import CacheHook
from lm_eval.loggers import EvaluationTracker
from lm_eval.loggers.utils import get_commit_from_path
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import LogitsProcessor, LogitsProcessorList

from ssmcompress import parallel
from ssmcompress.arch.backbone import reduces
from ssmcompress.checkpoint.source import Checkpoint
from ssmcompress.errors import InputError, ResourceError, SsmcompressError
from ssmcompress.evaluate.hush import quiet
from ssmcompress.evaluate.scores import Scored, scored
from ssmcompress.evaluate.suites import TASKS, Entry, shipped
from ssmcompress.events import Advance, Emit, Phase
from ssmcompress.measure.continuations import likelihoods
from ssmcompress.paths import expanded

CODE = (".yaml", ".yml", ".py")
BOOTSTRAP = 1000  # resamples of lm-eval's own standard errors, where a metric has no closed form


class Harness:
    """lm-eval's tasks, the shipped ones, and those of a folder of the user's, which go before the others."""

    def __init__(self, names: Sequence[str], include_path: str | Path | None = None) -> None:
        folders = [shipped(TASKS)]
        if include_path is not None:
            folders.append(expanded(include_path))
            if not folders[-1].is_dir():
                raise InputError(f"There is no folder {include_path}.", hint="--include-path holds task YAML files.")
        self._paths = [str(folder) for folder in folders]
        with quiet(_nothing):
            self._tasks = TaskManager(include_path=self._paths, include_defaults=False)
            if not set(names) <= set(self._tasks.all_subtasks):  # reading lm-eval's thousands of files takes seconds
                files = [path for folder in self._paths for path in sorted(Path(folder).rglob("*"))]
                self._tasks = _all_tasks(tuple(self._paths), tuple((path, path.stat().st_mtime_ns) for path in files))
        self.measures: dict[str, tuple[str, ...]] = {}  # of each task, as samples.jsonl calls them
        for name in names:
            found = self._required(name)
            if twice := found.keys() & self.measures.keys():
                raise InputError(
                    f"The task {name} measures again what another one does: {', '.join(sorted(twice))}.",
                    hint="Name a group, or tasks of it.",
                )
            self.measures |= found

    def _required(self, name: str) -> dict[str, tuple[str, ...]]:
        """The measures of a task or of each in a group.

        Raises InputError or ResourceError for one that is not there, or whose data cannot be had.
        """
        if name not in self._tasks.all_tasks:
            close = difflib.get_close_matches(name, self._tasks.all_tasks, n=3)
            hint = f"Did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists them."
            raise InputError(f"There is no task {name!r}.", hint=hint)
        with _readable(name), quiet(_nothing):
            try:
                loaded = self._tasks.load([name])["tasks"]
                return {task: _measures(task, made) for task, made in loaded.items()}
            except (OSError, ImportError, HfHubHTTPError, MemoryError):
                raise
            except Exception as error:  # a task may run any code of its own
                raise _unfit(name, "cannot be loaded", error) from error

    def identity(self) -> dict[str, Any]:
        """What decides the prompts and scores: versions, and the hashes of the task files beside lm-eval's own."""
        files = [path for folder in self._paths for path in sorted(Path(folder).rglob("*")) if path.suffix in CODE]
        return {"versions": versions(), "files": [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]}

    def record(self, seed: int) -> dict[str, Any]:
        """What summary.json keeps of the harness."""
        return {"harness_versions": versions(), "seeds": seeds(seed)}

    def run(
        self, checkpoint: Checkpoint, entry: Entry, place: Path, *, batch_size: int, seed: int, emit: Emit
    ) -> Scored:
        """Runs one task; lm-eval's files go into the folder `place`, in place of what an interrupted run left there.

        Raises InputError where the model gives no number, ResourceError where the files cannot be written.
        """
        if parallel.first():
            shutil.rmtree(place, ignore_errors=True)
        tracker = EvaluationTracker(output_path=str(place))
        with _readable(entry.task), quiet(emit) as (told, said), _tame():
            try:
                found = simple_evaluate(
                    model=Model(checkpoint, entry.task, batch_size, told),
                    model_args={"pretrained": checkpoint.label},
                    tasks=[entry.task],
                    task_manager=self._tasks,
                    num_fewshot=entry.num_fewshot,
                    limit=entry.limit,
                    batch_size=batch_size,
                    device=str(checkpoint.model.device),
                    bootstrap_iters=BOOTSTRAP,
                    evaluation_tracker=tracker,
                    **{f"{name}_seed": value for name, value in seeds(seed).items()},
                )
            except OverflowError as error:
                raise no_number(checkpoint.name, entry.task) from error
            except Exception as error:
                if not _from(error, self._paths[1:]):
                    raise
                raise _unfit(entry.task, "fails in code of its own", error) from error
            result = scored(found, entry)
            samples = found.pop("samples")
            if parallel.first():
                tracker.save_results_aggregated(results=found, samples=samples)
                for name in samples:
                    tracker.save_results_samples(task_name=name, samples=samples[name])
        if parallel.first():
            _require_files(place, {name: len(rows) for name, rows in samples.items()}, said)
        for score in result.scores:
            if not math.isfinite(score.value):
                raise no_number(checkpoint.name, entry.task)
        return result


@functools.lru_cache(maxsize=2)
def _all_tasks(folders: tuple[str, ...], files: tuple[tuple[Path, int], ...]) -> TaskManager:
    """The tasks of lm-eval and those of folders, read again where one of their files has changed since."""
    return TaskManager(include_path=list(folders))


class Model(HFLM):
    """The loaded model as lm-eval drives it: its batching, padding and stopping, our events for its bars."""

    def __init__(self, checkpoint: Checkpoint, task: str, batch_size: int, emit: Emit) -> None:
        super().__init__(
            pretrained=checkpoint.model, tokenizer=checkpoint.tokenizer, backend="causal", batch_size=batch_size
        )
        self.pretrained = ""  # else its report asks the hub for a model
        self._task, self._emit, self._name = task, emit, checkpoint.name
        self.set_cache_hook(_Answers(self))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihoods in nats of continuations, and whether each is the greedy one."""
        mine = self._begin(requests)
        return parallel.gathered(super().loglikelihood(mine, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihoods in nats of whole texts, each token predicted once."""
        mine = self._begin(requests)
        return parallel.gathered(super().loglikelihood_rolling(mine, disable_tqdm=disable_tqdm))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Continuations up to a stop string."""
        mine = self._begin(requests)
        return parallel.gathered(super().generate_until(mine, disable_tqdm=disable_tqdm))

    def _begin(self, requests: list[Any]) -> list[Any]:
        """The requests that are this process's."""
        mine: list[Any] = parallel.share(requests)
        self._emit(Phase(self._task, len(mine)))
        return mine

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **settings: Any) -> list[tuple[float, bool]]:
        """As lm-eval does it; where tokens leave, so that none leaves whose prediction is scored."""
        if not reduces(self.model):
            return super()._loglikelihood_tokens(requests, *args, **settings)
        pairs = [(context, after) for _, context, after in requests]
        found: list[Any] = [None] * len(pairs)
        for i, *answer in likelihoods(self.model, pairs, batch=int(self.batch_size), longest=self.max_length):
            found[i] = tuple(answer)
            self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def _model_generate(self, *args: Any, **settings: Any) -> torch.Tensor:
        return super()._model_generate(*args, **settings, logits_processor=LogitsProcessorList([_Numbers(self)]))

    def answered(self, answer: Any) -> None:
        """Counts a finished request; InputError where its log-likelihood is no number."""
        likelihood = answer[0] if isinstance(answer, tuple) else answer
        if isinstance(likelihood, float) and math.isnan(likelihood):
            raise self.no_number()
        self._emit(Advance())

    def no_number(self) -> InputError:
        """The error of a model that gives NaN."""
        return no_number(self._name, self._task)


class _Answers(CacheHook):
    """Where lm-eval tells of every finished request: its cache of answers, of which none is kept here."""

    def __init__(self, model: Model) -> None:
        super().__init__(None)
        self._model = model

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._model.answered(res)


class _Numbers(LogitsProcessor):
    """Ends a generation whose logits are NaN: the likeliest of them would be written as if it were an answer."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise self._model.no_number()
        return scores


@contextmanager
def _tame() -> Iterator[None]:
    """No pool of processes for the bootstrap: a fork beside threads may hang; no git that complains on the terminal.

    Of several processes, which share every task's requests, lm-eval would let the first alone have the results.
    """
    commit = patch("lm_eval.evaluator.get_git_commit_hash", lambda: get_commit_from_path(Path.cwd()))
    with patch.dict("os.environ", DISABLE_MULTIPROC="1", LOCAL_RANK="0"), commit:
        yield


def versions() -> dict[str, str]:
    """The versions that decide what is asked of the model, beside those of the manifest."""
    return {name: version(name) for name in ("lm_eval", "datasets", "tokenizers")}


def seeds(seed: int) -> dict[str, int]:
    """lm-eval's four seeds: its own defaults where ours is 0."""
    shifted = (1234 + seed) % 2**32  # numpy takes no more
    return {"random": seed, "numpy_random": shifted, "torch_random": shifted, "fewshot_random": shifted}


def no_number(model: str, task: str) -> InputError:
    """The error of a model whose log-likelihoods are NaN or infinite."""
    return InputError(
        f"{model} gives NaN or infinite log-likelihoods on {task}: there is no score.",
        hint="Its weights are finite, but their products are not: use another checkpoint, or --dtype float32.",
    )


def _nothing(_: Any) -> None:
    pass


def _measures(task: str, made: Any) -> tuple[str, ...]:
    """What the items of a loaded task are called: by metric and filter."""
    filters = [each.name for each in getattr(made, "_filters", ())] or ["none"]
    return tuple(
        f"{task}/{metric}" + ("" if name == "none" else f",{name}") for name in filters for metric in made.aggregation()
    )


def _from(error: BaseException, folders: Sequence[str]) -> bool:
    """Whether an error passed through Python files in these folders, or comes from a template of a YAML."""
    files = [Path(frame.filename).resolve() for frame in traceback.extract_tb(error.__traceback__)]
    own = any(file.is_relative_to(Path(folder).resolve()) for file in files for folder in folders)
    return own or type(error).__module__.startswith("jinja2")


def _unfit(task: str, why: str, error: Exception) -> InputError:
    """The error of a task that is not written as lm-eval wants it."""
    said = " ".join(str(error).split())
    return InputError(
        f"The task {task} {why}: {type(error).__name__}{f': {said}' if said else ''}.",
        hint="Check its files against lm-eval's task guide.",
    )


@contextmanager
def _readable(task: str) -> Iterator[None]:
    """Says what is wrong with a task in a sentence: lm-eval and datasets raise almost anything."""
    try:
        yield
    except (SsmcompressError, MemoryError, torch.OutOfMemoryError):
        raise
    except (ConnectionError, HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise _offline(task) from error
    except ModuleNotFoundError as error:
        raise ResourceError(
            f"The task {task} needs the package {error.name}.", hint=f"Install it: pip install {error.name}."
        ) from error
    except FileNotFoundError as error:  # what datasets raises for an unknown or gated one, among others
        raise InputError(
            f"The data of the task {task} is not there: {' '.join(str(error).split())}",
            hint="Check the paths in its YAML file; a private or gated data set needs `hf auth login`.",
        ) from error


def _offline(task: str) -> InputError:
    return InputError(
        f"The data of the task {task} cannot be fetched: the hub cannot be reached, and its cache does not hold it.",
        hint="Connect and unset HF_HUB_OFFLINE, or take a task over shipped data, such as lambada_openai_local.",
    )


def _require_files(place: Path, expected: dict[str, int], said: list[str]) -> None:
    """ResourceError unless lm-eval's files are there and whole: its tracker logs what went wrong and goes on."""
    try:
        (results,) = place.rglob("results_*.json")
        json.loads(results.read_text(encoding="utf-8"))
        for name, count in expected.items():
            (samples,) = place.rglob(f"samples_{name.replace('/', '__')}_*.jsonl")
            lines = samples.read_text(encoding="utf-8").split("\n")
            if len(lines) != count + 1:
                raise ValueError(f"{samples.name} has {len(lines) - 1} lines of {count}")
    except (OSError, ValueError) as error:
        why = next((line for line in reversed(said) if "Error" in line), str(error))
        raise ResourceError(
            f"lm-eval could not write its results into {place}: {why}.",
            hint="Make room, or choose another folder with --out.",
        ) from error
