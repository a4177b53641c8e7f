"""Test of the download of a model by hosts that reach a Hub which this machine does not reach."""

from pathlib import Path

import pytest

from mlx_k2.cluster.hostfile import Backend, Hostfile
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest
from mlx_k2.deployment.deploy import download
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.weights.model_source import ModelSource
from tests.deployment.test_draft_heads import host_with_home
from tests.local_cluster import write_model
from tests.weights.hub_server import COMMIT, serve_hub

pytestmark = pytest.mark.timeout(60)


def test_all_hosts_download_the_commit_that_the_first_host_found(tmp_path: Path) -> None:
    with serve_hub("someone/model", write_model(tmp_path / "hub")) as hub:
        hosts = tuple(
            host_with_home(tmp_path / name, HF_ENDPOINT=hub.endpoint, NO_PROXY="127.0.0.1,localhost")
            for name in ("first", "second")
        )
        source = ModelSource(path_or_repo="someone/model")
        request = DeploymentRequest(ClusterOptions(), Hostfile(hosts=hosts, backend=Backend.RING), source)
        downloads = download(request, model=None, listener=DeploymentListener())
    assert [Path(answer.folder).name for _, answer in downloads] == [COMMIT] * 2
    paths = [request.path for request in hub.requests]
    assert paths.count("/api/models/someone/model") == 1, "a host asked for the present commit again"
