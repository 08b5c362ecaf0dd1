"""A user's own functions, called after what a run does: on rank 0, and never so that ranks could part."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dsdpo.distributed import gather_objects, rank
from dsdpo.errors import ConfigError, TrainingError
from dsdpo.run_folder import RunFolder

log = logging.getLogger(__name__)

Kind = Literal["step", "evaluate", "save"]
KINDS: tuple[Kind, ...] = ("step", "evaluate", "save")
OnError = Literal["stop", "report"]


@dataclass(frozen=True)
class Event:
    """What a callback is told; changing it changes nothing in the run."""

    kind: Kind
    step: int  # optimizer steps taken; of a save, by the checkpoint
    total_steps: int  # of the whole run
    metrics: dict[str, float]  # the row of metrics.jsonl; of a save, the evaluation of that step, if there was one
    output_dir: Path  # of the run
    checkpoint: Path | None = None  # of a save: the folder that was written

    def stop(self) -> None:
        """Ask the run to save and stop after this step, on all ranks, as `touch OUTPUT_DIR/STOP` does."""
        RunFolder(self.output_dir).stop_file.touch()


Callback = Callable[[Event], object]


@dataclass
class Callbacks:
    """The functions of a run and what to do where one fails."""

    on_step: Sequence[Callback] = ()
    on_evaluate: Sequence[Callback] = ()
    on_save: Sequence[Callback] = ()
    all_ranks: bool = False  # call them on every rank, not on rank 0 alone
    on_error: OnError = "stop"
    _reported: set[int] = field(default_factory=set)  # functions that failed, which are left out from then on

    def of(self, kind: Kind) -> Sequence[Callback]:
        """The functions that are called after such an event."""
        return {"step": self.on_step, "evaluate": self.on_evaluate, "save": self.on_save}[kind]

    def check_alike(self) -> None:
        """Raise `ConfigError` unless all ranks were given as many functions for each event. Collective.

        What a callback does is agreed by all ranks after each call, so a rank without any would be missed there.
        """
        own = (*(len(self.of(kind)) for kind in KINDS), self.all_ranks, self.on_error)
        for other, theirs in enumerate(gather_objects(own)):
            if theirs != own:
                raise ConfigError(
                    f"callbacks: rank {other} was given other callbacks than rank {rank()}: give the same to all "
                    "ranks; they are called on rank 0 alone, unless callbacks_on_all_ranks is true"
                )

    def call(
        self,
        kind: Kind,
        folder: RunFolder,
        step: int,
        total_steps: int,
        metrics: dict[str, float],
        *,
        checkpoint: Path | None = None,
    ) -> None:
        """Call the functions for an event, and agree on how that went. Collective if there are any.

        Raises `TrainingError` on all ranks where one failed and failures stop the run.
        """
        functions = self.of(kind)
        if not functions:
            return
        said = []
        if rank() == 0 or self.all_ranks:
            for function in functions:
                if id(function) not in self._reported:
                    event = Event(kind, step, total_steps, dict(metrics), folder.path.absolute(), checkpoint)
                    said.append(self._call(function, event))
        failures = gather_objects(next((each for each in said if each is not None), None))
        first = next((index for index, each in enumerate(failures) if each is not None), None)
        if first is not None and self.on_error == "stop":
            raise TrainingError(
                f"{failures[first]} (rank {first}). Mend it, or pass callback_errors='report' to go on without a "
                "callback that fails"
            )

    def _call(self, function: Callback, event: Event) -> str | None:
        """Call one function; what went wrong in it, if anything, which its rank has then said with its traceback."""
        name = getattr(function, "__qualname__", type(function).__name__)
        try:
            function(event)
        except (Exception, SystemExit) as error:
            what = f"the callback {name} failed after step {event.step}: {type(error).__name__}: {error}"
            if self.on_error == "report":
                log.warning("%s; it is not called again\n%s", what, traceback.format_exc())
                self._reported.add(id(function))
            else:
                log.error("%s\n%s", what, traceback.format_exc())
            return what
        return None
