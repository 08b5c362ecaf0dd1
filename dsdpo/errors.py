"""The errors a user can cause, one class per thing to look at. `assert` elsewhere means a bug of ours."""


class DsdpoError(Exception):
    """Something a user can put right. The message says what was given, what is allowed and what to do."""

    agreed = False  # every rank raises it, although they are no process group yet


class ConfigError(DsdpoError):
    """A run setting or DeepSpeed JSON is wrong; the message names the file and the dotted key."""


class DataError(DsdpoError):
    """Preference data cannot be used; the message names the source and the rows."""


class CacheError(DsdpoError):
    """Something stored by an earlier run does not belong to this one, or is damaged."""


class CheckpointError(DsdpoError):
    """A checkpoint cannot be written, or is not what the run asks for."""


class TrainingError(DsdpoError):
    """The run cannot go on: its numbers are not finite, or a rank is lost. The message says what to do."""


class LostRankError(TrainingError):
    """Another rank is gone; every rank that is left raises this for itself."""


class StoppedError(DsdpoError):
    """A signal, a file or a deadline asks the run to stop before it is done; the text says which. Not a failure."""
