"""The processes that a test has started."""

import psutil


def started_processes(*, recursive: bool = True) -> list[psutil.Process]:
    """Return this process's descendants, or with ``recursive`` False its children only.

    The process that renders chat templates is left out, because it runs until this process ends.
    """
    return [process for process in psutil.Process().children(recursive=recursive) if not _renders_templates(process)]


def _renders_templates(process: psutil.Process) -> bool:
    try:
        return "mlx_k2.text.template_worker" in process.cmdline()
    except psutil.Error:  # a zombie, or a process that has ended
        return False
