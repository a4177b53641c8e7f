"""Download of requested files from a Hub repository into huggingface_hub's cache. Knows no layers.

huggingface_hub reads its own settings (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN) when it is imported. It resumes
after a broken connection, and checks sizes; checksums are checked here. A complete file is not fetched again.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]  # documented, but not in its __all__

from mlx_k2.errors import DownloadError
from mlx_k2.http_reason import http_reason
from mlx_k2.weights.checkpoint import TOKENIZER_NAMES
from mlx_k2.weights.index import CONFIG_NAME, INDEX_NAME, SINGLE_FILE_NAME
from mlx_k2.weights.manifest import HubFile

_LIST_TIMEOUT_S = 10.0

OnProgress = Callable[[int, int], None]
"""Called with the bytes that are present, and with the bytes of all requested files."""


class HubRepo(msgspec.Struct, frozen=True):
    """A repository on the Hub."""

    name: str  # owner/name
    revision: str | None = None  # branch, tag or commit; None: the main branch
    cache_folder: Path | None = None  # None: huggingface_hub's
    endpoint: str | None = None  # None: huggingface_hub's


class FetchedFiles(msgspec.Struct, frozen=True):
    """The result of a fetch: the requested files are in ``folder``; ``fetched_names`` were not there before.

    ``commit`` is the commit of the revision: used as another host's revision, it gives the same files there.
    ``hub_files`` has all files of the repository by name; it is empty if the Hub cannot be reached.
    """

    folder: Path
    commit: str
    fetched_names: tuple[str, ...]
    hub_files: dict[str, HubFile] = {}


class _Snapshot(msgspec.Struct, frozen=True):
    """A repository at one commit. ``hub_files`` None: the Hub cannot be reached, for ``offline_reason``."""

    repo: HubRepo
    folder: Path
    hub_files: Mapping[str, HubFile] | None
    offline_reason: str = ""

    @property
    def commit(self) -> str:
        return self.folder.name


def fetch_small_files(repo: HubRepo) -> FetchedFiles:
    """Fetch config, index, tokenizer files and chat template, as far as the repository has them.

    If it has no index, also fetch its single weight file, whose header replaces the index.

    Raises:
        DownloadError: there is no such repository or revision, or a file cannot be fetched.
    """
    snapshot = _open_snapshot(repo)
    cached = {path.name for path in snapshot.folder.iterdir()}
    available = cached if snapshot.hub_files is None else snapshot.hub_files.keys()
    names = [name for name in (CONFIG_NAME, INDEX_NAME, *TOKENIZER_NAMES) if name in available]
    if INDEX_NAME not in names and SINGLE_FILE_NAME in available:
        names.append(SINGLE_FILE_NAME)
    return _fetch(snapshot, names, lambda _done, _total: None)


def fetch_files(repo: HubRepo, names: Iterable[str], on_progress: OnProgress) -> FetchedFiles:
    """Fetch the files ``names`` that are not in the cache, one after the other.

    Raises:
        DownloadError: a file cannot be fetched, or its checksum is not the Hub's; names the file and the fix.
    """
    return _fetch(_open_snapshot(repo), list(names), on_progress)


def bytes_to_fetch(repo: HubRepo, names: Iterable[str]) -> dict[str, int]:
    """Return the size in bytes of each file of ``names`` that is not in the cache, by name. Fetch none of them.

    Raises:
        DownloadError: the repository lacks one of the files, or the Hub cannot be reached.
    """
    snapshot = _open_snapshot(repo)
    return {name: _hub_file(snapshot, name).size for name in names if not _is_cached(snapshot, name)}


def _open_snapshot(repo: HubRepo) -> _Snapshot:
    """List the repository's files, and fetch config.json, whose path gives the snapshot's folder.

    If the Hub cannot be reached, use the snapshot in the cache. The request to the Hub is not retried, so that a
    machine without a network fails at once.
    """
    try:
        info = HfApi(endpoint=repo.endpoint).model_info(
            repo.name, revision=repo.revision, files_metadata=True, timeout=_LIST_TIMEOUT_S
        )
    except Exception as error:  # any error of huggingface_hub or its HTTP client: the cache may suffice
        if (folder := _cached_folder(repo)) is not None:
            return _Snapshot(repo, folder, None, http_reason(error))
        raise DownloadError(_message(error, repo, CONFIG_NAME)) from error
    hub_files = {
        file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else None) for file in info.siblings or ()
    }
    return _Snapshot(repo, _download(repo, CONFIG_NAME, repo.revision).parent, hub_files)


def _cached_folder(repo: HubRepo) -> Path | None:
    """Return the folder of the repository's revision in the cache; None if it is not cached.

    The cache may have been copied by hand, without its record of branches. Then the main branch is the only snapshot.
    """
    base = (repo.cache_folder or Path(HF_HUB_CACHE)) / repo_folder_name(repo_id=repo.name, repo_type="model")
    snapshots = base / "snapshots"
    commit_file = base / "refs" / (repo.revision or "main")
    if commit_file.is_file():
        folder = snapshots / commit_file.read_text(errors="replace").strip()
    elif repo.revision is not None:
        folder = snapshots / repo.revision
    else:
        folders = list(snapshots.iterdir()) if snapshots.is_dir() else []
        folder = folders[0] if len(folders) == 1 else snapshots  # snapshots itself has no config.json: None
    return folder if (folder / CONFIG_NAME).exists() else None


def _fetch(snapshot: _Snapshot, names: list[str], on_progress: OnProgress) -> FetchedFiles:
    missing = {name: _hub_file(snapshot, name) for name in names if not _is_cached(snapshot, name)}
    done_bytes = sum((snapshot.folder / name).stat().st_size for name in names if name not in missing)
    total_bytes = done_bytes + sum(file.size for file in missing.values())
    on_progress(done_bytes, total_bytes)
    for name, file in missing.items():
        _fetch_file(snapshot, name, file, on_progress, done_bytes, total_bytes)
        done_bytes += file.size
        on_progress(done_bytes, total_bytes)
    return FetchedFiles(snapshot.folder, snapshot.commit, tuple(missing), dict(snapshot.hub_files or {}))


def _fetch_file(
    snapshot: _Snapshot, name: str, file: HubFile, on_progress: OnProgress, done_bytes: int, total_bytes: int
) -> None:
    """Fetch a file and compare it with the Hub's size and checksum. ``done_bytes``: bytes of all files before it.

    If the file differs, fetch it once more: huggingface_hub may have used a damaged file in the cache.
    """
    # At first replace a file of the wrong size only: another stage on this host may have fetched the file by now.
    for replace in (_has_wrong_size(snapshot, name), True):
        bar = _reporting_bar(lambda num_bytes: on_progress(done_bytes + min(num_bytes, file.size), total_bytes))
        _download(snapshot.repo, name, snapshot.commit, bar, replace=replace)
        difference = _difference(snapshot, name, file)
        if difference is None:
            return
    path = snapshot.folder / name  # a link to the file in the cache
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    raise DownloadError(
        f"{name} of {snapshot.repo.name} came with {difference} and was removed: fetch it again; "
        "if that does not help, a proxy between this host and the Hub changes files"
    )


def _download(
    repo: HubRepo, name: str, revision: str | None, bar: type[tqdm] | None = None, *, replace: bool = False
) -> Path:
    """Fetch a file into the cache and return its path. Without ``replace`` a cached file is kept."""
    try:
        path = hf_hub_download(
            repo.name,
            name,
            revision=revision,
            cache_dir=repo.cache_folder,
            endpoint=repo.endpoint,
            force_download=replace,
            tqdm_class=bar or _reporting_bar(lambda _done: None),
        )
    except Exception as error:  # any error of huggingface_hub: its types vary with its version
        raise DownloadError(_message(error, repo, name)) from error
    return Path(path)


def _reporting_bar(on_bytes: Callable[[int], None]) -> type[tqdm]:
    """Return a progress bar class for huggingface_hub that shows nothing and calls ``on_bytes`` with the bytes so far.

    Over Xet a file has two bars, for received and for written bytes; ``on_bytes`` gets the larger count.
    """
    most_bytes = 0

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))
            self.done_bytes = int(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            nonlocal most_bytes
            self.done_bytes += int(n or 0)
            most_bytes = max(most_bytes, self.done_bytes)
            on_bytes(most_bytes)

    return ReportingBar


def _hub_file(snapshot: _Snapshot, name: str) -> HubFile:
    repo = snapshot.repo
    if snapshot.hub_files is None:
        raise DownloadError(
            f"{name} of {repo.name} is not in this host's cache, and the Hub cannot be asked ({snapshot.offline_reason}"
            f"): connect this host, or run `mlx-k2 download --model {repo.name}` while it is connected"
        )
    if name not in snapshot.hub_files:
        raise DownloadError(
            f"{repo.name} at {snapshot.commit} has no file {name}: its index names a file that is not there"
        )
    return snapshot.hub_files[name]


def _is_cached(snapshot: _Snapshot, name: str) -> bool:
    return (snapshot.folder / name).exists() and not _has_wrong_size(snapshot, name)


def _has_wrong_size(snapshot: _Snapshot, name: str) -> bool:
    """Return whether a cached file has another size than the Hub's. Without the Hub its size counts as right."""
    path = snapshot.folder / name
    return snapshot.hub_files is not None and path.exists() and path.stat().st_size != _hub_file(snapshot, name).size


def _difference(snapshot: _Snapshot, name: str, hub_file: HubFile) -> str | None:
    """Return how a cached file's size or checksum differs from the Hub's; None if it does not."""
    path = snapshot.folder / name
    actual, expected = f"{path.stat().st_size} bytes", f"{hub_file.size} bytes"
    if actual == expected and hub_file.sha256 is not None:
        with path.open("rb") as file:
            actual = f"checksum {hashlib.file_digest(file, 'sha256').hexdigest()}"
        expected = f"checksum {hub_file.sha256}"
    return None if actual == expected else f"{actual} instead of {expected}"


def _message(error: Exception, repo: HubRepo, name: str) -> str:
    """Return the message of a DownloadError for ``error``, which occurred while ``name`` was fetched."""
    revision = repo.revision or "main"
    match error:  # GatedRepoError and LocalEntryNotFoundError come before the classes that they are derived from
        case GatedRepoError():
            return f"{repo.name} requires consent first: give it on the repository's page, then run `hf auth login`"
        case RepositoryNotFoundError():
            return f"the Hub has no repository {repo.name}, or it is private: check the name, or run `hf auth login`"
        case RevisionNotFoundError():
            return f"{repo.name} has no revision {revision}"
        case OfflineModeIsEnabled():
            return _not_cached(name, repo, "HF_HUB_OFFLINE is set")
        case LocalEntryNotFoundError():
            return _not_cached(name, repo, http_reason(error.__cause__ or error))
        case EntryNotFoundError():
            return f"{repo.name} at {revision} has no {name}: it is not a checkpoint that mlx-k2 runs"
    reason = http_reason(error)
    # config.json is requested first: an error without a response to it means that the Hub cannot be reached.
    if isinstance(error, HfHubHTTPError) or name != CONFIG_NAME:
        return f"cannot fetch {name} of {repo.name}: {reason}; what is complete stays in the cache: try again"
    return _not_cached(name, repo, reason)


def _not_cached(name: str, repo: HubRepo, reason: str) -> str:
    return (
        f"{name} of {repo.name} at {repo.revision or 'main'} is not in this host's cache, and the Hub cannot be "
        f"reached ({reason}): connect this host, or copy the checkpoint here and give --model its folder"
    )
