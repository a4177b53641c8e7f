"""Start of the tools that options name. Logs the tool servers that cannot be used."""

import logging
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_k2.chat.tool_round import Tools
from mlx_k2.cli.console import log
from mlx_k2.cli.options import ToolOptions
from mlx_k2.errors import ToolsError

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
        install = f"{shlex.quote(sys.executable)} -m pip install mcp"
        raise ToolsError(f"--tools and --mcp need the package {error.name}: run `{install}`") from None

    for name in _MUTED_LOGGERS:  # they report a lost server, which the result of the call reports already
        logging.getLogger(name).setLevel(logging.CRITICAL)
    servers = () if options.mcp_path is None else read_mcp_file(Path(options.mcp_path), os.environ, log)
    if options.tools_path is not None:
        servers = (*servers, python_module(Path(options.tools_path), os.environ))
    with open_toolbox(servers, Limits(call_timeout_s=options.tool_timeout_s)) as tools:
        for problem in tools.problems:
            log(problem)
        unknown_tools = sorted(set(options.allowed_tools) - tools.tools.keys())
        if unknown_tools:
            known_tools = ", ".join(tools.tools) or "none"
            raise ToolsError(f"--allow-tool {unknown_tools[0]}: there is no such tool; the tools are {known_tools}")
        yield tools
