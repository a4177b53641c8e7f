"""The options of a cluster as a user sets them, and the request for a deployment with them. Contacts no host."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec

from mlx_k2.cluster.hostfile import Host, Hostfile, local_hostfile, read_hostfile
from mlx_k2.errors import DownloadError, HostfileError, RequestError
from mlx_k2.launch.group import STALL_TIMEOUT_S
from mlx_k2.launch.stage_location import StageLocation
from mlx_k2.scheduling.drafter import DraftMode, effective_mode
from mlx_k2.weights.checkpoint import ModelDescription, describe_model
from mlx_k2.weights.model_files import read_draft, read_model_files
from mlx_k2.weights.model_source import BUILTIN, BUILTIN_HEAD, DraftHead, ModelSource, is_repo, model_folder

LEASE_S = 20.0
LEASE_RANGE_S = (2, 3600)
STALL_TIMEOUT_RANGE_S = (1, 3600)
MAX_STAGES = 64
DTYPES = ("bfloat16", "float32")
DENSE_BITS = (8, 4)
UNQUANTIZED_BITS = 16
DRAFT_BITS = (8, 4, UNQUANTIZED_BITS)
"""Bits per weight of a draft head, the default first."""


class ClusterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Hosts, model and their settings. None leaves the choice to the program.

    Without a hostfile, ``num_stages`` stages run on this machine; the default is 2 for the built-in model, else 1.
    ``model`` None is the built-in model. ``split`` has the number of layers of each stage. ``draft_aux`` are the layers
    whose outputs the draft head reads; None: those of its config. ``draft_vocab`` limits the number of different tokens
    that it drafts. ``stall_timeout_s`` is the maximum time that a stage may be stopped, a host silent or a hop stuck.
    ``dense_bits`` are the bits per weight of attention, shared experts, dense layers and head; None keeps the
    checkpoint's format. ``check_weights``: search all tensors for NaN and infinity while loading.

    Raises:
        RequestError, HostfileError: a value is out of range, or options contradict each other.
    """

    hostfile: str | None = None
    num_stages: Annotated[int, msgspec.Meta(ge=1, le=MAX_STAGES)] | None = None
    model: str | None = None
    revision: str | None = None
    split: tuple[Annotated[int, msgspec.Meta(ge=1)], ...] | None = None
    context_tokens: Annotated[int, msgspec.Meta(ge=2)] | None = None
    dtype: str | None = None
    dense_bits: int | None = None
    draft_model: str | None = None
    draft_aux: tuple[int, ...] | None = None
    draft_bits: int = DRAFT_BITS[0]
    draft_vocab: Annotated[int, msgspec.Meta(ge=1)] | None = None
    lease_s: float = LEASE_S
    stall_timeout_s: float = STALL_TIMEOUT_S
    check_weights: bool = False

    def __post_init__(self) -> None:
        """Check what the types do not express."""
        _check_seconds("lease", self.lease_s, LEASE_RANGE_S)
        _check_seconds("stall-timeout", self.stall_timeout_s, STALL_TIMEOUT_RANGE_S)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("dense-bits", self.dense_bits, DENSE_BITS)
        _check_choice("draft-bits", self.draft_bits, DRAFT_BITS)
        has_draft_options = (self.draft_aux, self.draft_vocab, self.draft_bits) != (None, None, DRAFT_BITS[0])
        has_no_head = self.draft_model is None and self.model is not None  # the built-in model has a draft head
        if has_draft_options and has_no_head:
            raise RequestError("--draft-aux, --draft-bits and --draft-vocab are for a draft model: give --draft-model")
        if self.hostfile is not None and self.num_stages is not None:
            raise HostfileError(
                "a number of stages is for runs on this machine alone: give it, or a hostfile, not both"
            )
        if self.revision is not None and not is_repo(self._source_as_given):
            raise RequestError(
                "a revision is for a repository on the Hub: leave it out, or give owner/name as the model"
            )

    @property
    def source(self) -> ModelSource:
        """The model's source. The path of a local folder is absolute, since a stage starts in another folder."""
        return self._source_as_given if self.model is None else _absolute(self._source_as_given)

    @property
    def draft_head(self) -> DraftHead | None:
        """The draft head to load beside the model: ``draft_model``, or the built-in model's; else None."""
        if self.draft_model is not None:
            source = _absolute(ModelSource(path_or_repo=self.draft_model))
        elif self.model is None:
            source = ModelSource(path_or_repo=BUILTIN_HEAD)
        else:
            return None
        bits = None if self.draft_bits == UNQUANTIZED_BITS else self.draft_bits
        return DraftHead(source=source, aux_layers=self.draft_aux, bits=bits, vocab_size=self.draft_vocab)

    @property
    def _source_as_given(self) -> ModelSource:
        return ModelSource(path_or_repo=BUILTIN if self.model is None else self.model, revision=self.revision)

    def read_hostfile(self) -> Hostfile:
        """Return the hosts.

        Raises:
            HostfileError: the hostfile is missing, or not usable.
        """
        if self.hostfile is not None:
            return read_hostfile(Path(self.hostfile))
        return local_hostfile(self.num_stages or (2 if self.model is None else 1))


@dataclass(frozen=True)
class DeploymentRequest:
    """The request for a deployment with ``options``: the hostfile that was read, and the source of the model."""

    options: ClusterOptions
    hostfile: Hostfile
    source: ModelSource
    num_slots: int = 1
    """Maximum number of sequences that run at once. It is reduced if their caches do not fit."""
    draft_head: DraftHead | None = None
    """The draft head to load beside the model."""
    address: str | None = None
    """The URL of the server that uses this deployment, as other commands show it to their users; None without one."""

    def with_options(self, **changes: Any) -> "DeploymentRequest":
        """Return the request with ``changes`` of its options; its other fields stay."""
        return replace(self, options=msgspec.structs.replace(self.options, **changes))

    def command_line(self, command: str) -> str:
        """Return the line for a shell that runs another command of mlx-k2 with the same hosts, model and layers."""
        options = self.options
        values = {
            "--hostfile": options.hostfile,
            "--stages": len(self.hostfile.hosts) if options.hostfile is None else None,
            "--model": None if options.model is None else self.source.path_or_repo,
            "--revision": options.revision,
            "--split": None if options.split is None else ",".join(map(str, options.split)),
        }
        words = [f" {name} {shlex.quote(str(value))}" for name, value in values.items() if value is not None]
        return f"mlx-k2 {command}{''.join(words)}"


def deployment_request(
    options: ClusterOptions, num_slots: int = 1, draft_mode: DraftMode = DraftMode.AUTO
) -> DeploymentRequest:
    """Return the request for a deployment in which at most ``num_slots`` sequences run at once.

    A draft head is requested only if ``draft_mode`` uses it, and the built-in model's head only for several stages.

    Raises:
        HostfileError: the hostfile cannot be used.
        RequestError: ``draft_mode`` is MODEL, and there is no draft head, or one stage.
    """
    hostfile, head = options.read_hostfile(), options.draft_head
    effective_mode(draft_mode, has_head=head is not None)  # raises for MODEL without a head
    is_lone = len(hostfile.hosts) == 1
    if is_lone and draft_mode is DraftMode.MODEL:
        raise RequestError("--draft model is for two stages or more: with one, leave it out")
    if not draft_mode.uses_head or (is_lone and options.draft_model is None):
        head = None
    return DeploymentRequest(options, hostfile, options.source, num_slots, head)


def open_source(
    request: DeploymentRequest, *, must_be_here: bool = False
) -> tuple[DeploymentRequest, ModelDescription | None]:
    """Return the request with the repository's present revision, and the model's description.

    With the revision in the request, every host uses the same one. The description is None if this machine cannot read
    the model, and the first host, another machine, may have it. With ``must_be_here`` it is never None.

    Raises:
        SetupError: the model or draft model is not found, mlx-k2 cannot run it, or one stage has a draft model.
    """
    source, head = request.source, request.draft_head
    if head is not None and len(request.hostfile.hosts) == 1:
        raise RequestError("--draft-model is for two stages or more: with one, leave it out")
    may_be_elsewhere = not must_be_here and not request.hostfile.hosts[0].is_local
    sources = [source] if head is None else [source, head.source]
    if may_be_elsewhere and not all(is_repo(each) or model_folder(each).is_dir() for each in sources):
        return request, None
    try:
        files, pinned = read_model_files(source)
        model = describe_model(files, source.path_or_repo)
        if head is not None:
            draft, head = read_draft(head, model.config)
            model = replace(model, draft=draft)
        return replace(request, source=pinned, draft_head=head), model
    except DownloadError:
        if may_be_elsewhere:
            return request, None
        raise


def _absolute(source: ModelSource) -> ModelSource:
    """Return ``source`` with the path of a local folder made absolute."""
    folder = model_folder(source)
    if not folder.is_dir():
        return source
    path = str(folder.resolve())
    try:
        path.encode()
    except UnicodeEncodeError:
        raise RequestError(f"model: the path {path} is not UTF-8: rename the folder") from None
    return ModelSource(path_or_repo=path)


def stage_location(host: Host) -> StageLocation:
    """Return the location of a host's stage."""
    return StageLocation(ssh=None if host.is_local else host.ssh, python=host.python)


def source_on(host: Host, source: ModelSource) -> ModelSource:
    """Return the model's source on ``host``, which may have it in a folder of its own."""
    return source if host.model is None else ModelSource(path_or_repo=host.model, revision=None)


def _check_seconds(name: str, seconds: float, allowed: tuple[int, int]) -> None:
    low, high = allowed
    if not low <= seconds <= high:  # also rejects NaN
        raise RequestError(f"{name} {seconds:g} is out of range: give {low} to {high} s")


def _check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    if value is not None and value not in allowed:
        raise RequestError(f"{name} {value} is unknown: give {' or '.join(map(str, allowed))}")
