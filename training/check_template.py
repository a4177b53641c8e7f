"""A comparison of rendered training conversations with a chat template's rendering. Knows nothing of tokens.

python -m training.check_template --template FILE --conversations N
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from training.conversation import Conversation, Json, render_prompt
from training.data import TRAINING_SEED, conversations, held_out


def load_template(path: Path) -> Template:
    """Load the template with the options and the `tojson` filter that K2's template needs. `tojson` sorts keys."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def tojson(value: Json, separators: tuple[str, str] | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=separators)

    environment.filters["tojson"] = tojson
    return environment.from_string(path.read_text())


def is_same(template: Template, conversation: Conversation) -> bool:
    """Return whether each prompt of the last exchange, one for each reply, equals the template's rendering."""
    tools = [tool.schema() for tool in conversation.tools]
    return all(
        template.render(messages=conversation.messages(num_steps), tools=tools, add_generation_prompt=True)
        == render_prompt(conversation, num_steps)
        for num_steps in range(len(conversation.exchanges[-1].steps) + 1)
    )


def main() -> None:
    """Run the command. Exit with code 1 if a prompt is different."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--template", type=Path, required=True, help="chat_template.jinja")
    parser.add_argument("--conversations", type=int, required=True, help="number to compare")
    options = parser.parse_args()
    template = load_template(options.template)
    stream = conversations(TRAINING_SEED, excluded_keys=held_out().keys)
    num_same = sum(is_same(template, each) for each in itertools.islice(stream, options.conversations))
    print(f"{num_same} of {options.conversations} conversations are rendered alike")
    sys.exit(num_same != options.conversations)


if __name__ == "__main__":
    main()
