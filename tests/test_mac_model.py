"""Tests of bench.mac_model, which computes rates of Macs.

It is close to published rates, and bench/README.md has its table. ``before`` and ``after`` are mlx-k2 with MLX's own
settings, and with the settings of a stage.
"""

import statistics

import pytest

from bench.mac_constants import CONSTANTS, PUBLISHED
from bench.mac_model import (
    CONTEXTS,
    MADE_BY,
    after,
    before,
    common_factor,
    computed_rate,
    decode_rate,
    errors,
    head_rate,
    prefill_rate,
    readme_part,
)
from bench.mac_times import M3_ULTRA, M5_ULTRA
from bench.measure import ROOT, replace_generated

pytestmark = pytest.mark.timeout(60)

NUM_MACS = 2


def test_at_least_70_percent_of_the_published_rows_are_within_20_percent() -> None:
    close = [row for row, _, error in errors() if abs(error) <= 0.2]
    assert len(close) >= 0.7 * len(PUBLISHED)
    assert {row.kind for row in close} == {"decode", "prefill"}
    assert {row.program for row in close} == {row.program for row in PUBLISHED}


def test_all_computed_rates_are_corrected_by_one_common_factor() -> None:
    assert common_factor() == statistics.median(computed_rate(row) / row.rate for row in PUBLISHED)
    for row, rate, _ in errors():
        assert rate * common_factor() == pytest.approx(computed_rate(row))


def test_each_constant_and_each_published_row_names_its_source() -> None:
    assert all(constant.source for constant in CONSTANTS.values())
    assert {constant.kind for constant in CONSTANTS.values()} <= {"published", "stated", "estimated"}
    assert all(row.source for row in PUBLISHED)


def test_the_table_in_benchs_readme_equals_the_computed_one() -> None:
    page = (ROOT / "bench" / "README.md").read_text()
    assert page == replace_generated(page, MADE_BY, readme_part())


@pytest.mark.parametrize("bits", [16, 8.5])
@pytest.mark.parametrize("context", CONTEXTS)
def test_each_rate_is_higher_after_the_settings_than_before(bits: float, context: int) -> None:
    assert decode_rate(after(bits), NUM_MACS, context) > decode_rate(before(bits), NUM_MACS, context)
    assert prefill_rate(after(bits), NUM_MACS, context) > prefill_rate(before(bits), NUM_MACS, context)


def test_draft_tokens_that_are_never_accepted_change_nothing_and_accepted_ones_fill_every_stage() -> None:
    without_drafts = decode_rate(after(16), num_macs=3, context=4096)
    assert decode_rate(after(16), num_macs=3, context=4096, acceptance_rate=0.0) == without_drafts
    assert decode_rate(after(16), num_macs=3, context=4096, acceptance_rate=1.0) == pytest.approx(3 * without_drafts)


def test_a_draft_head_raises_the_rate_with_its_acceptance_towards_one_cycle_a_token() -> None:
    rates = [
        head_rate(after(8.5), NUM_MACS, context=1024, mac=M3_ULTRA, acceptance_rate=acceptance_rate)
        for acceptance_rate in (0.0, 0.5, 0.8, 1.0)
    ]
    assert rates == sorted(rates)
    assert rates[0] == pytest.approx(decode_rate(after(8.5), NUM_MACS, context=1024))
    # two stages compute at the same time, which would double the rate without the time of the draft head
    assert 1.8 < rates[-1] / rates[0] < 2.0


def test_more_macs_shorten_a_prompt_but_do_not_raise_one_streams_decode_rate() -> None:
    assert prefill_rate(after(16), num_macs=4, tokens=32768) > prefill_rate(after(16), NUM_MACS, tokens=32768)
    assert decode_rate(after(16), num_macs=4, context=4096) < decode_rate(after(16), NUM_MACS, context=4096)


def test_a_faster_chip_raises_the_rates_of_prefill_and_decode() -> None:
    on_m3, on_m5 = after(16, M3_ULTRA), after(16, M5_ULTRA)
    assert prefill_rate(on_m5, NUM_MACS, 32768, M5_ULTRA) > prefill_rate(on_m3, NUM_MACS, 32768, M3_ULTRA)
    assert decode_rate(on_m5, NUM_MACS, 4096, M5_ULTRA) > decode_rate(on_m3, NUM_MACS, 4096, M3_ULTRA)
