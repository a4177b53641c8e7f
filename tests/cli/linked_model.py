"""Copies of a model whose files are links, so that a test may replace some of them."""

from pathlib import Path


def link_model(model: Path, folder: Path) -> Path:
    """Link the files of a model into ``folder``, which is created if it is missing. Return ``folder``."""
    folder.mkdir(exist_ok=True)
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def replace_file(path: Path, data: bytes | bytearray) -> None:
    """Replace a link by a file, so that the file of the original model is unchanged."""
    path.unlink()
    path.write_bytes(data)
