"""Tests that on simulated stages with Kimi K2's sizes the scheduler is within 5% of the best possible choice."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.scheduling.cost_model import StageCost, StageSpeed, expected_tiles, row_load
from mlx_k2.scheduling.step_policy import CHUNK_DELAY_STEPS, StepPolicy, best_round, prefill_s
from tests.examples import at_least
from tests.scheduling.simulation import LONGEST_CHUNK, TURNAROUND_S, FixedChoices, Simulation, k2_stages, request

PROMPT_TOKENS = [512, 2048, 8192, 32768, 65536]
NUM_STREAMS = [1, 2, 4, 8, 16]
WITHIN_5_PERCENT = 1.05


def decode_s(policy: StepPolicy, stages: list[StageCost], num_streams: int, num_prompt: int) -> float:
    """Return the mean seconds from a token of a stream to its next, over the time in which all streams decode."""
    simulation = Simulation(stages, policy, num_streams)
    max_tokens = 40 + 20 * num_streams  # enough for the first streams to decode until the last one has started
    requests = [request(num_prompt, max_tokens, seed, alike=True) for seed in range(num_streams)]
    simulation.run(*requests)  # the first prompt is computed, the others reuse its cache
    streams = simulation.token_times.values()
    start, end = max(times[0] for times in streams), min(times[-1] for times in streams)
    num_tokens = sum(start < time <= end for times in streams for time in times)
    return (end - start) * num_streams / num_tokens


@pytest.mark.parametrize("num_streams", NUM_STREAMS)
@pytest.mark.parametrize("num_prompt", [512, 8192, 65536])
def test_decode_time_is_within_5_percent_of_the_best_microbatch_count(num_streams: int, num_prompt: int) -> None:
    stages = k2_stages()
    chosen_s = decode_s(StepPolicy(stages, TURNAROUND_S), stages, num_streams, num_prompt)
    others_s = [
        decode_s(FixedChoices(stages, count, chunk_tokens=2048), stages, num_streams, num_prompt)
        for count in range(1, min(num_streams, 4) + 1)
    ]
    assert chosen_s <= WITHIN_5_PERCENT * min(others_s)


@pytest.mark.parametrize("num_prompt", PROMPT_TOKENS)
def test_prefill_time_is_within_5_percent_of_the_best_chunk_length(num_prompt: int) -> None:
    stages = k2_stages()
    simulation = Simulation(stages, StepPolicy(stages, TURNAROUND_S), 1)
    simulation.run(request(num_prompt, 1))
    step = max(1, num_prompt // 512)
    lengths = range(step, min(num_prompt, LONGEST_CHUNK) + 1, step)
    best_s = min(prefill_s(stages, 0, num_prompt, chunk) for chunk in lengths)
    assert simulation.now_s <= WITHIN_5_PERCENT * best_s


@pytest.mark.parametrize("num_tokens", [17, 100, 1500, 4096])
@pytest.mark.parametrize("tile_rows", [16, 32])
def test_expected_tiles_are_the_mean_over_random_choices_of_experts(num_tokens: int, tile_rows: int) -> None:
    random = np.random.default_rng(num_tokens)
    tokens_of_experts = [random.binomial(num_tokens, 8 / 384, 384) for _ in range(400)]
    mean_tiles = np.mean([np.ceil(counts / tile_rows).sum() for counts in tokens_of_experts])
    assert expected_tiles(384, 8, num_tokens, tile_rows) == pytest.approx(mean_tiles, rel=0.01)


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
        assert chosen.round_s <= WITHIN_5_PERCENT * simulated_round_s(stages, num_sequences, context, count)


def simulated_round_s(stages: list[StageCost], num_sequences: int, context: int, count: int) -> float:
    """Return the seconds of a round of ``count`` microbatches: the mean of the last 4 of 8 simulated rounds."""
    smaller, num_larger = divmod(num_sequences, count)
    sizes = [smaller + 1] * num_larger + [smaller] * (count - num_larger)
    token_load = row_load(context, 1, is_prompt=False, needs_logits=True)
    free_at, ready_at, round_ends = [0.0] * len(stages), [0.0] * count, []
    for _ in range(8):
        for index, size in enumerate(sizes):
            done_at = ready_at[index]
            for rank, stage in enumerate(stages):
                done_at = free_at[rank] = max(done_at, free_at[rank]) + stage.step_s(token_load * size)
            ready_at[index] = done_at + TURNAROUND_S
        round_ends.append(max(ready_at))
    return (round_ends[-1] - round_ends[3]) / 4


def test_eight_streams_on_two_stages_run_as_two_microbatches_of_four() -> None:
    on_one_stage = best_round(k2_stages(1), 8, 1000, TURNAROUND_S)
    on_two_stages = best_round(k2_stages(2), 8, 1000, TURNAROUND_S)
    assert on_two_stages.num_microbatches == 2
    assert on_one_stage.round_s / on_two_stages.round_s == pytest.approx(
        1.63, abs=0.03
    )  # not 2: weights are read twice


@given(st.integers(1, 8), st.integers(1, 30_000), st.integers(0, 30_000))
def test_a_chunk_sent_with_decode_rows_is_the_longest_within_the_time_limit(
    num_sequences: int, context: int, position: int
) -> None:
    stages = k2_stages()
    decode_round = best_round(stages, num_sequences, context, TURNAROUND_S)
    limit_s = (1 + CHUNK_DELAY_STEPS) * decode_round.round_s / max(2, decode_round.num_microbatches)
    decode_load = row_load(context, 1, is_prompt=False, needs_logits=True)
    count = StepPolicy(stages).chunk_beside(decode_load, position, LONGEST_CHUNK, limit_s)

    def step_s(num_tokens: int) -> float:
        load = decode_load + row_load(position, num_tokens, is_prompt=True, needs_logits=False)
        return max(stage.step_s(load) for stage in stages)

    assert count == 1 or step_s(count) <= limit_s
    assert count == LONGEST_CHUNK or step_s(count + 1) > limit_s


@pytest.mark.parametrize("num_streams", [1, 2, 4, 8])
def test_a_long_prompt_delays_decoding_sequences_by_at_most_chunk_delay_steps(num_streams: int) -> None:
    stages = k2_stages()
    simulation = Simulation(stages, StepPolicy(stages, TURNAROUND_S), num_streams + 1)
    streams = [request(64, 400, seed) for seed in range(num_streams)]
    simulation.run(*streams, until_s=6.0)
    alone_s = max(largest_gap_s(times[5:]) for times in simulation.token_times.values())
    num_before = {stream: len(times) for stream, times in simulation.token_times.items()}
    simulation.run(request(4096, 1, seed=99), until_s=simulation.now_s + 4.0)
    times_beside = [simulation.token_times[stream][count - 1 :] for stream, count in num_before.items()]
    assert all(len(times) > 5 for times in times_beside)
    limit_s = WITHIN_5_PERCENT * (1 + CHUNK_DELAY_STEPS) * alone_s
    assert max(largest_gap_s(times[2:]) for times in times_beside) <= limit_s
    # the first chunks are sent while the pipeline is full
    assert max(largest_gap_s(times) for times in times_beside) <= 1.5 * limit_s


def largest_gap_s(times: list[float]) -> float:
    """Return the longest time between two consecutive tokens of a stream."""
    return max(later - earlier for earlier, later in itertools.pairwise(times))
