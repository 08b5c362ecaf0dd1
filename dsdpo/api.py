"""dsdpo from Python: a run out of a dict, a YAML file or keyword arguments, trained and evaluated in this process.

    from dsdpo import Run, train

    run = Run("RUN.yaml", loss={"beta": 0.2})
    result = train(run, on_evaluate=lambda event: print(event.step, event.metrics["eval/loss"]))

Under a launcher every rank runs the same script: `deepspeed --num_gpus 8 script.py`. Importing this imports no torch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsdpo.accelerator import choose_accelerator
from dsdpo.config.load import check_deepspeed_files, check_run, dump_yaml, nested, read_yaml, run_path
from dsdpo.config.run import RunConfig
from dsdpo.console import quiet_libraries, say
from dsdpo.errors import ConfigError
from dsdpo.run_folder import RunFolder

if TYPE_CHECKING:
    from dsdpo.run.plan import Plan
    from dsdpo.training.callbacks import Event, OnError

    Given = Callable[[Event], object] | Sequence[Callable[[Event], object]]

PYTHON = "Run(...)"  # how errors name settings that came from Python


class Run:
    """The settings of a run, checked: what a run file says, from wherever it comes. Immutable."""

    settings: RunConfig
    source: str
    """Where the settings came from, as errors name it."""

    def __init__(self, settings: str | os.PathLike[str] | Mapping[str, Any] | None = None, /, **overrides: Any) -> None:
        """`settings`: a run file, a run folder (its config.yaml), or a mapping like a run file; `overrides` go on top.

        An override is a section (`loss={"beta": 0.2}`), laid over the file's section setting by setting, or a setting
        by its dotted name (`**{"loss.beta": 0.2}`). `data.train` and `data.eval` may also be a `datasets.Dataset` or a
        list of dicts, wherever a path may stand, and `deepspeed` and `reference.deepspeed` a dict. Such values are
        written to files beside the prepared data (data.cache_dir), so that the run's config.yaml runs again.

        Raises `ConfigError` or `DataError` (both `DsdpoError`) listing everything wrong. No model is looked at.
        """
        folder = None
        if isinstance(settings, (str, os.PathLike)):
            path = run_path(os.fspath(settings))
            path = RunFolder(path).config if path.is_dir() else path
            content, source, folder = read_yaml(path), str(path), path.parent
        elif settings is None or isinstance(settings, Mapping):
            content, source = nested(settings or {}, PYTHON), PYTHON
        else:
            raise ConfigError(f"{PYTHON}: got a {type(settings).__name__}: give a run file, a run folder or a mapping")
        given = nested(overrides, PYTHON)
        content, given = (in_files(each, _cache_dir(given, content)) for each in (content, given))
        checked = check_run(content, given, source=source, folder=folder, over=PYTHON)
        object.__setattr__(self, "settings", checked)
        object.__setattr__(self, "source", source)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Run does not change: make another one, Run(run.to_dict(), {name}=...)")

    def __repr__(self) -> str:
        return f"Run({self.settings.model.path!r}, {self.settings.loss.describe()}, {self.settings.output_dir!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Run) and other.settings == self.settings

    __hash__ = None  # type: ignore[assignment]

    @property
    def output_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.settings.output_dir)

    def to_dict(self) -> dict[str, Any]:
        """Every setting, nested as in a run file; `Run(run.to_dict())` is the same run."""
        return self.settings.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The text of a run file with every setting."""
        return dump_yaml(self.settings)


@dataclass(frozen=True)
class Result:
    """What became of a run, read from its folder."""

    output_dir: Path
    step: int  # optimizer steps taken
    stopped: str | None  # why it stopped before it was done (signal, file, deadline); None: it was done
    metrics: list[dict[str, float]]  # training rows, by step; names as in metrics.jsonl
    evaluations: list[dict[str, float]]  # rows with `eval/...`, by step
    model: Path | None  # the exported Hugging Face folder or adapter; None: the run has stopped early
    checkpoints: list[Path]  # whole ones, oldest first

    @property
    def last_evaluation(self) -> dict[str, float]:
        """The last held-out metrics; empty without held-out pairs."""
        return self.evaluations[-1] if self.evaluations else {}


def train(
    run: Run | str | os.PathLike[str] | Mapping[str, Any],
    *,
    on_step: Given = (),
    on_evaluate: Given = (),
    on_save: Given = (),
    callbacks_on_all_ranks: bool = False,
    callback_errors: OnError = "stop",
    quiet: bool = False,
    verbose: bool = False,
) -> Result:
    """Train a run to its end, as `dsdpo train` does; what became of it, the same on all ranks. Collective.

    Callbacks are functions of one `Event`, or lists of such: `on_step` after each row of metrics
    (tracking.every_steps), `on_evaluate` after each evaluation, `on_save` after each checkpoint. They run on rank 0
    while the others wait, so they must not call anything collective; with `callbacks_on_all_ranks` they run on every
    rank, and may. What one raises is agreed by all ranks: `callback_errors="stop"` ends the run with `TrainingError`
    everywhere, "report" logs the traceback, goes on, and leaves that callback out from then on. `event.stop()` saves
    and stops the run.

    `quiet` leaves the plan and the results table out; `verbose` shows what DeepSpeed and transformers have to say.
    Raises `DsdpoError`: what the command would end with, exit code and all, is an exception here.
    """
    run = run if isinstance(run, Run) else Run(run)
    if callback_errors not in ("stop", "report"):
        raise ConfigError(f"callback_errors is {callback_errors!r}: give stop or report")
    functions = [_functions("on_step", on_step), _functions("on_evaluate", on_evaluate), _functions("on_save", on_save)]
    plan = _planned(run, verbose=verbose, quiet=quiet)

    from dsdpo.commands.train import train as train_plan
    from dsdpo.distributed import broadcast_object, rank
    from dsdpo.training.callbacks import Callbacks
    from dsdpo.training.lost_ranks import watched_ranks

    callbacks = Callbacks(
        functions[0], functions[1], functions[2], all_ranks=callbacks_on_all_ranks, on_error=callback_errors
    )
    callbacks.check_alike()
    with watched_ranks(lost_after=plan.run.distributed.lost_after):
        train_plan(plan, callbacks, quiet=quiet)
    result = broadcast_object(read_result(plan.run.output_dir) if rank() == 0 else None)
    assert result is not None
    return result


def evaluate(
    run: Run | str | os.PathLike[str] | Mapping[str, Any],
    *,
    data: Any = None,
    checkpoint: str | None = None,
    verbose: bool = False,
) -> dict[str, float]:
    """Held-out metrics (`eval/...`) of a policy anchored to its reference, as training would have them. Collective.

    The folder of a trained run, given as a path, stands for what was trained: the exported model, or that of
    `checkpoint` ("last", "best" or a step). Anything else stands for the model that a run starts from. `data`, given
    like `data.eval`, takes the place of the run's own held-out pairs. Raises `DsdpoError`.
    """
    with _judging(run, data, checkpoint, verbose=verbose) as (what, settings, source):
        from dsdpo.run.evaluation import evaluate_judged

        return evaluate_judged(what, list(settings.data.eval or ()), run_file=source)


def score(
    run: Run | str | os.PathLike[str] | Mapping[str, Any],
    *,
    data: Any = None,
    checkpoint: str | None = None,
    tokens: bool = False,
    verbose: bool = False,
) -> dict[str, Any]:
    """Log-probs, rewards and margin of each pair, as columns by name, in the order of the rows. Collective.

    Which policy, and `data`, as for `evaluate`. Columns are those of `dsdpo score`, (n,) each and the same on all
    ranks; with `tokens` also, on rank 0, lists of the id and log-prob of each learned token. Log-probs are kept in the
    store of precomputed ones and taken from there the next time. Raises `DsdpoError`.
    """
    with _judging(run, data, checkpoint, verbose=verbose) as (what, settings, source):
        from dsdpo.engine.build import device
        from dsdpo.run.scores import score_judged
        from dsdpo.stop_request import StopRequest

        stop = StopRequest(None, deadline=None, device=device())
        sources = list(settings.data.eval or ())
        return score_judged(what, sources, run_file=source, stop=stop, tokens=tokens)[0]


@contextmanager
def _judging(given: Any, data: Any, checkpoint: str | None, *, verbose: bool) -> Iterator[tuple[Any, RunConfig, str]]:
    """The policy and reference that `given` stands for, the settings with `data` in them, and their source."""
    run = given if isinstance(given, Run) else Run(given)
    if data is not None:
        run = Run(run.to_dict(), **{"data.eval": data})
    if not run.settings.data.eval:
        raise ConfigError(f"{run.source}: data.eval is null: give the pairs to judge by, there or as data=")
    _quiet(verbose=verbose)

    from dsdpo.objective.losses import check_registered
    from dsdpo.run.finished import open_run
    from dsdpo.run.judge import judged
    from dsdpo.training.lost_ranks import watched_ranks

    check_registered(run.settings.loss)
    folder = Path(given).expanduser() if isinstance(given, (str, os.PathLike)) else None
    finished = open_run(folder) if folder is not None and RunFolder(folder).metrics.is_file() else None
    lost_after = run.settings.distributed.lost_after
    with watched_ranks(lost_after=lost_after), judged(run.settings, finished, checkpoint=checkpoint) as what:
        yield what, run.settings, run.source


def read_result(folder: str | os.PathLike[str]) -> Result:
    """What became of the run in a folder, also of one that another process trained. Raises `ConfigError`."""
    import json

    from dsdpo.training.checkpoint import whole_checkpoints
    from dsdpo.training.jsonl import read_metrics

    files = RunFolder(Path(folder).expanduser())
    if not files.metrics.is_file():
        raise ConfigError(f"{folder}: no metrics.jsonl; give the output_dir of a run")
    metrics, evaluations = read_metrics(files.path)
    stopped = json.loads(files.stopped.read_text(encoding="utf-8")) if files.stopped.is_file() else {}
    return Result(
        output_dir=files.path,
        step=int(max((row["step"] for row in (*metrics, *evaluations)), default=0)),
        stopped=stopped.get("reason"),
        metrics=metrics,
        evaluations=evaluations,
        model=files.model if files.model.is_dir() and not stopped else None,
        checkpoints=whole_checkpoints(files.checkpoints),
    )


def _planned(run: Run, *, verbose: bool, quiet: bool) -> Plan:
    """The plan of a run, said unless `quiet`. Collective."""
    check_deepspeed_files(run.settings)
    _quiet(verbose=verbose)

    from dsdpo.objective.losses import check_registered
    from dsdpo.run.plan import plan_run
    from dsdpo.run.summary import describe_plan

    check_registered(run.settings.loss)
    plan = plan_run(run.settings, run_file=run.source)
    if not quiet:
        say(describe_plan(plan))
    return plan


def _quiet(*, verbose: bool) -> None:
    """Choose the device, and keep libraries to warnings unless `verbose`."""
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="torch|deepspeed")
    choose_accelerator(computes=True)
    quiet_libraries(verbose=verbose)


def _functions(name: str, given: Any) -> tuple[Any, ...]:
    """One function or several, as several. Raises `ConfigError` for what cannot be called."""
    functions = (given,) if callable(given) else tuple(given) if isinstance(given, (list, tuple)) else (given,)
    for function in functions:
        if not callable(function):
            raise ConfigError(f"{name}: {function!r} cannot be called: give a function of one Event, or several")
    return functions


def _cache_dir(*levels: Mapping[str, Any]) -> Any:
    """The first data.cache_dir that is given."""
    sections = [level.get("data") for level in levels]
    return next((each["cache_dir"] for each in sections if isinstance(each, dict) and each.get("cache_dir")), None)


def in_files(content: dict[str, Any], cache_dir: Any) -> dict[str, Any]:
    """Settings with paths in place of rows and DeepSpeed configs that are in memory. Raises `DataError`."""
    data, reference = content.get("data"), content.get("reference")
    found = dict(content)
    if isinstance(data, dict) and any(not isinstance(data.get(key), (str, type(None))) for key in ("train", "eval")):
        from dsdpo.data.rows import with_files

        found["data"] = data | {
            key: with_files(data[key], f"data.{key}", lambda: _folder(cache_dir, "rows"))
            for key in ("train", "eval")
            if key in data
        }
    if isinstance(content.get("deepspeed"), Mapping):
        found["deepspeed"] = _json_file(content["deepspeed"], "deepspeed", cache_dir)
    if isinstance(reference, dict) and isinstance(reference.get("deepspeed"), Mapping):
        written = _json_file(reference["deepspeed"], "reference.deepspeed", cache_dir)
        found["reference"] = reference | {"deepspeed": written}
    return found


def _folder(cache_dir: Any, name: str) -> Path:
    """A folder beside the prepared data."""
    import datasets

    return Path(cache_dir or datasets.config.HF_DATASETS_CACHE).expanduser() / "dsdpo" / name


def _json_file(config: Mapping[str, Any], key: str, cache_dir: Any) -> str:
    """A DeepSpeed config as a file named by its content; the path. Raises `ConfigError`."""
    import hashlib
    import json

    from dsdpo.atomic import write_text

    try:
        text = json.dumps(dict(config), indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{PYTHON}: {key} holds what JSON has no word for ({error})") from None
    path = _folder(cache_dir, "deepspeed") / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text, shared=True)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir: {path.parent} cannot be written ({error}). Give a folder that can."
        ) from None
    return str(path)
