"""All stage processes of one run: started together, kept alive by one heartbeat, ended together. Knows no steps."""

import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from mlx_k2.launch.stage_events import StageEvent
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.launch.stage_process import StageProcess
from mlx_k2.protocol.guard_messages import GuardSettings, kill_after_s
from mlx_k2.protocol.messages import Stop, ToStage
from mlx_k2.protocol.stage_status import StageStatus

HEARTBEAT_S = 1.0
NOTIFY_AFTER_S = 1.0
GUARD_MARGIN_S = 2.0
"""What the guard and ssh may take beyond the time that the guard gives the stage."""
STALL_TIMEOUT_S = 7.0
"""Above ssh's own 6 s: it says more of a lost connection. A hop's last 6 MB arrive in it at 6 Mbit/s."""
TERM_S = 2.0
KILL_S = 2.0


class StageGroup:
    """A context: on entry all stages are started, on exit none is left, on any host.

    ``log`` gets every line of every stage's stderr, prefixed, on the stage's own threads; it must not block. ``notify``
    (else ``log``) is told what the exit waits for.
    """

    def __init__(
        self,
        locations: Sequence[StageLocation],
        lease_s: float,
        log: Callable[[str], None],
        notify: Callable[[str], None] | None = None,
        stall_timeout_s: float = STALL_TIMEOUT_S,
    ) -> None:
        self.stall_timeout_s = stall_timeout_s
        """How long a stopped stage, a silent host or a stuck hop is waited for."""
        self._locations = tuple(locations)
        self._settings = GuardSettings(lease_s=lease_s)
        self._log = log
        self._notify = notify or log
        self._events: queue.SimpleQueue[StageEvent] = queue.SimpleQueue()  # as many as there are plans in flight
        self._stages: list[StageProcess] = []
        self._stopping = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "StageGroup":
        for rank, location in enumerate(self._locations):
            self._stages.append(StageProcess(rank, location, self._settings, self._events.put, self._log))
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(self._notify)

    @property
    def size(self) -> int:
        """How many stages there are."""
        return len(self._locations)

    def host(self, rank: int) -> str:
        """The name of a stage's machine, for people."""
        return self._locations[rank].host

    def receive(self, timeout_s: float) -> StageEvent | None:
        """The next thing that a stage said, or its end; None when nothing came for ``timeout_s``."""
        try:
            return self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def send(self, rank: int, message: ToStage) -> None:
        """Queue a message for one stage. Never waits; for a stage that has ended it is dropped."""
        self._stages[rank].send(message)

    def send_all(self, message: ToStage) -> None:
        """Queue a message for every stage."""
        for stage in self._stages:
            stage.send(message)

    def set_held_bytes(self, rank: int, held_bytes: int) -> None:
        """Say how much memory a stage holds: it is given time to free it when it ends."""
        self._stages[rank].set_held_bytes(held_bytes)

    def silence_s(self, rank: int) -> float:
        """How long ago the stage's guard was last heard: once it is up, it answers a heartbeat every second."""
        return time.monotonic() - self._stages[rank].heard_at

    def has_come_up(self, rank: int) -> bool:
        """Whether the stage's guard has spoken."""
        return self._stages[rank].came_up

    def status(self, rank: int) -> StageStatus:
        """Where the stage stood when its guard was last heard."""
        return self._stages[rank].status

    def stop(self, notify: Callable[[str], None]) -> None:
        """End all stages at once: a message and the end of their input, then SIGTERM, then SIGKILL to what runs here.

        Each host's guard gives its stage the same treatment, so a signal from here is for an ssh client or a guard
        that does not answer. Bounded by the time that the largest stage is given. A second call does nothing.
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
        for number, wait_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, KILL_S)):
            for stage in self._running():
                notify(f"stage {stage.rank} on {stage.location.host} has not ended: sending {number.name}")
                stage.send_signal(number)
                stage.send_signal(signal.SIGCONT)  # a stopped process sees SIGTERM no sooner
            self._wait(wait_s)
        if self._heartbeat.is_alive():
            self._heartbeat.join(HEARTBEAT_S)

    def _running(self) -> list[StageProcess]:
        return [stage for stage in self._stages if not stage.wait(0)]

    def _wait(self, timeout_s: float) -> bool:
        """Whether every stage has ended, waiting for that at most ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        return all(stage.wait(max(0.0, deadline - time.monotonic())) for stage in self._stages)

    def _beat(self) -> None:
        number = 0
        while not self._stopping.wait(HEARTBEAT_S):
            number += 1
            for stage in self._stages:
                stage.beat(number.to_bytes(8, "little"))
