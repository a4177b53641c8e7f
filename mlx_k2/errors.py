"""The one tree of errors that a user can see; each message says what, where, and the way out.

MlxK2Error
├── SetupError            nothing was started; exit code 2
│   ├── ConfigError       config.json is missing, or says what this program does not do
│   ├── CheckpointError   a file or a tensor is missing, misshapen or truncated
│   ├── TokenizerError    the tokenizer or the chat template cannot be used
│   ├── DownloadError     a file cannot be had from the Hub
│   ├── HostfileError     the hostfile is not one
│   ├── PartitionError    the layers cannot be divided, or do not fit
│   ├── ToolsError        an MCP file or a tools module cannot be used, or a tool server does not start
│   └── RequestError      the prompt or a sampling value cannot be served
└── ClusterError          something was already running; exit code 1
    ├── StageStartError   a stage did not come up: ssh, Python, versions, its own loading
    ├── StageFault        a stage that was running reported an error or ended
    │   └── NeighbourLost     it lost the hop to a neighbour, whose own end is then the cause
    ├── StageSilent       a deadline passed: names the stage, the host and the step
    └── ProtocolError     bytes on a control connection are not what was agreed
"""


class MlxK2Error(Exception):
    """Base of every error that reaches the user as one line, without a traceback."""

    exit_code = 1


class SetupError(MlxK2Error):
    """Found before any process was started."""

    exit_code = 2


class ConfigError(SetupError):
    """config.json is missing, malformed, or asks for something that is not implemented."""


class CheckpointError(SetupError):
    """The checkpoint's files do not hold what its config promises."""


class TokenizerError(SetupError):
    """The tokenizer's files or the chat template are missing or unusable."""


class DownloadError(SetupError):
    """A file of the model cannot be had from the Hub or its cache."""


class HostfileError(SetupError):
    """The hostfile is missing, malformed or contradicts itself."""


class PartitionError(SetupError):
    """The layers cannot be divided among the hosts as asked."""


class ToolsError(SetupError):
    """An MCP file or a tools module cannot be used, or a tool server does not start."""


class RequestError(SetupError):
    """The prompt or its sampling parameters cannot be served."""


class ClusterError(MlxK2Error):
    """Found after processes were started."""


class StageStartError(ClusterError):
    """A stage did not come up."""


class StageFault(ClusterError):
    """A running stage reported an error, or its process ended."""


class NeighbourLost(StageFault):
    """A stage lost the connection to a neighbour."""


class StageSilent(ClusterError):
    """A deadline passed without a word from a stage."""


class ProtocolError(ClusterError):
    """A control connection carried something that is not a frame or not a message."""
