"""Test of the server under load, with one killed stage. `python -m bench.serve_load` kills five, one a minute."""

from pathlib import Path

import pytest

from bench.serve_load import run


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_streams_continue_when_clients_hang_up_and_a_stage_is_killed_and_no_resource_is_leaked(tmp_path: Path) -> None:
    totals = run(tmp_path, num_streams=24, num_kills=1, every_s=3.0)
    assert (totals.wrong, totals.failed) == (0, 0)
    assert totals.complete >= 24
    assert totals.hung_up > 0
    assert totals.leaked.total() == 0, totals.leaked
