"""Every error tinker_hpc raises on purpose, in one tree.

    TinkerHpcError
    ├── ConfigError (ValueError)            the user's configuration or arguments
    │   ├── UnknownBaseModelError           no folder, cache entry or hub model of that name
    │   └── UnknownClusterError             no such [clusters.NAME] profile
    ├── SerializationError (TypeError)      the submitted function or an argument does not pickle
    ├── DataRootError (OSError)             the data root is missing, foreign, full or not private
    ├── CorruptLogError (ValueError)        a log segment fails its checksum or its framing
    ├── LeaseLostError (RuntimeError)       another worker took over; this one must stop writing
    ├── RequestError (ValueError)           one request is wrong; the model and client stay usable
    ├── ShapeError (ValueError)             tensors that do not fit, both shapes named
    ├── WeightsError (ValueError)           a checkpoint lacks, repeats or misshapes a tensor
    ├── UnknownRunError (KeyError)          no run of that id under the data root
    ├── SubmissionError (RuntimeError)      Slurm refused the job; its own words included
    ├── SlurmUnavailableError (RuntimeError)  a Slurm command failed or timed out
    ├── SessionError (RuntimeError)         a session's gateway did not start or end, or the session is closed
    ├── JobFailedError (RuntimeError)       the job ended before the loop did; says why
    │   ├── JobCancelledError
    │   ├── JobTimeLimitError
    │   ├── JobOutOfMemoryError
    │   ├── JobNodeFailError
    │   └── JobNeverStartedError
    └── LoopFailedError (RuntimeError)      the user's loop raised; carries the remote traceback

Adding one: derive from the nearest class *and* from the standard-library type a caller would expect, give it
one message argument plus keyword attributes, and let `__reduce__` below keep it picklable.
Messages say what was given, what was expected, where, and what to do next.
"""

from __future__ import annotations

from typing import Any


class TinkerHpcError(Exception):
    """Root of the tree. Keyword arguments become attributes and survive pickling."""

    def __init__(self, message: str = "", **attributes: Any) -> None:
        super().__init__(message)
        self.message = message
        self.attributes = attributes
        for name, value in attributes.items():
            setattr(self, name, value)

    def __str__(self) -> str:  # KeyError would print repr(message)
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.attributes)


def _rebuild(cls: type[TinkerHpcError], message: str, attributes: dict[str, Any]) -> TinkerHpcError:
    return cls(message, **attributes)


class ConfigError(TinkerHpcError, ValueError):
    """The user's configuration file, environment or arguments cannot be used as given."""


class UnknownBaseModelError(ConfigError):
    """No folder, cache entry or hub model of that name; the message lists where we looked."""


class UnknownClusterError(ConfigError):
    """No `[clusters.NAME]` profile of that name; the message lists the known ones."""


class SerializationError(TinkerHpcError, TypeError):
    """The submitted function, or one of its arguments, cannot be pickled; names which and why."""


class DataRootError(TinkerHpcError, OSError):
    """The data root cannot be used: missing, not ours, readable by others, read-only or full."""


class CorruptLogError(TinkerHpcError, ValueError):
    """A published log segment fails its checksum or framing; names the file and the offset."""


class LeaseLostError(TinkerHpcError, RuntimeError):
    """A later worker holds the lease; this one must stop writing results."""


class RequestError(TinkerHpcError, ValueError):
    """One request is wrong. Reaches the SDK as RequestFailedError(category="user")."""


class ShapeError(TinkerHpcError, ValueError):
    """Two tensors do not fit together; the message names both shapes."""


class WeightsError(TinkerHpcError, ValueError):
    """A model or adapter file lacks a tensor, has one too many, or one of the wrong shape."""


class UnknownRunError(TinkerHpcError, KeyError):
    """No run of that id under the data root."""


class SubmissionError(TinkerHpcError, RuntimeError):
    """The scheduler refused the job. The message carries its own words."""


class SlurmUnavailableError(TinkerHpcError, RuntimeError):
    """A Slurm command failed, timed out, or is not installed."""


class SessionError(TinkerHpcError, RuntimeError):
    """A session's gateway did not start, did not end, or the session is closed already."""


class JobFailedError(TinkerHpcError, RuntimeError):
    """The job ended before its work did. `reason` is Slurm's state, `log_paths` where to look."""

    reason: str = ""
    log_paths: tuple[str, ...] = ()


class JobCancelledError(JobFailedError):
    """Cancelled by the user or an administrator."""


class JobTimeLimitError(JobFailedError):
    """Killed at its time limit."""


class JobOutOfMemoryError(JobFailedError):
    """Killed for using more memory than it asked for."""


class JobNodeFailError(JobFailedError):
    """Its node went down."""


class JobNeverStartedError(JobFailedError):
    """Left the queue without ever running."""


class LoopFailedError(TinkerHpcError, RuntimeError):
    """The user's loop raised, or its command ended with `exit_code`. `remote_traceback` is the traceback as text."""

    remote_traceback: str = ""
    exit_code: int | None = None
    log_paths: tuple[str, ...] = ()
