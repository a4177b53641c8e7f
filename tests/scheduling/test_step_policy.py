"""Tests of the step policy and its cost model on simulated stages of Kimi K2: choices are within 5% of the best."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_k2.scheduling.cost_model import StageCost, StageSpeed, expected_tiles, row_load
from mlx_k2.scheduling.step_policy import CHUNK_DELAY_STEPS, StepPolicy, best_round, prefill_s
from tests.examples import at_least
from tests.scheduling.simulation import MAX_CHUNK_TOKENS, TURNAROUND_S, FixedChoices, Simulation, k2_stages, request

TOLERANCE = 1.05
"""A choice may take this many times the time of the best one."""


def decode_s(policy: StepPolicy, stages: list[StageCost], num_streams: int, num_prompt: int) -> float:
    """Return the mean seconds between two tokens of a stream, over the time in which all streams decode."""
    simulation = Simulation(stages, policy, num_streams)
    max_tokens = 40 + 20 * num_streams  # the first stream still decodes when the last one has started
    requests = [request(num_prompt, max_tokens, seed, has_common_prefix=True) for seed in range(num_streams)]
    simulation.run(*requests)  # the first prompt is computed, the others reuse its cache
    token_times = list(simulation.token_times.values())
    start_s, end_s = max(times[0] for times in token_times), min(times[-1] for times in token_times)
    num_tokens = sum(start_s < token_s <= end_s for times in token_times for token_s in times)
    return (end_s - start_s) * num_streams / num_tokens


@pytest.mark.parametrize("num_streams", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("num_prompt", [512, 8192, 65536])
def test_decode_time_is_within_5_percent_of_the_best_microbatch_count(num_streams: int, num_prompt: int) -> None:
    stages = k2_stages()
    chosen_s = decode_s(StepPolicy(stages, TURNAROUND_S), stages, num_streams, num_prompt)
    best_s = min(
        decode_s(FixedChoices(stages, num_microbatches, chunk_tokens=2048), stages, num_streams, num_prompt)
        for num_microbatches in range(1, min(num_streams, 2 * len(stages)) + 1)
    )
    assert chosen_s <= TOLERANCE * best_s


@pytest.mark.parametrize("num_prompt", [512, 2048, 8192, 32768, 65536])
def test_prefill_time_is_within_5_percent_of_the_best_chunk_length(num_prompt: int) -> None:
    stages = k2_stages()
    simulation = Simulation(stages, StepPolicy(stages, TURNAROUND_S), 1)
    simulation.run(request(num_prompt, 1))
    step = max(1, num_prompt // 512)  # up to 512 lengths, of up to 512 chunks: more would take too long
    chunk_lengths = range(step, min(num_prompt, MAX_CHUNK_TOKENS) + 1, step)
    best_s = min(prefill_s(stages, 0, num_prompt, chunk) for chunk in chunk_lengths if num_prompt // chunk <= 512)
    assert simulation.now_s <= TOLERANCE * best_s


@pytest.mark.parametrize("num_tokens", [17, 100, 1500, 4096])
@pytest.mark.parametrize("tile_rows", [16, 32])
def test_the_expected_number_of_tiles_is_the_mean_of_random_choices_of_experts(num_tokens: int, tile_rows: int) -> None:
    rng = np.random.default_rng(num_tokens)
    tokens_of_experts = rng.binomial(num_tokens, 8 / 384, size=(400, 384))  # 400 steps of Kimi K2
    mean_tiles = np.ceil(tokens_of_experts / tile_rows).sum(axis=1).mean()
    assert expected_tiles(
        num_experts=384, experts_per_token=8, num_tokens=num_tokens, tile_rows=tile_rows
    ) == pytest.approx(mean_tiles, rel=0.01)


def test_with_tiles_of_several_rows_the_chunks_of_a_prompt_of_4096_tokens_are_longer() -> None:
    stages = k2_stages()
    untiled = [StageCost(replace(stage.sizes, tile_rows=1), stage.speed) for stage in stages]
    tiled_tokens, untiled_tokens = (
        StepPolicy(costs).chunk_tokens(position=0, num_tokens=4096, longest=4096) for costs in (stages, untiled)
    )
    assert tiled_tokens > untiled_tokens


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
    for num_microbatches in range(1, num_sequences + 1):
        assert chosen.round_s <= TOLERANCE * simulated_round_s(stages, num_sequences, context, num_microbatches)


def simulated_round_s(stages: list[StageCost], num_sequences: int, context: int, num_microbatches: int) -> float:
    """Return the time of a round in the steady state, from the last 4 of 8 simulated rounds."""
    smaller, num_larger = divmod(num_sequences, num_microbatches)
    sizes = [smaller + 1] * num_larger + [smaller] * (num_microbatches - num_larger)
    row = row_load(context, 1, is_prompt=False, needs_logits=True)
    loads = {size: sum(itertools.repeat(row, size - 1), row) for size in set(sizes)}
    free_at, ready_at, round_ends = [0.0] * len(stages), [0.0] * num_microbatches, []
    for _ in range(8):
        for index, size in enumerate(sizes):
            end_s = ready_at[index]
            for rank, stage in enumerate(stages):
                end_s = free_at[rank] = max(end_s, free_at[rank]) + stage.step_s(loads[size])
            ready_at[index] = end_s + TURNAROUND_S
        round_ends.append(max(ready_at))
    return (round_ends[7] - round_ends[3]) / 4


def test_eight_streams_on_two_stages_run_as_two_microbatches_and_1_6_times_as_fast_as_on_one_stage() -> None:
    one_stage, two_stages = (
        best_round(k2_stages(count), num_sequences=8, mean_context=1000, turnaround_s=TURNAROUND_S) for count in (1, 2)
    )
    assert two_stages.num_microbatches == 2
    assert one_stage.round_s / two_stages.round_s == pytest.approx(1.63, abs=0.03)


@given(st.integers(1, 8), st.integers(1, 30_000), st.integers(0, 30_000))
def test_a_chunk_beside_a_decode_row_is_the_longest_within_the_time_limit(
    num_sequences: int, context: int, position: int
) -> None:
    stages = k2_stages()
    decode_round = best_round(stages, num_sequences, context, TURNAROUND_S)
    limit_s = (1 + CHUNK_DELAY_STEPS) * decode_round.round_s / max(2, decode_round.num_microbatches)
    decode_row = row_load(context, 1, is_prompt=False, needs_logits=True)
    num_tokens = StepPolicy(stages).chunk_beside(decode_row, position, MAX_CHUNK_TOKENS, limit_s)

    def step_s(chunk_tokens: int) -> float:
        load = decode_row + row_load(position, chunk_tokens, is_prompt=True, needs_logits=False)
        return max(stage.step_s(load) for stage in stages)

    assert num_tokens == 1 or step_s(num_tokens) <= limit_s
    assert num_tokens == MAX_CHUNK_TOKENS or step_s(num_tokens + 1) > limit_s


@pytest.mark.parametrize("num_streams", [1, 2, 4, 8])
def test_a_long_prompt_delays_decoding_sequences_by_at_most_chunk_delay_steps(num_streams: int) -> None:
    stages = k2_stages()
    simulation = Simulation(stages, StepPolicy(stages, TURNAROUND_S), num_streams + 1)
    requests = [request(64, 400, seed) for seed in range(num_streams)]
    simulation.run(*requests, until_s=6.0)
    # without the first tokens, which come while other streams' prompts run
    usual_gap_s = max(largest_gap_s(times[5:]) for times in simulation.token_times.values())
    num_before = {key: len(times) for key, times in simulation.token_times.items()}
    simulation.run(request(4096, 1, seed=99), until_s=simulation.now_s + 4.0)
    # from the last token before the long prompt on
    times_beside = [simulation.token_times[key][count - 1 :] for key, count in num_before.items()]
    assert all(len(times) > 5 for times in times_beside)
    limit_s = TOLERANCE * (1 + CHUNK_DELAY_STEPS) * usual_gap_s
    assert max(largest_gap_s(times[2:]) for times in times_beside) <= limit_s
    # the first chunks enter a full pipeline, so the first two gaps may be longer
    assert max(map(largest_gap_s, times_beside)) <= 1.5 * limit_s


def largest_gap_s(times: list[float]) -> float:
    return max(later - earlier for earlier, later in itertools.pairwise(times))
