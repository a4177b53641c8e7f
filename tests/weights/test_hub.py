"""Tests of downloads from a local server with the Hub's protocol."""

import contextlib
import hashlib
import itertools
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from huggingface_hub import close_session

from mlx_k2.config import ModelConfig
from mlx_k2.errors import DownloadError
from mlx_k2.weights.checkpoint import describe_model, locate_tensors, read_small_files
from mlx_k2.weights.hub import HubRepo, bytes_to_fetch, fetch_files, fetch_small_files
from mlx_k2.weights.index import CheckpointIndex, check_names, read_index_json
from mlx_k2.weights.inventory import layer_specs, model_specs, shard_specs
from mlx_k2.weights.known_layout import known_layout
from mlx_k2.weights.manifest import identify, read_manifest
from mlx_k2.weights.model_files import fetch_shard
from mlx_k2.weights.model_source import ModelSource
from mlx_k2.weights.safetensors_file import write_file
from tests.advice import follows_advice
from tests.weights.hub_server import COMMIT, Hub, serve_hub
from tests.weights.tiny_checkpoints import write_tiny

REPO = "moonshotai/Kimi-K2-Tiny"
LAYER_2, LAYER_3, LAYER_4 = (f"model-0000{layer + 1}-of-000008.safetensors" for layer in (2, 3, 4))
SMALL_FILES = {"config.json", "model.safetensors.index.json", "tiktoken.model"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """Return the folder and the config of a tiny checkpoint. The folder has a Python file, too."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    config = write_tiny(folder)
    (folder / "modeling_deepseek.py").write_text("raise SystemExit('never fetched, never run')")
    return folder, config


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let requests to the loopback addresses bypass a proxy of this machine."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def hub(tiny: tuple[Path, ModelConfig]) -> Iterator[Hub]:
    with serve_hub(REPO, tiny[0]) as hub:
        yield hub


@pytest.fixture
def repo(hub: Hub, tmp_path: Path) -> HubRepo:
    return HubRepo(REPO, cache_folder=tmp_path / "cache", endpoint=hub.endpoint)


def fetch_in_another_process(name: str, environment: dict[str, str]) -> str:
    """Fetch one file in a new process, because huggingface_hub reads its environment when it is imported."""
    program = f"""
from mlx_k2.errors import DownloadError
from mlx_k2.weights.hub import HubRepo, fetch_files
try:
    print("fetched", fetch_files(HubRepo({REPO!r}), [{name!r}], lambda done, total: None).fetched_names)
except DownloadError as error:
    print(error)
"""
    command = [sys.executable, "-c", program]
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return completed.stdout.strip()


def ignore_progress(_done: int, _total: int) -> None:
    pass


def test_the_coordinator_fetches_the_small_files_and_no_others(hub: Hub, repo: HubRepo) -> None:
    fetched = fetch_small_files(repo)
    assert hub.fetched == SMALL_FILES
    assert fetched.commit == COMMIT
    assert {path.name for path in fetched.folder.iterdir()} == SMALL_FILES
    assert read_small_files(fetched.folder) == {name: hub.files[name] for name in SMALL_FILES}


@pytest.mark.parametrize("cuts", [(0, 7), (0, 4, 7), (0, 1, 3, 7)])
def test_each_stage_fetches_only_its_files(
    hub: Hub, tiny: tuple[Path, ModelConfig], tmp_path: Path, cuts: tuple[int, ...]
) -> None:
    folder, config = tiny
    index = CheckpointIndex.from_json(read_index_json(folder), "the index")
    for stage, (first, end) in enumerate(itertools.pairwise(cuts)):
        specs = shard_specs(config, first, end)
        names = index.files(specs)
        hub.requests.clear()
        repo_on_host = HubRepo(REPO, COMMIT, cache_folder=tmp_path / f"host-{stage}", endpoint=hub.endpoint)
        fetched = fetch_files(repo_on_host, names, ignore_progress)
        assert hub.fetched == {*names, "config.json"}  # the path of config.json gives the folder
        assert fetched.fetched_names == tuple(names)
        assert len(locate_tensors(fetched.folder, index, specs)) == len(specs)


def test_a_second_fetch_downloads_nothing(hub: Hub, repo: HubRepo) -> None:
    fetch_files(repo, [LAYER_2], ignore_progress)
    hub.requests.clear()
    assert fetch_files(repo, [LAYER_2], ignore_progress).fetched_names == ()
    assert hub.fetched == set()


def test_progress_counts_the_bytes_of_all_files_up_to_the_total(hub: Hub, repo: HubRepo) -> None:
    names = [LAYER_2, LAYER_3]
    total = sum(len(hub.files[name]) for name in names)
    reports: list[tuple[int, int]] = []
    fetch_files(repo, names, lambda done, reported_total: reports.append((done, reported_total)))
    assert reports[0] == (0, total)
    assert reports[-1] == (total, total)
    assert reports == sorted(reports)
    assert {reported_total for _, reported_total in reports} == {total}


def test_a_download_that_broke_off_continues_after_the_last_complete_piece(hub: Hub, repo: HubRepo) -> None:
    mib = 2**20  # huggingface_hub keeps only whole pieces of 10 MiB
    hub.files[LAYER_2] = random.Random(0).randbytes(24 * mib)
    hub.break_offsets[LAYER_2] = [11 * mib, 12 * mib]  # the second response begins at 10 MiB and ends at 22 MiB
    fetched = fetch_files(repo, [LAYER_2], ignore_progress)
    assert hub.ranges(LAYER_2) == [0, 10 * mib, 20 * mib]
    assert (fetched.folder / LAYER_2).read_bytes() == hub.files[LAYER_2]


@follows_advice(
    "cannot fetch a of b: c; what is complete stays in the cache: try again",
)
def test_after_an_interruption_only_missing_files_are_fetched(hub: Hub, repo: HubRepo) -> None:
    names = ["model-00002-of-000008.safetensors", LAYER_2, LAYER_3]

    def interrupt(done: int, _total: int) -> None:
        if done > len(hub.files[names[0]]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_files(repo, names, interrupt)
    hub.requests.clear()
    assert fetch_files(repo, names, ignore_progress).fetched_names == tuple(names[1:])
    assert hub.fetched == set(names[1:])


def test_a_file_of_the_wrong_size_is_refused_and_not_cached(hub: Hub, repo: HubRepo) -> None:
    hub.wrong_contents[LAYER_2] = hub.files[LAYER_2] + b"more"
    with pytest.raises(DownloadError, match=f"cannot fetch {LAYER_2} of {REPO}: .*should be of size"):
        fetch_files(repo, [LAYER_2], ignore_progress)
    assert bytes_to_fetch(repo, [LAYER_2]) == {LAYER_2: len(hub.files[LAYER_2])}


@follows_advice(
    "a: fetch it again; if that does not help, a proxy between this host and the Hub changes files",
)
def test_a_file_with_the_wrong_checksum_is_refused_and_not_cached(hub: Hub, repo: HubRepo) -> None:
    data = bytearray(hub.files[LAYER_2])
    data[-1] ^= 1
    hub.wrong_contents[LAYER_2] = bytes(data)
    with pytest.raises(DownloadError, match=f"{LAYER_2} of {REPO} came with checksum .* instead of checksum"):
        fetch_files(repo, [LAYER_2], ignore_progress)
    del hub.wrong_contents[LAYER_2]
    fetched = fetch_files(repo, [LAYER_2], ignore_progress)
    assert (fetched.folder / LAYER_2).read_bytes() == hub.files[LAYER_2]


def test_a_truncated_file_in_the_cache_is_fetched_again(hub: Hub, repo: HubRepo) -> None:
    path = fetch_files(repo, [LAYER_2], ignore_progress).folder / LAYER_2
    path.resolve().write_bytes(hub.files[LAYER_2][:1000])
    assert fetch_files(repo, [LAYER_2], ignore_progress).fetched_names == (LAYER_2,)
    assert path.read_bytes() == hub.files[LAYER_2]


def test_a_file_that_another_stage_has_fetched_meanwhile_is_not_fetched_again(hub: Hub, repo: HubRepo) -> None:
    def fetch_as_another_stage(done: int, _total: int) -> None:
        if done == 0:
            fetch_files(repo, [LAYER_2], ignore_progress)

    folder = fetch_files(repo, [LAYER_2, LAYER_3], fetch_as_another_stage).folder
    assert (folder / LAYER_2).stat().st_size == len(hub.files[LAYER_2])
    assert hub.ranges(LAYER_2) == [0]


def test_bytes_to_fetch_lists_missing_files_without_fetching_them(hub: Hub, repo: HubRepo) -> None:
    fetch_small_files(repo)
    hub.requests.clear()
    assert bytes_to_fetch(repo, ["config.json", LAYER_2]) == {LAYER_2: len(hub.files[LAYER_2])}
    assert hub.fetched == set()


def test_cached_files_are_used_when_the_hub_is_unreachable(tiny: tuple[Path, ModelConfig], tmp_path: Path) -> None:
    with serve_hub(REPO, tiny[0]) as hub:
        repo = HubRepo(REPO, None, tmp_path / "cache", hub.endpoint)
        fetch_small_files(repo)
        fetch_files(repo, [LAYER_2], ignore_progress)
    assert describe_model(read_small_files(fetch_small_files(repo).folder), REPO).config == tiny[1]
    assert fetch_files(repo, [LAYER_2], ignore_progress).fetched_names == ()
    with pytest.raises(DownloadError, match=f"{LAYER_4} of .* is not in this host's cache"):
        fetch_files(repo, [LAYER_4], ignore_progress)


def test_hub_settings_come_from_the_environment_and_offline_mode_sends_no_request(hub: Hub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
    assert fetch_in_another_process(LAYER_2, environment) == f"fetched ('{LAYER_2}',)"
    assert hub.fetched == {"config.json", LAYER_2}
    hub.requests.clear()
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert fetch_in_another_process(LAYER_2, offline) == "fetched ()"
    assert "is not in this host's cache" in fetch_in_another_process(LAYER_4, offline)
    assert hub.requests == []


def test_a_checkpoint_of_one_file_is_fetched_whole_because_it_has_the_tensor_names(
    tmp_path: Path, tiny: tuple[Path, ModelConfig]
) -> None:
    folder, config = tiny
    single = tmp_path / "single"
    single.mkdir()
    write_file(single / "model.safetensors", model_specs(config), lambda spec: [bytes(spec.num_bytes)])
    (single / "config.json").write_bytes((folder / "config.json").read_bytes())
    with serve_hub(REPO, single) as hub:
        fetched = fetch_small_files(HubRepo(REPO, None, tmp_path / "cache", hub.endpoint))
    assert set(fetched.fetched_names) == {"model.safetensors"}
    describe_model(read_small_files(fetched.folder), REPO)


@follows_advice(
    "a requires consent first: give it on the repository's page, then run `hf auth login`",
    "the Hub has no repository a, or it is private: check the name, or run `hf auth login`",
)
@pytest.mark.parametrize(
    ("name", "revision", "reason"),
    [
        ("moonshotai/none", None, "the Hub has no repository moonshotai/none, or it is private"),
        ("moonshotai/gated", None, "moonshotai/gated requires consent first"),
        (REPO, "v9", f"{REPO} has no revision v9"),
    ],
)
def test_an_unavailable_repository_or_revision_is_refused_with_the_reason(
    hub: Hub, tmp_path: Path, name: str, revision: str | None, reason: str
) -> None:
    with pytest.raises(DownloadError, match=reason):
        fetch_small_files(HubRepo(name, revision, tmp_path, hub.endpoint))


def test_a_repository_without_config_json_is_refused(hub: Hub, repo: HubRepo) -> None:
    del hub.files["config.json"]
    with pytest.raises(DownloadError, match=r"has no config\.json: it is not a checkpoint"):
        fetch_small_files(repo)


def test_a_file_in_the_index_that_the_repository_lacks_is_named(hub: Hub, repo: HubRepo) -> None:
    del hub.files[LAYER_2]
    with pytest.raises(DownloadError, match=f"{REPO} at {COMMIT} has no file {LAYER_2}"):
        fetch_files(repo, [LAYER_2], ignore_progress)


def test_the_manifest_has_all_large_files_and_blocks_of_the_fetched_ones(
    hub: Hub, tiny: tuple[Path, ModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_k2.weights.model_files._hub_repo", lambda _: HubRepo(REPO, None, tmp_path, hub.endpoint))
    index = CheckpointIndex.from_json(read_index_json(tiny[0]), "index")
    fetched = fetch_shard(ModelSource(path_or_repo=REPO), index, layer_specs(tiny[1], 2), ignore_progress)
    entries = read_manifest(fetched.folder).files
    assert entries.keys() == {name for name in hub.files if name.endswith((".safetensors", ".model"))}
    assert {name for name, entry in entries.items() if entry.blocks is not None} == {LAYER_2}
    assert identify([fetched.folder / LAYER_2])[LAYER_2] == hashlib.sha256(hub.files[LAYER_2]).hexdigest()


def test_a_damaged_file_that_is_still_in_the_cache_is_fetched_again_at_once(hub: Hub, repo: HubRepo) -> None:
    path = fetch_files(repo, [LAYER_2], ignore_progress).folder / LAYER_2
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)
    path.unlink()  # as the advice of `mlx-k2 doctor`: this removes the link, not the file in the cache
    fetched = fetch_files(repo, [LAYER_2], ignore_progress)
    assert fetched.fetched_names == (LAYER_2,)
    assert (fetched.folder / LAYER_2).read_bytes() == hub.files[LAYER_2]


UNREACHABLE = "http://127.0.0.1:9"
"""Port 9 of this machine, on which no process listens."""


@pytest.fixture
def cached(hub: Hub, repo: HubRepo) -> HubRepo:
    """Return a repository whose Hub is unreachable, with its small files and LAYER_2 in the cache."""
    fetch_small_files(repo)
    fetch_files(repo, [LAYER_2], ignore_progress)
    return msgspec.structs.replace(repo, endpoint=UNREACHABLE)


@contextlib.contextmanager
def http_settings(monkeypatch: pytest.MonkeyPatch, **environment: str) -> Iterator[None]:
    """Set variables, and make huggingface_hub create its HTTP client again under them."""
    with monkeypatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        close_session()
        yield
        close_session()


REFERENCE = {
    "intact": COMMIT,
    "ending in a newline": f"{COMMIT}\n",
    "missing, with one snapshot": None,
}


@pytest.mark.parametrize("reference", REFERENCE.values(), ids=REFERENCE)
def test_a_cache_that_was_copied_by_hand_is_used(cached: HubRepo, reference: str | None) -> None:
    assert cached.cache_folder is not None
    (main,) = cached.cache_folder.glob("*/refs/main")
    main.unlink()
    if reference is not None:
        main.write_text(reference)
    assert fetch_files(cached, [LAYER_2, "config.json"], ignore_progress).fetched_names == ()


def test_without_a_network_the_error_is_raised_at_once_and_nothing_is_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DownloadError, match="Connection refused"):
        fetch_small_files(HubRepo(REPO, None, tmp_path, UNREACHABLE))
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


SOCKS_URL, MISSING_FILE = "socks5://user:secret@127.0.0.1:9", "/nowhere.pem"


@pytest.mark.parametrize(
    ("name", "value"), [("ALL_PROXY", SOCKS_URL), ("https_proxy", SOCKS_URL), ("SSL_CERT_FILE", MISSING_FILE)]
)
def test_broken_settings_for_http_do_not_matter_for_files_in_the_cache(
    cached: HubRepo, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with http_settings(monkeypatch, **{name: value}):
        assert fetch_small_files(cached).fetched_names == ()
        assert fetch_files(cached, [LAYER_2], ignore_progress).fetched_names == ()
        with pytest.raises(DownloadError, match=rf"is not in this host's cache.*\b{name}\b") as refused:
            fetch_files(cached, [LAYER_4], ignore_progress)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "value"), [("ALL_PROXY", SOCKS_URL), ("HTTPS_PROXY", UNREACHABLE), ("SSL_CERT_FILE", MISSING_FILE)]
)
def test_a_failed_request_names_the_variable_of_the_proxy_or_of_the_missing_certificate_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    with http_settings(monkeypatch, **{name: value}), pytest.raises(DownloadError, match=rf"\b{name}\b") as refused:
        fetch_small_files(HubRepo(REPO, None, tmp_path, UNREACHABLE))
    assert "secret" not in str(refused.value)


def test_the_known_layout_of_kimi_k2_thinking_has_the_published_files_and_bytes() -> None:
    model = known_layout(ModelSource(path_or_repo="moonshotai/Kimi-K2-Thinking"))
    assert model is not None
    assert check_names(model.config, model.index) is None
    files = model.index.files(model_specs(model.config))
    names = list(files)
    assert names == [f"model-{number:05}-of-000062.safetensors" for number in range(1, 63)]
    sizes = {name: sum(spec.num_bytes for spec in specs) for name, specs in files.items()}
    assert sum(sizes.values()) == 594_205_904_896
    assert sizes[names[0]] == 995_000_320
    shape_bytes = 384 * 3 * 8  # a weight_shape of two int32 for each matrix of each expert
    assert sizes[names[1]] == 9_808_545_280 + shape_bytes
    assert sizes[names[-1]] == 4_697_634_816
    assert known_layout(ModelSource(path_or_repo="moonshotai/Kimi-K2-Thinking", revision="v1")) is None
    assert known_layout(ModelSource(path_or_repo="moonshotai/Kimi-K2.5")) is None
