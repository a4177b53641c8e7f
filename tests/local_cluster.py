"""A small random model with a tokenizer, and real stages that run it on this machine."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import msgspec
import psutil

from mlx_k2.cluster.hostfile import Backend, Host, Hostfile
from mlx_k2.coordinator.engine import Engine
from mlx_k2.coordinator.handle import Finished, Handle, Token
from mlx_k2.coordinator.jobs import Submission
from mlx_k2.coordinator.pipeline import Pipeline, StepTimeout
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest
from mlx_k2.deployment.deploy import Deployment, deploy
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.protocol.messages import FromStage, LayerLoaded
from mlx_k2.sampling import Sampling
from mlx_k2.scheduling.drafter import DraftMode
from mlx_k2.scheduling.request import Request
from mlx_k2.scheduling.scheduler import Scheduler, SchedulerLimits
from mlx_k2.scheduling.step_policy import StepPolicy
from mlx_k2.testing.random_checkpoint import write_random_checkpoint
from mlx_k2.testing.tiny_config import tiny_config_fields
from mlx_k2.testing.tiny_vocabulary import tiny_vocabulary
from mlx_k2.weights.checkpoint import describe_model
from mlx_k2.weights.model_files import read_model_files
from mlx_k2.weights.model_source import ModelSource

VOCAB_SIZE = 768
NUM_LAYERS = 7
CONTEXT_TOKENS = 2048
CHUNK_TOKENS = 32
RANK_VARIABLE = "MLX_K2_TEST_RANK"


def write_model(folder: Path, context_tokens: int = CONTEXT_TOKENS) -> Path:
    """Write the model to ``folder``. Its config names no stop token, so every answer has ``max_tokens`` tokens."""
    files = tiny_vocabulary(VOCAB_SIZE, context_tokens).files | {"generation_config.json": b"{}"}
    fields = tiny_config_fields(VOCAB_SIZE, max_position_embeddings=context_tokens)
    write_random_checkpoint(folder, fields, seed=20, tokenizer_files=files)
    return folder


def request(num_prompt: int, max_tokens: int, seed: int = 1, temperature: float = 1.0) -> Request:
    """Return a request with a prompt of ``num_prompt`` tokens, the first of which is the length modulo VOCAB_SIZE.

    So prompts of different lengths below VOCAB_SIZE have no common prefix.
    """
    prompt_ids = tuple((num_prompt + 31 * position) % VOCAB_SIZE for position in range(num_prompt))
    return Request(prompt_ids, max_tokens, Sampling(seed=seed, temperature=temperature), frozenset())


@dataclass
class LoadedNames(DeploymentListener):
    """Listener that collects the names of the tensors that each stage reports as loaded."""

    by_rank: dict[int, list[str]] = field(default_factory=dict)

    def progress(self, rank: int, message: FromStage) -> None:
        if isinstance(message, LayerLoaded):
            self.by_rank.setdefault(rank, []).extend(message.tensor_names)


@dataclass(frozen=True)
class Cluster:
    """Ready stages, and the engine that runs requests over them."""

    deployment: Deployment
    engine: Engine
    loaded: LoadedNames

    def tokens(self, *requests: Request) -> dict[Request, list[int]]:
        """Run the requests and return the token ids of each."""
        return tokens_of(self.engine, *requests)


def tokens_of(engine: Engine, *requests: Request) -> dict[Request, list[int]]:
    """Run the requests together and return the token ids of each."""
    handles = engine.submit_all([Submission(request) for request in requests])
    return {handle.request: rest_of(handle)[0] for handle in handles}


def rest_of(handle: Handle) -> tuple[list[int], Finished]:
    """Return the token ids that a handle still yields, and its end."""
    token_ids = []
    for event in handle.events():
        if isinstance(event, Token):
            token_ids.append(event.token_id)
    assert isinstance(event, Finished)
    return token_ids, event


def together(engine: Engine, *requests: Request) -> Iterator[tuple[Request, Token]]:
    """Run the requests at the same time and yield each token with its request, in the order of arrival."""
    ready: SimpleQueue[Handle] = SimpleQueue()
    handles = engine.submit_all([Submission(request, notify=ready.put) for request in requests])
    events = {handle: handle.events() for handle in handles}
    while events:
        handle = ready.get(timeout=120)  # the queue has a handle once for each of its events
        match next(events[handle]):
            case Token() as token:
                yield handle.request, token
            case Finished():
                del events[handle]


def local_request(folder: Path, hosts: Sequence[Host]) -> DeploymentRequest:
    """Return a deployment request for the model in ``folder``, with one stage on each host, and three slots."""
    hostfile = Hostfile(hosts=tuple(hosts), backend=Backend.RING)
    source = ModelSource(path_or_repo=str(folder))
    return DeploymentRequest(ClusterOptions(context_tokens=CONTEXT_TOKENS), hostfile, source, num_slots=3)


def local_host() -> Host:
    """Return this machine as a host, over loopback."""
    return Host(ssh="127.0.0.1", ips=("127.0.0.1",))


@contextmanager
def local_cluster(
    folder: Path,
    hosts: Sequence[Host],
    step_timeout: StepTimeout | None = None,
    stall_timeout_s: float = 8.0,
    *,
    drafts: bool = False,
    context_tokens: int = CONTEXT_TOKENS,
) -> Iterator[Cluster]:
    """Start real stages on this machine, one for each of ``hosts`` (as in a hostfile), and yield them when ready.

    ``drafts``: whether n-grams draft tokens.
    """
    options = {"stall_timeout_s": stall_timeout_s, "context_tokens": context_tokens}
    deployment_request = local_request(folder, hosts).with_options(**options)
    model = describe_model(read_model_files(deployment_request.source).files, str(folder))
    loaded = LoadedNames()
    with deploy(deployment_request, model, loaded) as deployment:
        limits = SchedulerLimits(deployment.shape.num_slots, context_tokens, CHUNK_TOKENS, len(hosts))
        policy = StepPolicy(deployment.costs)
        scheduler = Scheduler(limits, policy, draft_mode=DraftMode.NGRAM if drafts else DraftMode.OFF)
        pipeline = Pipeline(deployment.group, scheduler, policy, VOCAB_SIZE, step_timeout)
        with Engine(pipeline, scheduler) as engine:
            yield Cluster(deployment, engine, loaded)


def marked_host(folder: Path, rank: int, python: str) -> Host:
    """Return this machine as a host whose processes have ``rank`` in the environment variable RANK_VARIABLE.

    The host's Python is a script in ``folder`` that sets the variable and starts ``python``.
    """
    script = folder / f"python-{rank}"
    script.write_text(f'#!/bin/sh\n{RANK_VARIABLE}={rank} exec {python} "$@"\n')
    script.chmod(0o755)
    return msgspec.structs.replace(local_host(), python=str(script))


def stage_process(rank: int) -> psutil.Process:
    """Return the stage process (not its guard) on the `marked_host` of ``rank``, a descendant of this process."""
    (stage,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if "mlx_k2.stage.program" in process.cmdline() and process.environ().get(RANK_VARIABLE) == str(rank)
    ]
    return stage


def still_running_after(processes: Sequence[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Return the processes that still run after ``timeout_s``. Return at once when all have ended."""
    deadline = time.monotonic() + timeout_s
    while (running := [process for process in processes if is_running(process)]) and time.monotonic() < deadline:
        psutil.wait_procs(running, timeout=0.05)  # short, because it also waits for zombies of other parents
    return running


def is_running(process: psutil.Process) -> bool:
    """Return whether the process runs. A zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
