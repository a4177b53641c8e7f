"""Tests that on simulated stages with Kimi K2's sizes the scheduler is within 5% of the best possible choice."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.scheduling.cost_model import StageCost, StageSpeed, expected_tiles, row_load
from mlx_k2.scheduling.step_policy import (
    CHUNK_DELAY_STEPS,
    StepPolicy,
    best_round,
    prefill_s,
)
from tests.examples import at_least
from tests.scheduling.simulation import LONGEST_CHUNK, TURNAROUND_S, FixedChoices, Simulation, k2_stages, request

PROMPTS = [512, 2048, 8192, 32768, 65536]
STREAMS = [1, 2, 4, 8, 16]
TOKENS = 40
CLOSE = 1.05


def decode_s(policy: StepPolicy, stages: list[StageCost], num_streams: int, num_prompt: int) -> float:
    """Return the seconds for each token of each stream, over the time in which all streams decode."""
    simulation = Simulation(stages, policy, num_streams)
    asked = [request(num_prompt, TOKENS + 20 * num_streams, seed, alike=True) for seed in range(num_streams)]
    simulation.run(*asked)  # the first prompt is computed, the others reuse its cache
    times = list(simulation.token_times.values())
    began, ended = max(of[0] for of in times), min(of[-1] for of in times)
    return (ended - began) * num_streams / sum(began < moment <= ended for of in times for moment in of)


@pytest.mark.parametrize("num_streams", STREAMS)
@pytest.mark.parametrize("num_prompt", [512, 8192, 65536])
def test_decode_time_is_within_5_percent_of_the_best_microbatch_count(num_streams: int, num_prompt: int) -> None:
    stages = k2_stages()
    chosen = decode_s(StepPolicy(stages, TURNAROUND_S), stages, num_streams, num_prompt)
    others = [
        decode_s(FixedChoices(stages, count, 2048), stages, num_streams, num_prompt)
        for count in range(1, min(num_streams, 4) + 1)
    ]
    assert chosen <= CLOSE * min(others)


@pytest.mark.parametrize("num_prompt", PROMPTS)
def test_prefill_time_is_within_5_percent_of_the_best_chunk_length(num_prompt: int) -> None:
    stages = k2_stages()
    simulation = Simulation(stages, StepPolicy(stages, TURNAROUND_S), 1)
    simulation.run(request(num_prompt, 1))
    step = max(1, num_prompt // 512)
    lengths = range(step, min(num_prompt, LONGEST_CHUNK) + 1, step)
    best = min(prefill_s(stages, 0, num_prompt, chunk) for chunk in lengths if num_prompt // chunk <= 512)
    assert simulation.now_s <= CLOSE * best


@pytest.mark.parametrize("num_tokens", [17, 100, 1500, 4096])
@pytest.mark.parametrize("tile_rows", [16, 32])
def test_expected_tiles_are_those_of_random_choices(num_tokens: int, tile_rows: int) -> None:
    random = np.random.default_rng(num_tokens)
    counts = [random.binomial(num_tokens, 8 / 384, 384) for _ in range(400)]
    tiles = np.mean([np.ceil(each / tile_rows).sum() for each in counts])
    assert expected_tiles(384, 8, num_tokens, tile_rows) == pytest.approx(tiles, rel=0.01)


def test_counted_tiles_make_the_chunks_of_a_prompt_of_4096_tokens_longer() -> None:
    stages = k2_stages()
    untiled = [StageCost(replace(stage.sizes, tile_rows=1), stage.speed) for stage in stages]
    assert StepPolicy(stages).chunk_tokens(0, 4096, 4096) > StepPolicy(untiled).chunk_tokens(0, 4096, 4096)


@settings(max_examples=at_least(300))
@given(
    st.integers(1, 16),
    st.integers(1, 65536),
    st.sampled_from([2, 4]),
    st.floats(0.0, 0.01),
    st.floats(0.1, 2.0),
    st.floats(2, 60),
)
def test_the_chosen_round_time_is_within_5_percent_of_every_microbatch_count(
    num_sequences: int, context: int, num_stages: int, fixed_s: float, tb_per_s: float, tera_operations_per_s: float
) -> None:
    stages = k2_stages(num_stages, StageSpeed(fixed_s, tb_per_s * 1e12, tera_operations_per_s * 1e12))
    chosen = best_round(stages, num_sequences, context, TURNAROUND_S)
    for count in range(1, num_sequences + 1):
        assert chosen.round_s <= CLOSE * simulated_round_s(stages, num_sequences, context, count)


def simulated_round_s(stages: list[StageCost], num_sequences: int, context: int, count: int) -> float:
    """Return the time of a round of ``count`` microbatches in the steady state of repeated simulated rounds."""
    smaller, num_larger = divmod(num_sequences, count)
    sizes = [smaller + 1] * num_larger + [smaller] * (count - num_larger)
    one = row_load(context, 1, is_prompt=False, needs_logits=True)
    times = {size: [stage.step_s(sum(itertools.repeat(one, size - 1), one)) for stage in stages] for size in set(sizes)}
    free_at, ready_at, ends = [0.0] * len(stages), [0.0] * count, []
    for _ in range(8):
        for index, size in enumerate(sizes):
            done = ready_at[index]
            for rank, seconds in enumerate(times[size]):
                done = free_at[rank] = max(done, free_at[rank]) + seconds
            ready_at[index] = done + TURNAROUND_S
        ends.append(max(ready_at))
    return (ends[-1] - ends[3]) / 4


def test_eight_streams_on_two_stages_run_as_two_microbatches_of_four() -> None:
    one, two = k2_stages(1), k2_stages(2)
    choice = best_round(two, 8, 1000, TURNAROUND_S)
    assert choice.num_microbatches == 2
    assert best_round(one, 8, 1000, TURNAROUND_S).round_s / choice.round_s == pytest.approx(1.63, abs=0.03)


@given(st.integers(1, 8), st.integers(1, 30_000), st.integers(0, 30_000))
def test_a_chunk_sent_with_decode_rows_is_the_longest_within_the_time_limit(
    num_sequences: int, context: int, position: int
) -> None:
    stages = k2_stages()
    decode_round = best_round(stages, num_sequences, context, TURNAROUND_S)
    limit_s = (1 + CHUNK_DELAY_STEPS) * decode_round.round_s / max(2, decode_round.num_microbatches)
    one = row_load(context, 1, is_prompt=False, needs_logits=True)
    count = StepPolicy(stages).chunk_beside(one, position, LONGEST_CHUNK, limit_s)

    def step_s(tokens: int) -> float:
        load = one + row_load(position, tokens, is_prompt=True, needs_logits=False)
        return max(stage.step_s(load) for stage in stages)

    assert count == 1 or step_s(count) <= limit_s
    assert count == LONGEST_CHUNK or step_s(count + 1) > limit_s


@pytest.mark.parametrize("num_streams", [1, 2, 4, 8])
def test_a_long_prompt_delays_decoding_sequences_by_at_most_chunk_delay_steps(num_streams: int) -> None:
    stages = k2_stages()
    simulation = Simulation(stages, StepPolicy(stages, TURNAROUND_S), num_streams + 1)
    asked = [request(64, 400, seed) for seed in range(num_streams)]
    simulation.run(*asked, until_s=6.0)
    alone_s = max(largest_gap(times[5:]) for times in simulation.token_times.values())
    before = {seed: len(times) for seed, times in simulation.token_times.items()}
    simulation.run(request(4096, 1, seed=99), until_s=simulation.now_s + 4.0)
    beside = {seed: simulation.token_times[seed][count - 1 :] for seed, count in before.items()}
    assert all(len(times) > 5 for times in beside.values())
    limit_s = 1.05 * (1 + CHUNK_DELAY_STEPS) * alone_s
    assert max(largest_gap(times[2:]) for times in beside.values()) <= limit_s
    assert (
        max(largest_gap(times) for times in beside.values()) <= 1.5 * limit_s
    )  # the first chunks enter a full pipeline


def largest_gap(times: list[float]) -> float:
    return max(later - earlier for earlier, later in itertools.pairwise(times))
