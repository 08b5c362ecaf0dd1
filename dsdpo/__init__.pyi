"""For type checkers: what `__init__.py` imports when it is used."""

from dsdpo.api import Result as Result
from dsdpo.api import Run as Run
from dsdpo.api import evaluate as evaluate
from dsdpo.api import read_result as read_result
from dsdpo.api import score as score
from dsdpo.api import train as train
from dsdpo.errors import DsdpoError as DsdpoError
from dsdpo.objective.logps import PairLogps as PairLogps
from dsdpo.objective.losses.registered import register_loss as register_loss
from dsdpo.training.callbacks import Event as Event

__version__: str
__all__ = [
    "DsdpoError",
    "Event",
    "PairLogps",
    "Result",
    "Run",
    "evaluate",
    "read_result",
    "register_loss",
    "score",
    "train",
]
