"""A rank that makes no progress ends itself; torch's elastic agent then starts all ranks again in place, and what they
were at is run again like after a kill (redo.py). No request is blamed for it.

Why not the collectives' own timeouts: they cannot tell a rank that hangs from one that computes for an hour. So those
are as good as off (megatron_adapters/runtime.py), and what counts is the time since this rank last got on: a
micro-batch, a decode step, an optimizer step. Only computing is watched. Loading a model, waiting for requests or for a
full disk, and writing files may take as long as they take.

A rank that is *stopped* (SIGSTOP, a debugger left behind) cannot end itself. Where others wait for it in a collective
they end, and their agent ends it with them; in any case launch/stopped.py sees it.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FLOOR_S = 1800.0
"""The least that is ever allowed: a first batch compiles kernels, a swapping node crawls."""
MANY_TIMES = 20.0
"""As slow as this beside the slowest so far is not slow any more."""
_UNMEASURED_TOKENS = 2048
"""What the floor is enough for while nothing has been measured: about a 70B model on one CPU (6 * 7e10 flop a token,
5e11 a second). More tokens get more, in proportion."""
_MEASURED_TOKENS = 512
"""Fewer say nothing about the speed: they take what a kernel launch takes."""


def allowed_s(num_tokens: int, slowest_s_per_token: float | None, floor_s: float) -> float:
    """How long computing so many tokens may take before the rank counts as hung (pure).

    Args: slowest_s_per_token: of all computed so far; None before the first that says anything.
    """
    if slowest_s_per_token is None:
        return floor_s * max(1.0, num_tokens / _UNMEASURED_TOKENS)
    return max(floor_s, MANY_TIMES * slowest_s_per_token * num_tokens)


def _end_then(seconds: float) -> None:
    faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # the descriptor: sys.stderr is wrapped (patience.py)


class HangWatch:
    """Ends this process when it does not get on. One per rank, called by the thread that computes.

    Args:
        arm: (seconds) -> None: end the process then; called again it begins anew. By default faulthandler's, whose
            watchdog is a thread of C: it needs no lock of Python's, writes where every thread stands to stderr, and
            exits with 1.
        disarm: undo it.
    """

    def __init__(
        self,
        floor_s: float = FLOOR_S,
        *,
        arm: Callable[[float], None] = _end_then,
        disarm: Callable[[], None] = faulthandler.cancel_dump_traceback_later,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._floor_s = floor_s
        self._arm = arm
        self._disarm = disarm
        self._clock = clock
        self._tokens: int | None = None
        self._since = 0.0
        self._slowest: float | None = None

    def expect(self, num_tokens: int = 0) -> None:
        """This rank got on, and will again within the time that so many tokens are allowed."""
        self._measure()
        self._tokens, self._since = num_tokens, self._clock()
        self._arm(allowed_s(num_tokens, self._slowest, self._floor_s))

    def rest(self) -> None:
        """Nothing is expected until the next `expect`."""
        self._measure()
        self._tokens = None
        self._disarm()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """What happens inside may take its time; afterwards the same is expected as before."""
        tokens = self._tokens
        self.rest()
        yield
        if tokens is not None:
            self.expect(tokens)

    def _measure(self) -> None:
        if self._tokens is not None and self._tokens >= _MEASURED_TOKENS:
            took = (self._clock() - self._since) / self._tokens
            self._slowest = max(self._slowest or 0.0, took)
