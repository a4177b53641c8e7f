"""The download of requested files of a Hub repository into huggingface_hub's cache, and no others. Knows no layers.

huggingface_hub reads its own settings (HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN) when it is imported. It resumes
after a broken connection, and checks sizes; checksums are checked here. A process that ends loses only the file that it
was fetching.
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
    """A repository on the Hub; ``revision`` None is its main branch.

    ``cache_folder`` and ``endpoint`` None are huggingface_hub's own.
    """

    name: str
    revision: str | None = None
    cache_folder: Path | None = None
    endpoint: str | None = None


class FetchedFiles(msgspec.Struct, frozen=True):
    """Files that are all in ``folder`` now; ``fetched`` names those that were not there before.

    ``commit`` is the commit of the revision: used as another host's revision, it gives the same files there.
    ``listed`` has all files of the repository by name; it is empty if the Hub cannot be reached.
    """

    folder: Path
    commit: str
    fetched: tuple[str, ...]
    listed: dict[str, HubFile] = {}


class _Snapshot(msgspec.Struct, frozen=True):
    """A repository at one commit. ``remote``: the files that the Hub lists; None after the error in ``offline``."""

    repo: HubRepo
    folder: Path
    remote: Mapping[str, HubFile] | None
    offline: str = ""

    @property
    def commit(self) -> str:
        return self.folder.name


def fetch_small_files(repo: HubRepo) -> FetchedFiles:
    """Fetch those of config, index, tokenizer files and chat template that the repository has.

    A repository without an index has its weights in one file, which is then fetched too: its header is the index.

    Raises:
        DownloadError: there is no such repository or revision, or a file cannot be fetched.
    """
    snapshot = _open(repo)
    cached = {path.name for path in snapshot.folder.iterdir()}
    available = cached if snapshot.remote is None else snapshot.remote.keys()
    names = [name for name in (CONFIG_NAME, INDEX_NAME, *TOKENIZER_NAMES) if name in available]
    if INDEX_NAME not in names and SINGLE_FILE_NAME in available:
        names.append(SINGLE_FILE_NAME)
    return _fetch(snapshot, names, lambda _done, _total: None)


def fetch_files(repo: HubRepo, names: Iterable[str], on_progress: OnProgress) -> FetchedFiles:
    """Fetch the files ``names``, one after the other. Keep those that are in the cache.

    Raises:
        DownloadError: a file cannot be fetched, or is not the Hub's; names the file and the fix.
    """
    return _fetch(_open(repo), list(names), on_progress)


def bytes_to_fetch(repo: HubRepo, names: Iterable[str]) -> dict[str, int]:
    """Return the size of each file of ``names`` that is not in the cache yet, by name. Fetch none of them.

    Raises:
        DownloadError: the repository does not have one of them, or the Hub cannot be reached.
    """
    snapshot = _open(repo)
    return {name: _remote_file(snapshot, name).size for name in names if not _is_there(snapshot, name)}


def _open(repo: HubRepo) -> _Snapshot:
    """List the repository's files and fetch config.json. Use the snapshot in the cache if the Hub cannot be asked.

    The Hub is asked once, without retries, so that a machine without a network fails at once.
    """
    try:
        info = HfApi(endpoint=repo.endpoint).model_info(
            repo.name, revision=repo.revision, files_metadata=True, timeout=_LIST_TIMEOUT_S
        )
    except Exception as error:  # any error of huggingface_hub or its HTTP client: the cache may suffice
        if (cached := _cached_snapshot(repo)) is not None:
            return _Snapshot(repo, cached, None, http_reason(error))
        raise DownloadError(_explain(error, repo, CONFIG_NAME)) from error
    remote = {
        file.rfilename: HubFile(file.size or 0, file.lfs.sha256 if file.lfs else None) for file in info.siblings or ()
    }
    return _Snapshot(repo, _download(repo, CONFIG_NAME, repo.revision).parent, remote)


def _cached_snapshot(repo: HubRepo) -> Path | None:
    """Return the folder of the repository's revision in the cache, which may have been copied by hand; None without it.

    Without a record of the main branch the only snapshot is taken.
    """
    base = (repo.cache_folder or Path(HF_HUB_CACHE)) / repo_folder_name(repo_id=repo.name, repo_type="model")
    snapshots = base / "snapshots"
    record = base / "refs" / (repo.revision or "main")
    if record.is_file():
        folder = snapshots / record.read_text(errors="replace").strip()
    elif repo.revision is not None:
        folder = snapshots / repo.revision
    else:
        folders = list(snapshots.iterdir()) if snapshots.is_dir() else []
        folder = folders[0] if len(folders) == 1 else snapshots
    return folder if (folder / CONFIG_NAME).exists() else None


def _fetch(snapshot: _Snapshot, names: list[str], on_progress: OnProgress) -> FetchedFiles:
    missing = {name: _remote_file(snapshot, name) for name in names if not _is_there(snapshot, name)}
    done = sum((snapshot.folder / name).stat().st_size for name in names if name not in missing)
    total = done + sum(remote.size for remote in missing.values())
    on_progress(done, total)
    for name, remote in missing.items():
        before = done

        def report(num_bytes: int, before: int = before, size: int = remote.size) -> None:
            on_progress(before + min(num_bytes, size), total)

        for replace in (_is_wrong(snapshot, name), True):  # again for instance if a damaged file was still in the cache
            _download(snapshot.repo, name, snapshot.commit, _reporting_bar(report), replace=replace)
            if (difference := _difference(snapshot, name, remote)) is None:
                break
        else:
            path = snapshot.folder / name  # a link to the file in the cache
            path.resolve().unlink(missing_ok=True)
            path.unlink(missing_ok=True)
            raise DownloadError(
                f"{name} of {snapshot.repo.name} came with {difference} and was removed: fetch it again; "
                "if that does not help, a proxy between this host and the Hub changes files"
            )
        done += remote.size
        on_progress(done, total)
    return FetchedFiles(snapshot.folder, snapshot.commit, tuple(missing), dict(snapshot.remote or {}))


def _download(
    repo: HubRepo, name: str, revision: str | None, bar: type[tqdm] | None = None, *, replace: bool = False
) -> Path:
    """Fetch a file into the cache. Replace a cached file only with ``replace``. config.json, the first, has no bar."""
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
        raise DownloadError(_explain(error, repo, name)) from error
    return Path(path)


def _reporting_bar(on_bytes: Callable[[int], None]) -> type[tqdm]:
    """Return a progress bar class for huggingface_hub that shows nothing and calls ``on_bytes`` with the bytes done.

    Over Xet one file has two bars, of received and of written bytes; ``on_bytes`` gets the larger count.
    """
    furthest = 0

    class ReportingBar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | {"disable": True}))
            self.done_bytes = int(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            nonlocal furthest
            self.done_bytes += int(n or 0)
            furthest = max(furthest, self.done_bytes)
            on_bytes(furthest)

    return ReportingBar


def _remote_file(snapshot: _Snapshot, name: str) -> HubFile:
    repo = snapshot.repo
    if snapshot.remote is None:
        raise DownloadError(
            f"{name} of {repo.name} is not in this host's cache, and the Hub cannot be asked ({snapshot.offline}): "
            f"connect this host, or run `mlx-k2 download --model {repo.name}` while it is connected"
        )
    if name not in snapshot.remote:
        raise DownloadError(
            f"{repo.name} at {snapshot.commit} has no file {name}: its index names a file that is not there"
        )
    return snapshot.remote[name]


def _is_there(snapshot: _Snapshot, name: str) -> bool:
    return (snapshot.folder / name).exists() and not _is_wrong(snapshot, name)


def _is_wrong(snapshot: _Snapshot, name: str) -> bool:
    """Return whether a file is there whose size is not the Hub's. Another stage on this host may be fetching it now."""
    path = snapshot.folder / name
    return snapshot.remote is not None and path.exists() and path.stat().st_size != _remote_file(snapshot, name).size


def _difference(snapshot: _Snapshot, name: str, remote: HubFile) -> str | None:
    """Return how a file's size or checksum differs from the Hub's, None if it does not."""
    path = snapshot.folder / name
    found, expected = f"{path.stat().st_size} bytes", f"{remote.size} bytes"
    if found == expected and remote.sha256 is not None:
        with path.open("rb") as file:
            found, expected = f"checksum {hashlib.file_digest(file, 'sha256').hexdigest()}", f"checksum {remote.sha256}"
    return None if found == expected else f"{found} instead of {expected}"


def _explain(error: Exception, repo: HubRepo, name: str) -> str:
    revision = repo.revision or "main"
    match error:
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
    if isinstance(error, HfHubHTTPError) or name != CONFIG_NAME:
        return f"cannot fetch {name} of {repo.name}: {reason}; what is complete stays in the cache: try again"
    return _not_cached(name, repo, reason)


def _not_cached(name: str, repo: HubRepo, reason: str) -> str:
    return (
        f"{name} of {repo.name} at {repo.revision or 'main'} is not in this host's cache, and the Hub cannot be "
        f"reached ({reason}): connect this host, or copy the checkpoint here and give --model its folder"
    )
