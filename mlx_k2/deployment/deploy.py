"""Deployment: starts a stage on every host, connects them and loads the model. Knows no prompt and no terminal."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version

import msgspec

from mlx_k2 import __version__
from mlx_k2.cluster.host_facts import RunningStage
from mlx_k2.deployment import bring_up
from mlx_k2.deployment.cluster_options import DeploymentRequest, source_on
from mlx_k2.deployment.dry_run import plan_for
from mlx_k2.deployment.listener import DeploymentListener
from mlx_k2.deployment.other_commands import describe_others, other_bytes, this_command
from mlx_k2.deployment.plan import HostMemory, RunShape, StagePlan, check_fit, quantization_warnings
from mlx_k2.deployment.stage_costs import stage_cost
from mlx_k2.errors import PartitionError, StageStartError
from mlx_k2.launch.group import StageGroup
from mlx_k2.protocol.messages import (
    DownloadShard,
    FetchFiles,
    FromStage,
    Hello,
    LayerLoaded,
    Load,
    Loaded,
    ModelFiles,
    ShardDownloaded,
)
from mlx_k2.scheduling.cost_model import StageCost
from mlx_k2.weights.checkpoint import ModelDescription, describe_model
from mlx_k2.weights.draft_head import describe_draft
from mlx_k2.weights.inventory import model_specs
from mlx_k2.weights.model_source import DraftHead, ModelSource


@dataclass(frozen=True)
class StartedStages:
    """Stages that have answered the handshake; plans and Hellos by rank."""

    group: StageGroup
    model: ModelDescription
    shape: RunShape
    plans: tuple[StagePlan, ...]
    hellos: tuple[Hello, ...]
    request: DeploymentRequest


@dataclass(frozen=True)
class Deployment(StartedStages):
    """Stages that are ready to run steps."""

    loaded: tuple[Loaded, ...]
    """The answers to Load, by rank."""
    load_s: float
    """Seconds from the start of the processes."""

    @property
    def costs(self) -> tuple[StageCost, ...]:
        """Expected cost of a step on each stage, from the model's shapes and the hosts' hardware."""
        head = self.request.draft_head
        return tuple(
            stage_cost(self.model, plan, self.shape, head, on_gpu=hello.working_set_bytes is not None)
            for plan, hello in zip(self.plans, self.hellos, strict=True)
        )


@contextmanager
def deploy(
    request: DeploymentRequest,
    model: ModelDescription | None,
    listener: DeploymentListener,
    before: StartedStages | None = None,
    cancelled: threading.Event | None = None,
) -> Iterator[Deployment]:
    """Start, connect and load every stage; end all of them on exit.

    ``model`` None: the model is not available on this machine, and stage 0 sends the model's small files. With
    ``before``, the stages that ended in a fault, the new ones get the same shape and layers.

    Raises:
        Cancelled: ``cancelled`` was set.
        SetupError, ClusterError: an operation failed; names it and the stage.
    """
    began = time.monotonic()
    with _start(request, model, listener, before, cancelled) as started:
        listener.phase("connecting")
        _connect(started)
        listener.phase("loading")
        loaded = _load(started, listener.progress)
        for plan, answer in zip(started.plans, loaded, strict=True):
            for line in answer.warnings:
                listener.notify(f"stage {plan.rank} on {started.group.host(plan.rank)}: {line}")
            if None in answer.checksums.values():  # None: neither the Hub nor a manifest gives the file's checksum
                command = request.command_line("doctor --deep")
                listener.log(f"[stage {plan.rank} {plan.host.ssh}] files not compared: run `{command}` once")
        yield Deployment(**vars(started), loaded=loaded, load_s=time.monotonic() - began)


def download(
    request: DeploymentRequest, model: ModelDescription | None, listener: DeploymentListener
) -> tuple[tuple[StagePlan, ShardDownloaded], ...]:
    """Fetch each stage's files on its own host, all hosts at once; return the plans and answers, by rank. Load nothing.

    Raises:
        SetupError, ClusterError: an operation failed; names it and the stage.
    """
    with _start(request, model, listener) as started:
        listener.phase("downloading")
        messages = [
            DownloadShard(
                source_on(plan.host, started.request.source),
                plan.assignment.first_layer,
                plan.assignment.end_layer,
                _draft_head_on(started, plan),
            )
            for plan in started.plans
        ]
        answers = bring_up.ask(
            started.group, messages, ShardDownloaded, bring_up.LAYER_S, "download its files", listener.progress
        )
        return tuple(zip(started.plans, answers, strict=True))


@contextmanager
def _start(
    request: DeploymentRequest,
    model: ModelDescription | None,
    listener: DeploymentListener,
    before: StartedStages | None = None,
    cancelled: threading.Event | None = None,
) -> Iterator[StartedStages]:
    """Start a stage on every host, and divide the layers by the memory and GPUs that the hosts report."""
    with bring_up.stage_group(request, listener, cancelled) as group:
        listener.phase(f"starting {group.size} stages" if group.size > 1 else "starting the stage")
        hellos = bring_up.handshake(group, (__version__, version("mlx")))
        if model is None:
            listener.phase(f"asking {group.host(0)} for the model's config and tokenizer")
            request, model = _fetch_description(group, request)
        all_on_gpu = all(hello.working_set_bytes is not None for hello in hellos)
        own, names = this_command(request.address), [group.host(rank) for rank in range(group.size)]
        memories = [
            HostMemory(hello.working_set_bytes, hello.memory_bytes, other_bytes(hello, own)) for hello in hellos
        ]
        try:
            if before is None:
                shape, plans = plan_for(request, model, memories, all_on_gpu=all_on_gpu)
            else:
                request, shape, plans = before.request, before.shape, before.plans
                check_fit(plans, memories)
        except (PartitionError, StageStartError) as error:  # names all other commands: each takes memory
            raise type(error)("; ".join([str(error), *describe_others(names, hellos, own, min_bytes=0)])) from None
        listener.planned(model, plans)
        for line in (*describe_others(names, hellos, own), *quantization_warnings(model.config, shape.dense_bits)):
            listener.notify(line)
        yield StartedStages(group, model, shape, plans, hellos, request)


def _fetch_description(group: StageGroup, request: DeploymentRequest) -> tuple[DeploymentRequest, ModelDescription]:
    """Fetch the small files of model and draft head from the first host; pin their revisions in the new request."""
    source, head = source_on(request.hostfile.hosts[0], request.source), request.draft_head
    model_files = _fetch_files(group, source)
    model = describe_model(model_files.files, f"{source.path_or_repo} on {group.host(0)}")
    if source == request.source:  # else the first host has its own folder, and request.source is for the others
        request = replace(request, source=model_files.source)
    if head is not None:
        head_files = _fetch_files(group, head.source)
        model = replace(model, draft=describe_draft(head_files.files, head, model.config))
        request = replace(request, draft_head=msgspec.structs.replace(head, source=head_files.source))
    return request, model


def _fetch_files(group: StageGroup, source: ModelSource) -> ModelFiles:
    group.send(0, FetchFiles(source))
    (answer,) = bring_up.collect(group, ModelFiles, [0], bring_up.PREPARE_S, "send the model's small files")
    return answer


def _draft_head_on(started: StartedStages, plan: StagePlan) -> DraftHead | None:
    """Return the draft head if the stage of ``plan`` reads some of its tensors, else None."""
    draft, num_layers = started.model.draft, started.model.config.num_hidden_layers
    is_read = draft is not None and draft.is_read_by_stage(
        plan.assignment.first_layer, plan.assignment.end_layer, num_layers
    )
    return started.request.draft_head if is_read else None


def _connect(started: StartedStages) -> None:
    """Prepare and connect all stages, and check that they have the model that this command read."""
    group, hostfile, source = started.group, started.request.hostfile, started.request.source
    heads = [_draft_head_on(started, plan) for plan in started.plans]
    answers = bring_up.prepare(group, hostfile, [source_on(host, source) for host in hostfile.hosts], heads)
    if answers[0].model_digest != started.model.digest:
        raise StageStartError(
            f"the model on {group.host(0)} (stage 0) is not the one that this command read: their config.json or "
            "model.safetensors.index.json differ; give the same --model and --revision for both"
        )
    bring_up.connect(group, bring_up.links(hostfile, answers))


def _load(started: StartedStages, on_progress: Callable[[int, FromStage], None]) -> tuple[Loaded, ...]:
    """Load all stages, and check that together they loaded every tensor of the model exactly once."""
    loaded_names: Counter[str] = Counter()

    def count_and_forward(rank: int, message: FromStage) -> None:
        if isinstance(message, LayerLoaded):
            loaded_names.update(message.tensor_names)
        on_progress(rank, message)

    for plan in started.plans:
        started.group.set_held_bytes(plan.rank, plan.assignment.held_bytes)
    messages = [_load_message(plan, started.shape, started.request) for plan in started.plans]
    loaded = bring_up.ask(started.group, messages, Loaded, bring_up.LAYER_S, "load its layers", count_and_forward)
    _compare_files(started, loaded)
    model_names = Counter(spec.name for spec in model_specs(started.model.config))
    if loaded_names != model_names:
        wrong = sorted((loaded_names - model_names) + (model_names - loaded_names))
        raise StageStartError(f"the stages did not load each tensor once: {wrong[0]} and {len(wrong) - 1} more")
    return loaded


def _compare_files(started: StartedStages, loaded: Sequence[Loaded]) -> None:
    """Check that the files with known checksums are the same on all hosts, hence of one revision."""
    first_known: dict[str, tuple[int, str]] = {}  # by file: the first stage that knows its checksum, and the checksum
    for plan, answer in zip(started.plans, loaded, strict=True):
        for name, checksum in answer.checksums.items():
            if checksum is None:
                continue
            rank, first_checksum = first_known.setdefault(name, (plan.rank, checksum))
            if checksum != first_checksum:
                raise StageStartError(
                    f"{name} on {started.group.host(plan.rank)} (stage {plan.rank}) is not the one on "
                    f"{started.group.host(rank)} (stage {rank}): fetch the same revision on both"
                )


def _load_message(plan: StagePlan, shape: RunShape, request: DeploymentRequest) -> Load:
    """Return the message for the stage of ``plan``. Each has the draft head, since all hops carry its features."""
    return Load(
        first_layer=plan.assignment.first_layer,
        end_layer=plan.assignment.end_layer,
        dtype=shape.dtype,
        num_slots=shape.num_slots,
        context_tokens=shape.context_tokens,
        needed_bytes=plan.needed_bytes,
        block_bytes=plan.block_bytes,
        dense_bits=shape.dense_bits,
        registration=RunningStage(this_command(request.address), plan.assignment.held_bytes),
        check_weights=request.options.check_weights,
        draft_head=request.draft_head,
    )
