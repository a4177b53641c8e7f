"""A console for untrusted text: only rich's own control sequences reach the terminal. Knows no commands."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markdown import Markdown
from rich.segment import Segment

from mlx_k2.cli.terminal_text import printable


class SafeConsole(Console):
    """A rich console for text from models, tools, files and hosts.

    Text is made printable after rendering, because Markdown decodes escapes in links. A link in Markdown is shown with
    its address and is no hyperlink of the terminal, which would hide the address.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of ``renderable`` with printable text and without hyperlinks."""
        if isinstance(renderable, Markdown):
            renderable.hyperlinks = False
        for segment in super().render(renderable, options):
            yield segment if segment.control else _printable_segment(segment)

    def on_broken_pipe(self) -> None:
        """Discard all further output if this console is stderr. The program continues without a reader of messages."""
        if self.stderr:
            self.quiet = True
        else:
            super().on_broken_pipe()


def _printable_segment(segment: Segment) -> Segment:
    style = segment.style
    if style is not None and style.link is not None:
        style = style.update_link(None)
    return Segment(printable(segment.text), style)
