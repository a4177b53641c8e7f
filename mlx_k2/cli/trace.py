"""Trace of the stages' steps in Chrome's trace format: one track for each stage (ui.perfetto.dev)."""

from pathlib import Path

import msgspec

from mlx_k2.deployment.listener import StageReport


class Trace:
    """Spans of all stages. A step ends when the coordinator receives its report: the hosts' clocks can differ."""

    def __init__(self, hosts: list[str]) -> None:
        self._events: list[object] = [
            {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"stage {rank} on {host}"}}  # metadata
            for rank, host in enumerate(hosts)
        ]

    def add(self, report: StageReport) -> None:
        """Add up to three spans of a step of a stage: receive, compute, send."""
        step, microbatch = report.done, report.microbatch
        category = "decode" if microbatch.decodes else "prefill"
        arguments = {"tokens": microbatch.num_tokens, "sequences": len(microbatch.rows)}
        start_us = report.received_at * 1e6
        # from the last span to the first, because only the end of the step is known
        for name, seconds in (("send", step.send_s), (f"step {step.number}", step.busy_s), ("receive", step.receive_s)):
            start_us -= seconds * 1e6
            if seconds > 0:
                self._events.append(
                    {
                        "ph": "X",  # a complete span
                        "name": name,
                        "cat": category,
                        "pid": report.rank,
                        "tid": 0,
                        "ts": start_us,
                        "dur": seconds * 1e6,
                        "args": arguments,
                    }
                )

    def write(self, path: Path) -> None:
        """Write the file, which chrome://tracing and ui.perfetto.dev open."""
        path.write_bytes(msgspec.json.encode({"traceEvents": self._events, "displayTimeUnit": "ms"}))
