"""Run of the fault matrix: each fault is tried on three stages over ssh on emulated hosts, while two streams run.

    python -m bench.faults
    python -m bench.faults --only "cable pulled"

A run in which all faults of the matrix pass appends its rows to results/faults.csv, and writes the table of
docs/reliability.md. It needs Linux and root.
"""

import argparse
import sys
import tempfile
import traceback
from datetime import date
from pathlib import Path

from bench.measure import ROOT, commit, replace_generated, save_rows
from tests.emulated_hosts.fault_matrix import FAULTS
from tests.emulated_hosts.fault_run import NUM_HOSTS, FaultSetup, undisturbed
from tests.emulated_hosts.faults import Finding, try_fault
from tests.emulated_hosts.hosts import EmulatedHosts, what_is_missing
from tests.local_cluster import write_model

PAGE = ROOT / "docs" / "reliability.md"
MIN_SHOWN_S = 0.1
DIFFERS = " (the plus means that files differed from it)"


def main() -> int:
    """Try the chosen faults and print each result. Return 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORDS", help="try the faults whose names contain this text")
    options = parser.parse_args()
    if missing := what_is_missing():
        sys.exit(missing)
    chosen = [fault for fault in FAULTS if options.only in fault.name]
    findings: list[Finding] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        model = write_model(folder / "model")
        with EmulatedHosts(_make_folder(folder / "hosts"), NUM_HOSTS) as hosts:
            expected = undisturbed(hosts, model, folder / "undisturbed")
        for number, fault in enumerate(chosen):
            fault_folder = _make_folder(folder / f"{number}")
            try:
                with EmulatedHosts(_make_folder(fault_folder / "hosts"), NUM_HOSTS) as hosts:
                    findings.append(try_fault(fault, FaultSetup(hosts, model, fault_folder / "setup"), expected))
                print(_line(findings[-1]), flush=True)
            except Exception:  # noqa: BLE001  # the other faults are tried, too
                print(f"FAILED: {fault.name}\n{traceback.format_exc()}", flush=True)
    if len(findings) == len(FAULTS):
        save_rows(
            "faults", ("commit", "fault", "detected_s", "outcome", "reason"), [_row(finding) for finding in findings]
        )
        write_table(findings)
    print(f"{len(findings)} of {len(chosen)} faults passed")
    return int(len(findings) < len(chosen))


def write_table(findings: list[Finding]) -> None:
    """Write the table of docs/reliability.md."""
    rows = [f"| {finding.fault.name} | {_seconds(finding)} | {finding.fault.outcome} |" for finding in findings]
    tried_commit = commit()
    suffix = DIFFERS if tried_commit.endswith("+") else ""
    heading = f"Tried on {date.today().isoformat()} at commit {tried_commit}{suffix}."
    table = "\n".join([heading, "", "| fault | noticed after | then |", "|---|---|---|", *rows])
    PAGE.write_text(replace_generated(PAGE.read_text(), "python -m bench.faults", table))


def _row(finding: Finding) -> tuple[object, ...]:
    detected_s = "" if finding.detected_s is None else f"{finding.detected_s:.2f}"
    return commit(), finding.fault.name, detected_s, finding.fault.outcome, finding.reason


def _line(finding: Finding) -> str:
    return (
        f"{finding.wall_s:5.1f} s  {finding.fault.name}: {_seconds(finding)}, {finding.fault.outcome}: {finding.reason}"
    )


def _seconds(finding: Finding) -> str:
    if finding.detected_s is None:
        return "not reported"
    return f"under {MIN_SHOWN_S} s" if finding.detected_s < MIN_SHOWN_S else f"{finding.detected_s:.1f} s"


def _make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


if __name__ == "__main__":
    sys.exit(main())
