"""Trace of the stages' steps in Chrome's trace format: one track a stage, one span a microbatch (ui.perfetto.dev)."""

from pathlib import Path

import msgspec

from mlx_k2.deployment.listener import StageReport


class Trace:
    """Spans placed by the time at which the coordinator received their end: clocks of different hosts can differ."""

    def __init__(self, hosts: list[str]) -> None:
        self._events: list[object] = [
            {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"stage {rank} on {host}"}}
            for rank, host in enumerate(hosts)
        ]

    def add(self, report: StageReport) -> None:
        """Add one step of one stage: receive, compute, send."""
        done, microbatch = report.done, report.microbatch
        parts = (("send", done.send_s), (f"step {done.number}", done.busy_s), ("receive", done.receive_s))
        ended_us = report.received_at * 1e6
        for name, seconds in parts:  # backwards: only the end of the step is known
            length_us = seconds * 1e6
            ended_us -= length_us
            if seconds > 0:
                kind = "decode" if microbatch.decodes else "prefill"
                arguments = {"tokens": microbatch.num_tokens, "sequences": len(microbatch.rows)}
                self._events.append(
                    {
                        "ph": "X",
                        "name": name,
                        "cat": kind,
                        "pid": report.rank,
                        "tid": 0,
                        "ts": ended_us,
                        "dur": length_us,
                        "args": arguments,
                    }
                )

    def write(self, path: Path) -> None:
        """Write the file, which chrome://tracing and ui.perfetto.dev open."""
        path.write_bytes(msgspec.json.encode({"traceEvents": self._events, "displayTimeUnit": "ms"}))
