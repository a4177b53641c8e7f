"""Cost of a constraint: the time that it adds to each token, the bytes of its plans, and eight streams of it.

python -m bench.constrained [--save] [--only tokens|streams] [--kimi FOLDER]

With Kimi's vocabulary of 163,840 tokens. Two parts of each sampled token are timed: from its arrival to its next plan
(the policy records it, forces tokens and makes the mask; the plan is encoded), and in the last stage (the plan is
decoded, the mask is applied to the logits). The tokens are those of texts that the constraints allow. The same is timed
for a free reply; the added time is the difference to its median. Each text runs NUM_RUNS times, and a token's time is
its median, since another process does not interrupt the same token in each run. The cost of the grammar itself is part
of each run, because every run begins with a new compiler. The 99th percentile over all single times is printed, too.

The streams run on two local stages with a random checkpoint, constrained to one JSON string, whose masks are the
largest, and free. Both sample the same number of tokens. --save appends the rows to results/constrained.csv.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

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
NUM_PAIRS = 7
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help="append the rows to results/constrained.csv")
    parser.add_argument("--only", choices=["tokens", "streams"], help="one part only")
    default = os.environ.get("MLX_K2_KIMI_FILES", "../shared/kimi")
    parser.add_argument("--kimi", type=Path, default=Path(default), help="folder with Kimi's vocabulary")
    options = parser.parse_args()
    files = {name: (options.kimi / name).read_bytes() for name in FILES}
    tokenizer = load_tokenizer(files, VOCAB_SIZE)
    began = time.perf_counter()
    compiler = GrammarCompiler(tokenizer)
    constraint = compile_constraint(compiler, answer(RECORDS))
    print(f"vocabulary and first schema compiled in {time.perf_counter() - began:.2f} s")
    rows: list[Sequence[object]] = []
    if options.only != "streams":
        rows += measure_tokens(tokenizer)
    if options.only != "tokens":
        text = compile_constraint(compiler, answer({"type": "string", "minLength": 1000}))
        rows += measure_streams(tokenizer, files, text)
    assert constraint.warnings == ()
    if options.save:
        header = (
            "commit",
            "case",
            "tokens",
            "p50_ms",
            "p99_ms",
            "single_p99_ms",
            "plan_bytes_p50",
            "plan_bytes_max",
            "ratio",
        )
        print(save_rows("constrained", header, [(commit(), *row) for row in rows]))


def answer(schema: object) -> Constraint:
    """Return the constraint of an answer in JSON."""
    return Constraint(AnswerFormat(AnswerForm.JSON_SCHEMA, schema=schema))


# ---- time of a token


def cases() -> dict[str, tuple[Constraint | None, str]]:
    """Return the constraints, each with a reply that it allows."""
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
    compact = json.dumps(records, ensure_ascii=False, separators=(",", ":"))
    tools = tuple(Tool(f"mcp__server{n % 3}__tool_{n}", RECORD) for n in range(40))
    calls = "".join(
        f"<|tool_call_begin|>functions.{tools[n].name}:{n}<|tool_call_argument_begin|>"
        f"{json.dumps(records[n], ensure_ascii=False)}<|tool_call_end|>"
        for n in range(MAX_CALLS)
    )
    section = f"<|tool_calls_section_begin|>{calls}<|tool_calls_section_end|>"
    required = Constraint(tools=ToolRules(tools, ToolChoice.REQUIRED))
    pattern = Constraint(AnswerFormat(AnswerForm.REGEX, "(?:[^#]|#[0-9])*"))
    return {
        "free": (None, compact),
        "records": (answer(RECORDS), compact),
        "any object": (answer({"type": "object"}), f'{{"records":{compact}}}'),
        "regular expression": (pattern, WORDS * 40),
        "calls of 40 tools": (required, section),
    }


def measure_tokens(tokenizer: Tokenizer) -> list[Sequence[object]]:
    """Time each sampled token of each case; return the rows."""
    rows: list[Sequence[object]] = []
    logits = mx.array(np.random.default_rng(0).normal(0, 3, (1, VOCAB_SIZE)).astype(np.float32))
    free_ms = 0.0
    for name, (constraint, text) in cases().items():
        runs: list[list[float]] = []
        for _ in range(NUM_RUNS):
            grammar = None if constraint is None else compile_constraint(GrammarCompiler(tokenizer), constraint)
            run_ms, sizes = time_tokens(tokenizer, grammar, text, logits)
            runs.append(run_ms)
        times_ms = [statistics.median(same) for same in zip(*runs, strict=True)]
        p50, p99 = statistics.median(times_ms), statistics.quantiles(times_ms, n=100)[98]
        single_p99 = statistics.quantiles([one for run_ms in runs for one in run_ms], n=100)[98]
        free_ms = free_ms or p50
        added = (p50 - free_ms, p99 - free_ms)
        print(
            f"{name}: {len(times_ms)} tokens, {p50:.3f} ms (p99 {p99:.3f}, single times {single_p99:.3f}), "
            f"added {added[0]:.3f} (p99 {added[1]:.3f})"
        )
        print(f"    plan {statistics.median(sizes):.0f} bytes (at most {max(sizes)})")
        found = (f"{added[0]:.3f}", f"{added[1]:.3f}", f"{single_p99 - free_ms:.3f}")
        rows.append((name, len(times_ms), *found, statistics.median(sizes), max(sizes), ""))
    return rows


def time_tokens(
    tokenizer: Tokenizer, grammar: ReplyGrammar | None, text: str, logits: mx.array
) -> tuple[list[float], list[int]]:
    """Return the milliseconds of each sampled token and the bytes of its plan."""
    stop_ids = tokenizer.stop_ids
    prompt_ids = (tokenizer.token_id("<think>"), tokenizer.token_id("</think>"))
    request = Request(prompt_ids, 10_000, Sampling(seed=1), stop_ids)
    policy = ReplyPolicy(tokenizer, request, grammar=grammar)
    left = text
    for token_id in policy.forced():
        policy.accept(token_id)
        left = after(tokenizer, token_id, left)
    times_ms: list[float] = []
    sizes: list[int] = []
    while left:
        token_id = next_token(tokenizer, left)
        began = time.perf_counter()
        policy.accept(token_id)
        forced = forced_after(policy, stop_ids)
        row = Row(0, 1000, (token_id, *forced), False, request.sampling, token_mask=policy.token_mask(()))
        payload = encode_message(Step(len(times_ms), (row,), 60.0))
        step = decode_to_stage(payload)
        assert isinstance(step, Step)
        sampled = SamplingRequest(Sampling(seed=1, temperature=0), 1001, (), step.rows[0].token_mask)
        sample_tokens(logits, [sampled])
        times_ms.append((time.perf_counter() - began) * 1e3)
        sizes.append(len(payload))
        for number in (token_id, *forced):
            left = after(tokenizer, number, left)
    return times_ms, sizes


def forced_after(policy: ReplyPolicy, stop_ids: frozenset[int]) -> list[int]:
    """Accept the tokens that a policy forces now, but none that ends the reply; return them."""
    accepted: list[int] = []
    while forced := [number for number in policy.forced() if number not in stop_ids]:
        for token_id in forced:
            policy.accept(token_id)
        accepted += forced
    return accepted


def next_token(tokenizer: Tokenizer, text: str) -> int:
    """Return the first token of a text, with the names of control tokens as these."""
    name = text[: text.find("|>") + 2] if text.startswith("<|") else ""
    return (
        tokenizer.special_ids[name]
        if name in tokenizer.special_ids
        else tokenizer.encode_text(text[:40].partition("<|")[0])[0]
    )


def after(tokenizer: Tokenizer, token_id: int, text: str) -> str:
    """Return a text without the token at its beginning; '' if it does not begin with it."""
    data, token = text.encode(), tokenizer.token_bytes(token_id)
    rest = data[len(token) :] if data.startswith(token) else b""
    return rest.decode(errors="ignore")


# ---- streams


def measure_streams(tokenizer: Tokenizer, files: dict[str, bytes], grammar: ReplyGrammar) -> list[Sequence[object]]:
    """Return the row of eight constrained streams against eight free ones, on two stages."""
    fields = tiny_config_fields(VOCAB_SIZE, hidden_size=256, num_hidden_layers=8, max_position_embeddings=8192)
    folder = Path(tempfile.gettempdir()) / "mlx-k2-bench" / "kimi-vocabulary"
    if not folder.exists():
        write_random_checkpoint(folder, fields, seed=1, tokenizer_files=files)
    with (
        local_deployment(folder, 2, NUM_STREAMS) as deployment,
        engine_on(deployment, draft_mode=DraftMode.OFF) as engine,
    ):
        rate(engine, tokenizer, grammar)
        rate(engine, tokenizer, None)
        pairs = alternate(lambda: rate(engine, tokenizer, grammar), lambda: rate(engine, tokenizer, None), NUM_PAIRS)
    constrained, free = zip(*pairs, strict=True)
    print(f"{NUM_STREAMS} streams on two stages: {summarize(constrained)} constrained, {summarize(free)} free tokens/s")
    print(f"ratio {summarize(ratios(pairs))}")
    return [("8 streams", NUM_STREAMS * STREAM_TOKENS, "", "", "", "", "", f"{statistics.median(ratios(pairs)):.3f}")]


def rate(engine: Engine, tokenizer: Tokenizer, grammar: ReplyGrammar | None) -> float:
    """Return the sampled tokens per second of all streams."""
    submissions = []
    for seed in range(NUM_STREAMS):
        prompt_ids = (seed, tokenizer.token_id("<think>"), tokenizer.token_id("</think>"))
        request = Request(
            prompt_ids, STREAM_TOKENS, Sampling(seed=seed), tokenizer.stop_ids if grammar else frozenset()
        )
        submissions.append(Submission(request, ReplyPolicy(tokenizer, request, grammar=grammar)))
    times = [
        event.arrived_at
        for handle in engine.submit_all(submissions)
        for event in handle.events()
        if isinstance(event, Token) and not event.is_forced
    ]
    return (len(times) - NUM_STREAMS) / (max(times) - min(times))


if __name__ == "__main__":
    main()
