"""Start of the tools that options name. Logs the tool servers that cannot be used."""

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.console import log
from mlx_k2.cli.options import ToolOptions
from mlx_k2.errors import ToolsError
from mlx_k2.package_install import install_command

_MESSAGE_DELAY_S = 3.0
_MUTED_LOGGERS = ("mcp", "httpx", "httpx2", "asyncio", "client")


@contextmanager
def started_tools(options: ToolOptions) -> Iterator[Tools | None]:
    """Start the tools of --tools and --mcp and yield them; yield None without these options.

    Raises:
        ToolsError: a file cannot be used, no server starts, or --allow-tool names no tool.
    """
    if not options.has_tools:
        yield None
        return
    try:
        from mlx_k2.tools.servers import python_module, read_mcp_file
        from mlx_k2.tools.toolbox import Limits, open_toolbox
    except ModuleNotFoundError as error:
        raise ToolsError(f"--tools and --mcp need the package {error.name}: run `{install_command('mcp')}`") from None

    for name in _MUTED_LOGGERS:  # they report a lost server, which the result of the call reports already
        logging.getLogger(name).setLevel(logging.CRITICAL)
    servers = () if options.mcp_path is None else read_mcp_file(Path(options.mcp_path), os.environ, log)
    if options.tools_path is not None:
        servers = (*servers, python_module(Path(options.tools_path), os.environ))
    names = ", ".join(server.name for server in servers)
    message = threading.Timer(_MESSAGE_DELAY_S, log, [f"waiting until the tools of {names} are started ..."])
    with ExitStack() as stack:
        message.start()
        try:
            tools = stack.enter_context(open_toolbox(servers, Limits(call_timeout_s=options.tool_timeout_s)))
        finally:
            message.cancel()
        for problem in tools.problems:
            log(problem)
        unknown_tools = sorted(set(options.allowed_tools) - tools.tools.keys())
        if unknown_tools:
            known_tools = ", ".join(tools.tools) or "none"
            raise ToolsError(f"--allow-tool {unknown_tools[0]}: there is no such tool; the tools are {known_tools}")
        yield tools
