"""Tests of README's recorded output: it equals the commands' present output, except for what `masked` replaces."""

import pytest

from bench.recorded_output import MADE_BY, README, masked, readme_part

pytestmark = pytest.mark.timeout(240)


@pytest.mark.slow
def test_the_readme_shows_what_the_commands_print() -> None:
    page = README.read_text()
    recorded = page.partition(f"<!-- made by {MADE_BY} -->\n")[2].partition("<!-- end -->\n")[0].strip()
    present = readme_part()
    assert "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20" in present
    assert masked(recorded) == masked(present), f"run {MADE_BY}"


def test_only_times_rates_seeds_and_the_killed_stage_with_its_step_are_masked() -> None:
    line = "35 tokens · 27.7 tok/s · first token after 0.06 s · seed 19319977"
    assert masked(line) == "35 tokens · # tok/s · first token after # s · seed #"
    assert masked("stage 1 on this machine (at step 4) ended") == "stage # on this machine (#) ended"
    assert masked("1, 2, 3 and 100 tokens") == "1, 2, 3 and 100 tokens"
