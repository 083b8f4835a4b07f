"""When a rank counts as hung, and that it then ends by itself."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

from tinker_hpc.worker.hang import FLOOR_S, MANY_TIMES, HangWatch, allowed_s


def test_what_is_allowed_grows_with_the_work_and_with_the_machine() -> None:
    assert allowed_s(24, None, FLOOR_S) == FLOOR_S
    assert allowed_s(100_000, None, FLOOR_S) > 24 * 3600 / 2, "a first batch of long sequences on a slow machine"
    assert allowed_s(4096, 1e-4, FLOOR_S) == FLOOR_S, "a GPU: never less than the floor"
    assert allowed_s(32_768, 0.2, FLOOR_S) == MANY_TIMES * 0.2 * 32_768 > FLOOR_S


@dataclass
class Timers:
    """A clock that is set by hand, and what was armed."""

    now: float = 0.0
    armed: list[float | None] = field(default_factory=list)

    def watch(self, floor_s: float) -> HangWatch:
        disarm = lambda: self.armed.append(None)  # noqa: E731
        return HangWatch(floor_s, arm=self.armed.append, disarm=disarm, clock=lambda: self.now)


def test_the_watch_measures_what_it_saw() -> None:
    timers = Timers()
    watch = timers.watch(10.0)
    watch.expect(1024)
    timers.now = 8.0  # it computed at 128 tokens a second
    watch.expect(2048)
    assert timers.armed == [10.0, MANY_TIMES * 2048 / 128]
    timers.now = 9.0
    watch.rest()
    timers.now = 5000.0  # idle, or a full disk: no measure of speed
    watch.expect(2048)
    assert timers.armed[2:] == [None, MANY_TIMES * 2048 / 128]
    timers.now = 5100.0
    watch.expect(3)  # few tokens say nothing either
    timers.now = 5110.0
    watch.expect(1024)
    assert timers.armed[-1] == MANY_TIMES * 1024 * 100 / 2048


def test_what_waits_for_a_disk_is_not_counted() -> None:
    timers = Timers()
    watch = timers.watch(10.0)
    watch.expect(5)
    with watch.resting():
        assert timers.armed == [10.0, None]
    assert timers.armed == [10.0, None, 10.0]
    watch.rest()
    with watch.resting():
        pass
    assert timers.armed[3:] == [None, None], "what did not run before does not run afterwards"


def test_a_process_that_stands_still_says_where_and_ends() -> None:
    code = (
        "import threading\n"
        "from tinker_hpc.worker.hang import HangWatch\n"
        "def waits_for_another_rank(): threading.Event().wait(60)\n"
        "watch = HangWatch(0.2)\n"
        "watch.expect(); watch.rest(); watch.expect()\n"
        "waits_for_another_rank()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "Timeout" in done.stderr and "waits_for_another_rank" in done.stderr
