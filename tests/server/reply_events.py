"""The engine's events for the tokens of a reply, and the streams that an API's format makes of events."""

from collections.abc import Sequence

from hypothesis import strategies as st

from mlx_k2.coordinator.answer_summary import AnswerSummary
from mlx_k2.coordinator.handle import Event, Finished, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.reply_policy import ReplyLimits, ReplyPolicy
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.request import FinishReason, Request
from mlx_k2.server.language_model import Generation
from mlx_k2.server.sse import ReplyFormat
from tests.text.fixtures import tokenizer
from tests.text.replies import call, reply_ids, section

OPEN_CALL = "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{"
REPLY_PARTS = st.sampled_from(
    [
        "<think>",
        "</think>",
        "Hello ",
        " wörld ☃",
        "\n\n",
        section(call("functions.f:0", '{"a": "ö"}')),
        section(call("functions.f:0", "{}"), call("functions.g-h.i:1", '{"b": [1, 2]}')),
        section(call("functions.f:0", "")),
        section(call("functions.f:0", '{"broken')),
        section(call("", '{"a": 1}')),
        section("<|tool_call_begin|>functions.f:0<|tool_call_end|>"),
        OPEN_CALL,
        "stop here",
        "<|im_middle|>",
    ]
)
GROUP_SIZES = st.lists(st.integers(1, 7), max_size=8)
STOP_STRINGS = st.sampled_from([(), ("stop",), ("world", "here")])
DECLARED_NAMES = ("f", "g-h.i")


def new_generation(stop_strings: tuple[str, ...] = (), first_call: int = 0, in_reasoning: bool = False) -> Generation:
    """Return a generation of one reply, with tools of DECLARED_NAMES, whose calls are counted from ``first_call``."""
    prompt_ids = (tokenizer().special_ids["<think>"],) if in_reasoning else (5,)  # 5: a token of text
    request = Request(prompt_ids, max_tokens=1000, sampling=Sampling(seed=0), stop_ids=tokenizer().stop_ids)
    policy = ReplyPolicy(tokenizer(), request, ReplyLimits(stop_strings))
    return Generation((Submission(request, policy),), tokenizer(), in_reasoning, first_call, DECLARED_NAMES)


def engine_events(generation: Generation, text: str, reason: FinishReason = FinishReason.LENGTH) -> list[Event]:
    """Return the engine's events for a reply that ends with ``reason``, or earlier by its token policy.

    The last event has the parts that the policy holds back, as the engine's has after a timeout.
    """
    events: list[Event] = []
    policy = generation.submissions[0].policy
    assert policy is not None
    for token_id in reply_ids(text, tokenizer()):
        accepted = policy.accept(token_id)
        events.append(Token(token_id, accepted.text, accepted.parts, logprob=-0.5))
        if accepted.finish_reason is not None:
            reason = accepted.finish_reason
            break
    summary = AnswerSummary(
        prompt_tokens=3,
        cached_tokens=1,
        generated_tokens=len(events),
        finish_reason=reason,
        seed=0,
        time_to_first_token_s=None,
        prefill_tokens_per_s=None,
        decode_tokens_per_s=None,
    )
    return [*events, Finished(summary, policy.finish().parts)]


def add_events(reply_format: ReplyFormat, events: Sequence[Event]) -> bytes:
    """Add events of the first choice, and return their part of the stream."""
    return reply_format.events([(0, event) for event in events])


def stream_in_groups(reply_format: ReplyFormat, events: Sequence[Event], group_sizes: Sequence[int]) -> bytes:
    """Return the stream of events that are read in groups, each after a keep-alive. The last group has the rest."""
    stream, remaining_events = reply_format.begin(), list(events)
    for size in [*group_sizes, len(events)]:
        if remaining_events:
            stream += reply_format.keepalive() + add_events(reply_format, remaining_events[:size])
        remaining_events = remaining_events[size:]
    return stream
