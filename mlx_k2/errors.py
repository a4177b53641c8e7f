"""Tree of all errors that a user can see. Each message states what failed, where, and what to do.

MlxK2Error
├── SetupError            nothing was started; exit code 2
│   ├── ConfigError       config.json is missing, malformed or has a value that is not implemented
│   ├── CheckpointError   a file or a tensor is missing, misshapen or truncated
│   ├── TokenizerError    the tokenizer or the chat template cannot be used
│   ├── DownloadError     a file cannot be fetched from the Hub
│   ├── HostfileError     the hostfile is missing, malformed or contradictory
│   ├── PartitionError    the layers cannot be divided, or do not fit
│   ├── ToolsError        an MCP file or a tools module cannot be used, or a tool server does not start
│   └── RequestError      a prompt, an option or a file that the user names is invalid
├── Cancelled             the caller cancelled the operation; exit code 1
├── RequestFailed         one request failed; others continue; exit code 1
├── EngineBusy            the queue of requests is full; exit code 1
└── ClusterError          a failure after processes were started; exit code 1
    ├── StageStartError   a stage did not start: ssh, Python, versions, or loading failed
    ├── StageFault        a running stage reported an error or ended
    │   ├── NeighbourLost     a stage lost its connection to a neighbour: the neighbour ended, or the network failed
    │   └── NotFinite         a stage computed NaN or infinity: its weights or its memory are broken
    ├── StageSilent       a stage sent nothing before a deadline: names the stage, the host and the step
    └── ProtocolError     bytes on a control connection do not follow the protocol
"""


class MlxK2Error(Exception):
    """Base of every error that is printed as one line, without a traceback."""

    exit_code = 1


class SetupError(MlxK2Error):
    """Error found before any process was started."""

    exit_code = 2


class ConfigError(SetupError):
    """Missing or malformed config.json, or one with a value that is not implemented."""


class CheckpointError(SetupError):
    """Checkpoint whose files do not match its config."""


class TokenizerError(SetupError):
    """Missing or unusable tokenizer files or chat template."""


class DownloadError(SetupError):
    """Model file that cannot be fetched from the Hub or its cache."""


class HostfileError(SetupError):
    """Missing, malformed or contradictory hostfile."""


class PartitionError(SetupError):
    """Layers that cannot be divided among the hosts as requested."""


class ToolsError(SetupError):
    """Unusable MCP file or tools module, or a tool server that does not start."""


class RequestError(SetupError):
    """Invalid prompt, option or file that the user names."""


class Cancelled(MlxK2Error):
    """Operation that its caller cancelled."""


class RequestFailed(MlxK2Error):
    """Request that failed, while others continue."""


class EngineBusy(MlxK2Error):
    """Request that was refused because the queue is full. A place in the queue is expected after ``wait_s`` seconds."""

    def __init__(self, message: str, wait_s: float) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class ClusterError(MlxK2Error):
    """Failure after processes were started. ``rank`` is the stage that caused it; None if that is not known."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class StageStartError(ClusterError):
    """Stage that did not start."""


class StageFault(ClusterError):
    """Running stage that reported an error or whose process ended."""


class NeighbourLost(StageFault):
    """Stage that lost the connection to a neighbour."""


class NotFinite(StageFault):
    """Stage that computed NaN or infinity."""


class StageSilent(ClusterError):
    """Deadline that passed without a message from a stage."""


class ProtocolError(ClusterError):
    """Bytes on a control connection that are not a frame or not a message."""
