"""A program that runs the chat's REPL with scripted replies instead of stages, so that a test knows the output.

Its arguments are a key of REPLIES and the path of a transcript. It prints "left" at its end.
"""

import sys
import threading
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from mlx_k2.chat.chat_session import ChatSession, ReplySettings
from mlx_k2.chat.conversation import Conversation
from mlx_k2.cli.repl.commands import HELP, Commands
from mlx_k2.cli.repl.keyboard import choose_keyboard, without_echo
from mlx_k2.cli.repl.loop import Repl
from mlx_k2.cli.repl.screen import choose_screen
from mlx_k2.cli.repl.tool_approval import ToolApproval
from mlx_k2.cli.repl.transcript import Transcript
from mlx_k2.cli.repl.usage_totals import UsageTotals
from mlx_k2.sampling import Sampling
from mlx_k2.tools.servers import StdioServer
from mlx_k2.tools.toolbox import Limits, open_toolbox
from tests.chat.scripted import ScriptedSource
from tests.text.fixtures import builtin_template, tokenizer

SERVER = Path(__file__).parent.parent / "tools" / "mcp_server.py"
TOKEN_S = 0.002
STUCK_S = 1000.0
STUCK_INDEX = 5
"""Index of the token for which the reply of the script "stuck" waits, after <think>, </think>, T, h and i."""
CONTEXT_TOKENS = 16384
ADD_CALL = (
    "<think>A sum.</think><|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
    '{"a": 40}<|tool_call_end|><|tool_calls_section_end|><|im_end|>'
)
REPLIES = {
    "talk": (
        "<think>Somebody greets.</think>Hello **there**.\n\n```python\nprint(1)\n```\n\nBye.<|im_end|>",
        "<think></think>You wrote two lines.<|im_end|>",
        "<think>Long.</think>" + "word " * 2000 + "<|im_end|>",
        "<think></think>Once more.<|im_end|>",
    ),
    "stuck": ("<think></think>This answer never ends.<|im_end|>",),
    "late call": (ADD_CALL.replace("A sum.", "word " * 600), "<think></think>No sum.<|im_end|>"),
    "tools": (
        ADD_CALL,
        "<think></think>It is 42.<|im_end|>",
        ADD_CALL,
        "<think></think>No sum.<|im_end|>",
        ADD_CALL,
        ADD_CALL,
        "<think></think>Allowed.<|im_end|>",
    ),
}


def main(script: str, transcript_path: str) -> None:
    screen = choose_screen(show_thinking=True)
    usage = UsageTotals(CONTEXT_TOKENS, num_stages=2)
    with ExitStack() as stack:
        stack.enter_context(without_echo())
        transcript = stack.enter_context(Transcript(Path(transcript_path), screen.log))
        tools = None
        if script in ("tools", "late call"):
            server = StdioServer(name="s", command=sys.executable, args=(str(SERVER),))
            tools = stack.enter_context(open_toolbox([server], Limits(call_timeout_s=40)))
        keyboard = choose_keyboard(list(HELP), usage.status_line)
        approval = ToolApproval(screen, keyboard, (), allows_all=False)
        conversation = Conversation(builtin_template(), tokenizer(), [] if tools is None else tools.declarations)

        def wait_for_token(index: int) -> None:
            threading.Event().wait(STUCK_S if script == "stuck" and index == STUCK_INDEX else TOKEN_S)

        source = ScriptedSource(tokenizer(), *REPLIES[script], on_token=wait_for_token)
        settings = ReplySettings(
            Sampling(seed=1), max_tokens=9000, stop_ids=tokenizer().stop_ids, context_tokens=CONTEXT_TOKENS
        )
        session = ChatSession(source, tokenizer(), conversation, settings, tools, approval)
        approval.session = session
        show_stats = partial(screen.log, "no stages")
        commands = Commands(
            session,
            model_name="a script",
            model_digest="0",
            screen=screen,
            usage=usage,
            tools=tools,
            approval=approval,
            show_stats=show_stats,
            temperature=lambda thinking: 1.0,
        )
        Repl(commands, keyboard, transcript).run()
    sys.stderr.write("left\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
