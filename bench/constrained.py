"""Cost of a constraint: the time that it adds to each token, the bytes of its plans, and the rate of eight streams.

python -m bench.constrained [--save] [--only tokens|streams] [--kimi FOLDER]

The vocabulary is Kimi's, with 163,840 tokens. Two parts of the work for each sampled token are timed together: from its
arrival to its next plan (the policy accepts it, forces tokens and makes the mask; the plan is encoded), and in the last
stage (the plan is decoded, a token is sampled under the mask). The tokens are those of texts that the constraints
allow. A reply without constraint ("free") is timed in the same way; added times are differences to its median. Each
text runs NUM_RUNS times, and a token's time is the median of its runs, since another process rarely interrupts the same
token in most runs. Every run compiles the grammar again, which is not timed, because copies of one compiled grammar
share the lexer states that earlier runs computed. The 99th percentile over the times of all runs is reported, too.

The streams run on two local stages with a random checkpoint: constrained to one JSON string, which has the largest
masks, and free. Both sample the same number of tokens. --save appends the rows to results/constrained.csv.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from bench.deployments import local_deployment
from bench.measure import alternate, commit, ratios, save_rows, summarize
from mlx_k2.coordinator.engine import Engine, engine_on
from mlx_k2.coordinator.handle import Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.reply_policy import ReplyPolicy
from mlx_k2.model.sampler import SamplingRequest, sample_tokens
from mlx_k2.protocol.messages import Step, decode_to_stage, encode_message
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.microbatch import Row
from mlx_k2.scheduling.request import Request
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.text.constraint import AnswerForm, AnswerFormat, Constraint, Tool, ToolChoice, ToolRules
from mlx_k2.text.grammar import GrammarCompiler
from mlx_k2.text.reply_grammar import MAX_CALLS, ReplyGrammar, compile_constraint
from mlx_k2.text.tokenizer import Tokenizer, load_tokenizer

VOCAB_SIZE = 163_840
FILES = ("tiktoken.model", "tokenizer_config.json")
NUM_RUNS = 5
NUM_STREAMS = 8
STREAM_TOKENS = 40
POSITION = 1000
"""Position of every row: it changes nothing but the size of the plan by a byte or two."""
WORDS = "the weather in Lisbon is 24 degrees, naïve café 天気 \\n\\t \\u00e9 and so on: (a) b/c {d} [e]; 'f' <g> #1 &c."
RECORD = {
    "type": "object",
    "properties": {
        "id": {"type": "integer"},
        "name": {"type": "string"},
        "kind": {"enum": ["file", "folder", "link"]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]+$"}},
        "size": {"type": ["number", "null"]},
    },
    "required": ["id", "name", "kind", "tags"],
    "additionalProperties": False,
}
RECORDS = {"type": "array", "items": RECORD}


class ResultRow(NamedTuple):
    """A row of results/constrained.csv. Times are differences to the median of a free reply; '' is not measured.

    ``p50_ms`` and ``p99_ms``: percentiles of the tokens' median times; ``single_p99_ms``: of all times, run by run.
    ``ratio``: tokens per second of constrained streams over free ones.
    """

    case: str
    tokens: int
    p50_ms: str = ""
    p99_ms: str = ""
    single_p99_ms: str = ""
    plan_bytes_p50: float | str = ""
    plan_bytes_max: int | str = ""
    ratio: str = ""


def main() -> None:
    """Measure and print; with --save append the rows to the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/constrained.csv")
    parser.add_argument("--only", choices=["tokens", "streams"], help="measure this part only")
    default = os.environ.get("MLX_K2_KIMI_FILES", "../shared/kimi")
    parser.add_argument("--kimi", type=Path, default=Path(default), help="folder with Kimi's vocabulary")
    options = parser.parse_args()
    files = {name: (options.kimi / name).read_bytes() for name in FILES}
    tokenizer = load_tokenizer(files, VOCAB_SIZE)
    started_at = time.perf_counter()
    compiler = GrammarCompiler(tokenizer)
    records_grammar = compile_constraint(compiler, json_answer(RECORDS))
    print(f"vocabulary and first schema compiled in {time.perf_counter() - started_at:.2f} s")
    assert records_grammar.warnings == (), "a keyword of the schema is not enforced"
    rows: list[ResultRow] = []
    if options.only != "streams":
        rows += measure_tokens(tokenizer)
    if options.only != "tokens":
        string_grammar = compile_constraint(compiler, json_answer({"type": "string", "minLength": 1000}))
        rows.append(measure_streams(tokenizer, files, string_grammar))
    if options.save:
        header = ("commit", *ResultRow._fields)
        print(f"saved to {save_rows('constrained', header, [(commit(), *row) for row in rows])}")


def json_answer(schema: object) -> Constraint:
    """Return the constraint of an answer in JSON that matches ``schema``."""
    return Constraint(AnswerFormat(AnswerForm.JSON_SCHEMA, schema=schema))


# ---- time of a token


def constraint_cases() -> dict[str, tuple[Constraint | None, str]]:
    """Return each constraint with a reply that it allows, by the name of the case. The case "free" comes first."""
    records = [
        {
            "id": n,
            "name": WORDS[: n % 90],
            "kind": ["file", "folder", "link"][n % 3],
            "tags": ["ab", "cde"],
            "size": n / 7,
        }
        for n in range(120)
    ]
    compact_json = json.dumps(records, ensure_ascii=False, separators=(",", ":"))
    tools = tuple(Tool(f"mcp__server{n % 3}__tool_{n}", RECORD) for n in range(40))
    calls = "".join(
        f"<|tool_call_begin|>functions.{tools[n].name}:{n}<|tool_call_argument_begin|>"
        f"{json.dumps(records[n], ensure_ascii=False)}<|tool_call_end|>"
        for n in range(MAX_CALLS)
    )
    tool_section = f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>"
    required_calls = Constraint(tools=ToolRules(tools, ToolChoice.REQUIRED))
    regex_answer = Constraint(AnswerFormat(AnswerForm.REGEX, "(?:[^#]|#[0-9])*"))
    return {
        "free": (None, compact_json),
        "records": (json_answer(RECORDS), compact_json),
        "any object": (json_answer({"type": "object"}), f'{{"records":{compact_json}}}'),
        "regular expression": (regex_answer, WORDS * 40),
        "calls of 40 tools": (required_calls, tool_section),
    }


def measure_tokens(tokenizer: Tokenizer) -> list[ResultRow]:
    """Time each sampled token of each case; return the rows."""
    rows: list[ResultRow] = []
    logits = mx.array(np.random.default_rng(0).normal(0, 3, (1, VOCAB_SIZE)).astype(np.float32))
    free_ms = 0.0
    for name, (constraint, text) in constraint_cases().items():
        runs: list[list[float]] = []
        for _ in range(NUM_RUNS):
            grammar = None if constraint is None else compile_constraint(GrammarCompiler(tokenizer), constraint)
            run_ms, plan_bytes = time_tokens(tokenizer, grammar, text, logits)
            runs.append(run_ms)
        times_ms = [statistics.median(times_of_token) for times_of_token in zip(*runs, strict=True)]
        p50, p99 = statistics.median(times_ms), statistics.quantiles(times_ms, n=100)[98]
        single_p99 = statistics.quantiles([time_ms for run_ms in runs for time_ms in run_ms], n=100)[98]
        if name == "free":
            free_ms = p50
        added_p50, added_p99, added_single = (f"{value - free_ms:.3f}" for value in (p50, p99, single_p99))
        print(
            f"{name}: {len(times_ms)} tokens, {p50:.3f} ms (p99 {p99:.3f}, of all runs {single_p99:.3f}), "
            f"added {added_p50} (p99 {added_p99})"
        )
        print(f"    plan {statistics.median(plan_bytes):.0f} bytes (at most {max(plan_bytes)})")
        sizes = (statistics.median(plan_bytes), max(plan_bytes))
        rows.append(ResultRow(name, len(times_ms), added_p50, added_p99, added_single, *sizes))
    return rows


def time_tokens(
    tokenizer: Tokenizer, grammar: ReplyGrammar | None, text: str, logits: mx.array
) -> tuple[list[float], list[int]]:
    """Return the time of each sampled token in milliseconds, and the size of each plan in bytes."""
    stop_ids = tokenizer.stop_ids
    prompt_ids = (tokenizer.token_id("<think>"), tokenizer.token_id("</think>"))
    request = Request(prompt_ids, 10_000, Sampling(seed=1), stop_ids)
    policy = ReplyPolicy(tokenizer, request, grammar=grammar)
    remaining = text
    for token_id in policy.forced():
        policy.accept(token_id)
        remaining = text_after(tokenizer, token_id, remaining)
    times_ms: list[float] = []
    plan_bytes: list[int] = []
    while remaining:
        token_id = next_token(tokenizer, remaining)
        started_at = time.perf_counter()
        policy.accept(token_id)
        forced = accept_forced(policy, stop_ids)
        token_ids = (token_id, *forced)
        row = Row(0, POSITION, token_ids, False, request.sampling, token_mask=policy.token_mask(()))
        payload = encode_message(Step(number=len(times_ms), rows=(row,), limit_s=60.0))
        step = decode_to_stage(payload)
        assert isinstance(step, Step)
        sampling_request = SamplingRequest(Sampling(seed=1, temperature=0), POSITION + 1, (), step.rows[0].token_mask)
        sample_tokens(logits, [sampling_request])
        times_ms.append((time.perf_counter() - started_at) * 1e3)
        plan_bytes.append(len(payload))
        for consumed_id in (token_id, *forced):
            remaining = text_after(tokenizer, consumed_id, remaining)
    return times_ms, plan_bytes


def accept_forced(policy: ReplyPolicy, stop_ids: frozenset[int]) -> list[int]:
    """Accept the tokens that the policy forces, except those that end the reply; return the accepted ones."""
    accepted: list[int] = []
    while forced := [token_id for token_id in policy.forced() if token_id not in stop_ids]:
        for token_id in forced:
            policy.accept(token_id)
        accepted += forced
    return accepted


def next_token(tokenizer: Tokenizer, text: str) -> int:
    """Return the first token of a text; a control token if the text begins with its name, such as <|tool_call_end|>."""
    control_name = text[: text.find("|>") + 2] if text.startswith("<|") else ""
    if control_name in tokenizer.special_ids:
        return tokenizer.special_ids[control_name]
    ordinary_text = text[:40].partition("<|")[0]  # enough for the first token, without the name of a control token
    return tokenizer.encode_text(ordinary_text)[0]


def text_after(tokenizer: Tokenizer, token_id: int, text: str) -> str:
    """Return a text without the token at its beginning, and without the rest of a character that the token splits.

    Return '', which ends the run, if the text begins with another token.
    """
    data, token = text.encode(), tokenizer.token_bytes(token_id)
    return data[len(token) :].decode(errors="ignore") if data.startswith(token) else ""


# ---- streams


def measure_streams(tokenizer: Tokenizer, files: dict[str, bytes], grammar: ReplyGrammar) -> ResultRow:
    """Return the row of NUM_STREAMS constrained streams against as many free ones, on two stages."""
    fields = tiny_config_fields(VOCAB_SIZE, hidden_size=256, num_hidden_layers=8, max_position_embeddings=8192)
    folder = Path(tempfile.gettempdir()) / "mlx-k2-bench" / "kimi-vocabulary"
    if not folder.exists():
        write_random_checkpoint(folder, fields, seed=1, tokenizer_files=files)
    with (
        local_deployment(folder, 2, NUM_STREAMS) as deployment,
        engine_on(deployment, draft_mode=DraftMode.OFF) as engine,
    ):
        constrained = partial(tokens_per_s, engine, tokenizer, grammar)
        free = partial(tokens_per_s, engine, tokenizer, None)
        alternate(constrained, free, 1)  # not counted: the first run of each is slower
        pairs = alternate(constrained, free)
    constrained_rates, free_rates = (summarize(rates) for rates in zip(*pairs, strict=True))
    print(f"{NUM_STREAMS} streams on two stages: {constrained_rates} constrained, {free_rates} free tokens/s")
    print(f"ratio {summarize(ratios(pairs))}")
    ratio = f"{statistics.median(ratios(pairs)):.3f}"
    return ResultRow(f"{NUM_STREAMS} streams", NUM_STREAMS * STREAM_TOKENS, ratio=ratio)


def tokens_per_s(engine: Engine, tokenizer: Tokenizer, grammar: ReplyGrammar | None) -> float:
    """Return the sampled tokens per second of NUM_STREAMS streams together."""
    submissions = []
    for seed in range(NUM_STREAMS):
        prompt_ids = (seed, tokenizer.token_id("<think>"), tokenizer.token_id("</think>"))
        stop_ids = tokenizer.stop_ids if grammar else frozenset()
        request = Request(prompt_ids, STREAM_TOKENS, Sampling(seed=seed), stop_ids)
        submissions.append(Submission(request, ReplyPolicy(tokenizer, request, grammar=grammar)))
    arrivals = [
        event.arrived_at
        for handle in engine.submit_all(submissions)
        for event in handle.events()
        if isinstance(event, Token) and not event.is_forced
    ]
    num_decoded = len(arrivals) - NUM_STREAMS  # prefill samples the first token of each stream
    return num_decoded / (max(arrivals) - min(arrivals))


if __name__ == "__main__":
    main()
