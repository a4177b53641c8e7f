"""Check of prose: no file has a phrase that the project has replaced by plain words."""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.test_names import FOLDERS, ROOT

# Replaced phrases, and what to write instead.
RETIRED_PHRASES = {
    "as good as": "almost, or: equal to",
    "as it stands": "unchanged",
    "begin anew": "delete all messages, or: start again",
    "beside the matter": "irrelevant",
    "carry on": "continue",
    "comes from elsewhere": "the name of the source",
    "does not pay": "is not faster",
    "failed for good": "failed and are not restarted",
    "for want of": "because ... is missing",
    "gives its word": "reports",
    "go on where": "continue",
    "goes on where": "continues",
    "goes wrong": "fails",
    "hang in silence": "stop without a message",
    "has a say": "influences",
    "how it stands": "its status",
    "in the long run": "a time or a number of steps",
    "in the way": "the name of the obstacle",
    "is heard": "sends a message",
    "lies beside": "is in the folder of",
    "lies in": "is in",
    "others go on": "others continue",
    "see to the": "check the",
    "so to speak": "nothing: delete it",
    "something else than": "other than",
    "stands alone": "takes no argument",
    "stood then": "the status at that time",
    "taken for granted": "assumed",
    "the way out": "what to do",
    "to mend": "to fix",
    "wait for ever": "wait without a limit",
    "with a word on": "with a message that names",
    "without a word": "without a message",
}
FILE_PATTERNS = ("*.py", "*.md", "*.metal", "*.h", "*.cpp")


def retired_phrases(text: str) -> list[str]:
    """Return the retired phrases in a text, also those with line breaks and comment signs between their words."""
    prose = re.sub(r"\s*\n\s*(?:#|//|>)?\s*", " ", text).lower()
    return [phrase for phrase in RETIRED_PHRASES if phrase in prose and re.search(rf"\b{phrase}\b", prose)]


def prose_files() -> Iterator[Path]:
    """Yield the files of the source folders and the documents. Goldens, which others wrote, are left out."""
    for folder in (*FOLDERS, "docs"):
        for pattern in FILE_PATTERNS:
            yield from (path for path in (ROOT / folder).rglob(pattern) if "goldens" not in path.parts)
    yield from ROOT.glob("*.md")


def test_no_file_has_a_retired_phrase() -> None:
    violations = [
        f"{path.relative_to(ROOT)}: {phrase} (write {RETIRED_PHRASES[phrase]})"
        for path in prose_files()
        if path != Path(__file__)
        for phrase in retired_phrases(path.read_text())
    ]
    assert not violations, "\n" + "\n".join(violations)


def test_a_retired_phrase_is_found_across_a_line_break() -> None:
    assert retired_phrases("# It carries something\n    # else than frames.") == ["something else than"]
    assert retired_phrases("It is something else.") == []
