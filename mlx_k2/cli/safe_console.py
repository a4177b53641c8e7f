"""The console that sends no control sequence to the terminal but its own. Knows no commands."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markdown import Markdown
from rich.segment import Segment

from mlx_k2.cli.terminal_text import printable


class SafeConsole(Console):
    """A rich console for text from models, tools, files and hosts.

    It cleans text after all rendering, because Markdown decodes escapes in links. A link of Markdown shows its address
    and is not a hyperlink of the terminal, which would hide the address.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield the segments of ``renderable`` with printable text and without hyperlinks."""
        if isinstance(renderable, Markdown):
            renderable.hyperlinks = False
        for segment in super().render(renderable, options):
            yield segment if segment.control else _safe(segment)

    def on_broken_pipe(self) -> None:
        """Write nothing more if stderr is closed: the program does not end because of a message that nobody reads."""
        if self.stderr:
            self.quiet = True
        else:
            super().on_broken_pipe()


def _safe(segment: Segment) -> Segment:
    style = segment.style
    if style is not None and style.link is not None:
        style = style.update_link(None)
    return Segment(printable(segment.text), style)
