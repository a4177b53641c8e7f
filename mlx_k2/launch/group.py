"""All stage processes of one run, started together, kept alive by one heartbeat and ended together. Knows no steps."""

import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence

from mlx_k2.launch.stage_events import StageEvent, Woken
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.launch.stage_process import StageProcess
from mlx_k2.protocol.guard_messages import GuardSettings, StageStatus, kill_after_s
from mlx_k2.protocol.messages import Stop, ToStage

HEARTBEAT_S = 1.0
NOTIFY_AFTER_S = 1.0  # time after which the user is told for which stages the exit waits
GUARD_MARGIN_S = 2.0
"""Time that the guard and ssh may take beyond the time that the guard gives the stage to end."""
STALL_TIMEOUT_S = 7.0
"""Default stall timeout. It is longer than the 6 s after which ssh ends a silent connection (ssh.py), because ssh's
error describes a lost connection better. After a stage has sent all of a step, 6 MB that are still on the way
arrive in time even at 7 Mbit/s."""
AFTER_SIGTERM_S = 2.0  # time for local processes to end after the signal
AFTER_SIGKILL_S = 2.0


class StageGroup:
    """A context manager that starts all stages on entry, and ends all stages on all hosts on exit.

    ``log`` receives every line of every stage's stderr, and lines about its start and end, with the stage's rank and
    host. It is called on the stage's own threads and must not block. ``notify`` (default: ``log``) receives lines about
    stages that do not end at once. Once ``cancelled`` is set, HealthMonitor raises Cancelled. Every stage starts with
    the ``NAME=value`` lines of ``environment``.
    """

    def __init__(
        self,
        locations: Sequence[StageLocation],
        lease_s: float,
        log: Callable[[str], None],
        notify: Callable[[str], None] | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
        cancelled: threading.Event | None = None,
        environment: Sequence[str] = (),
    ) -> None:
        self.stall_timeout_s = stall_timeout_s
        """Time to wait for a stopped stage, a silent host or a stuck hop."""
        self.cancelled = cancelled or threading.Event()
        self._locations = tuple(locations)
        self._notify = notify or log
        self._events: queue.SimpleQueue[StageEvent] = queue.SimpleQueue()
        """Bounded by the stages, which send only answers, and by the callers of ``wake``."""
        settings = GuardSettings(lease_s=lease_s, environment=tuple(environment))
        self._stages = [
            StageProcess(rank, location, settings, self._events.put, log)
            for rank, location in enumerate(self._locations)
        ]
        self._stopping = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "StageGroup":
        try:
            for stage in self._stages:
                stage.start()
            self._heartbeat.start()
        except BaseException:  # __exit__ is not called after an exception here
            self.stop(self._notify)
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop(self._notify)

    @property
    def size(self) -> int:
        """The number of stages."""
        return len(self._locations)

    def location(self, rank: int) -> StageLocation:
        """Return the location of stage ``rank``."""
        return self._locations[rank]

    def host(self, rank: int) -> str:
        """Return the name of a stage's host, for messages."""
        return self._locations[rank].host

    @property
    def has_event(self) -> bool:
        """True if ``receive`` would return an event at once."""
        return not self._events.empty()

    def wake(self) -> None:
        """End the present or next ``receive`` with Woken. Any thread may call this."""
        self._events.put(Woken())

    def receive(self, timeout_s: float) -> StageEvent | None:
        """Return the next message or end of any stage, or Woken; None if there is none within ``timeout_s``."""
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def send(self, rank: int, message: ToStage) -> None:
        """Queue a message for one stage. Do not block. Drop the message if the stage has ended."""
        self._stages[rank].send(message)

    def send_all(self, message: ToStage) -> None:
        """Queue a message for every stage."""
        for stage in self._stages:
            stage.send(message)

    def set_held_bytes(self, rank: int, held_bytes: int) -> None:
        """Set how much memory a stage holds; a stage that holds more gets more time to end."""
        self._stages[rank].set_held_bytes(held_bytes)

    def silence_s(self, rank: int) -> float:
        """Return the time since the last frame from the stage's guard, which answers a heartbeat every second."""
        return time.monotonic() - self._stages[rank].received_at

    def has_started(self, rank: int) -> bool:
        """Return whether the stage's guard has sent its opening mark."""
        return self._stages[rank].has_started

    def status(self, rank: int) -> StageStatus:
        """Return the stage's status as last reported by its guard."""
        return self._stages[rank].status

    def stop(self, notify: Callable[[str], None]) -> None:
        """End all stages at once: send Stop, close their input, then send SIGTERM and SIGKILL to what still runs here.

        Each host's guard ends its stage by the same means, so a signal from here is for an ssh client or a guard that
        does not end in time. This takes at most the time that the largest stage has to end, plus GUARD_MARGIN_S,
        AFTER_SIGTERM_S and AFTER_SIGKILL_S. A second call does nothing.
        """
        self._stopping.set()
        self.send_all(Stop())
        for stage in self._stages:
            stage.close()
        if not self._wait(NOTIFY_AFTER_S):
            timeout_s = max(kill_after_s(stage.held_bytes) for stage in self._stages) + GUARD_MARGIN_S
            for stage in self._running():
                held = f", which holds {stage.held_bytes / 1e9:.1f} GB" if stage.held_bytes else ""
                notify(f"waiting for stage {stage.rank} on {stage.location.host}{held}, at most {timeout_s:.0f} s")
            self._wait(timeout_s - NOTIFY_AFTER_S)
        for number, wait_s in ((signal.SIGTERM, AFTER_SIGTERM_S), (signal.SIGKILL, AFTER_SIGKILL_S)):
            for stage in self._running():
                notify(f"stage {stage.rank} on {stage.location.host} has not ended: sending {number.name}")
                stage.send_signal(number)
                stage.send_signal(signal.SIGCONT)  # a suspended process receives SIGTERM after it
            self._wait(wait_s)
        if self._heartbeat.is_alive():
            self._heartbeat.join(HEARTBEAT_S)

    def _running(self) -> list[StageProcess]:
        return [stage for stage in self._stages if not stage.wait(0)]

    def _wait(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s`` for every stage to end; return whether all have."""
        deadline = time.monotonic() + timeout_s
        return all(stage.wait(max(0.0, deadline - time.monotonic())) for stage in self._stages)

    def _beat(self) -> None:
        number = 0
        while not self._stopping.wait(HEARTBEAT_S):
            number += 1
            for stage in self._stages:
                stage.beat(number.to_bytes(8, "little"))
