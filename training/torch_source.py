"""Greedy replies of the torch model to questions. Knows nothing of expected replies."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.conversation import render_prompt
from training.data import Question
from training.decode import greedy
from training.model import Model
from training.vocabulary import load_encoding

_MAX_NEW_TOKENS = 160


@dataclass(frozen=True)
class Transcript:
    """A prompt and its reply as token ids, and the reply's text with its control tokens."""

    prompt: list[int]
    reply: list[int]
    text: str


def transcripts(run: Path, model: Model, questions: Sequence[Question]) -> list[Transcript]:
    """Return the model's greedy reply to each question."""
    encoding = load_encoding(run / "tiktoken.model")
    stop = encoding.encode_single_token("<|im_end|>")
    texts = [render_prompt(question.conversation, question.num_steps) for question in questions]
    prompts = [encoding.encode(text, allowed_special="all") for text in texts]
    replies = greedy(model, prompts, stop, _MAX_NEW_TOKENS)
    return [Transcript(ids, reply, encoding.decode(reply)) for ids, reply in zip(prompts, replies, strict=True)]
