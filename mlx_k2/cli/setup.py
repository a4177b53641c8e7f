"""`mlx-k2 setup`: installation on the Macs of a cluster, and a hostfile and a profile for all commands."""

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import click
import msgspec
import psutil

from mlx_k2 import __version__
from mlx_k2.cli.console import ConsoleListener, console, gigabytes, log, show_table
from mlx_k2.cli.doctor import show_checks
from mlx_k2.cli.option_values import with_struct
from mlx_k2.cli.profile import profile_path, with_value
from mlx_k2.cli.program_command import ProgramCommand
from mlx_k2.cluster.hostfile import Backend, Host, Hostfile, parse_hostfile, read_hostfile
from mlx_k2.deployment.cluster_options import ClusterOptions, DeploymentRequest
from mlx_k2.doctor.addresses import address_choices, fastest_choice, host_interfaces, with_addresses
from mlx_k2.doctor.checks import CheckResult
from mlx_k2.doctor.cluster_probe import probe_cluster
from mlx_k2.errors import ClusterError, HostfileError, RequestError, SetupError
from mlx_k2.launch.own_wheel import write_wheel
from mlx_k2.launch.remote_install import INSTALL_FOLDER, HostSurvey, install, wheel_digest
from mlx_k2.launch.remote_install import survey as survey_host
from mlx_k2.private_files import write_atomically
from mlx_k2.weights.model_source import BUILTIN, ModelSource, is_repo

THIS_MACHINE = "127.0.0.1"
_LOCAL_NAMES = ("this", "localhost", THIS_MACHINE)


class SetupOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `mlx-k2 setup`."""

    hosts: tuple[str, ...]
    addresses: tuple[str, ...]
    python: str | None
    wheels: str | None
    model: str | None
    hostfile: str | None
    yes: bool

    def __post_init__(self) -> None:
        """Refuse a folder without wheels, before any host is asked."""
        if self.wheels is not None and not any(Path(self.wheels).glob("*.whl")):
            raise RequestError(f"--wheels {self.wheels}: the folder is missing, or has no .whl file")

    @property
    def hostfile_path(self) -> Path:
        """Where the hostfile is written."""
        return profile_path().with_name("hosts.json") if self.hostfile is None else Path(self.hostfile).absolute()


@click.command(cls=ProgramCommand)
@click.argument("hosts", nargs=-1, metavar="[HOST]...")
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="IP",
    help="A host's address for hidden states; give it once for each host, in order.  [default: on the fastest network]",
)
@click.option(
    "--python", metavar="PATH", help="The Python on the hosts, 3.11 or newer.  [default: the one found there]"
)
@click.option(
    "--wheels",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="A folder with the wheels of all packages, for hosts that reach no package index: "
    "`pip download -d DIR mlx_k2-*.whl`.",
)
@click.option("--model", "-m", metavar="PATH_OR_REPO", help="The model that commands use from now on.")
@click.option(
    "--hostfile",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="The file for the hosts.  [default: hosts.json in the folder of the profile]",
)
@click.option("--yes", "-y", is_flag=True, help="Make all changes without asking.")
@with_struct(SetupOptions)
def command(options: SetupOptions) -> None:
    """Set up the Macs HOST..., named as ssh knows them, in the order of their layers; `this` is this Mac.

    \b
    Without arguments it asks for the hosts. It also asks before each change, except with --yes:
        mlx-k2 setup
        mlx-k2 setup this mac-2 --model moonshotai/Kimi-K2-Thinking --yes

    It tests ssh, finds Python and memory, installs this version of mlx-k2 in ~/.local/share/mlx-k2 of each other host,
    chooses addresses, writes a hostfile and the profile, and runs the doctor. Nothing needs an administrator. Run it
    again after an interruption: completed steps are not repeated.
    """  # noqa: D301  # click reads the escape
    steps = _Steps(options)
    try:
        steps.run()
    except BaseException:  # also a signal
        for line in steps.changes or ["nothing was changed"]:
            log(line)
        if steps.changes:
            log("run the same command again to go on: what is done is not repeated")
        raise


command.reads_profile = False  # it writes the profile


class _Steps:
    """The steps of one set-up. ``changes`` has a line for each change that was made, or begun and not finished."""

    def __init__(self, options: SetupOptions) -> None:
        self._options = options
        self.changes: list[str] = []

    def run(self) -> None:
        """Run all steps.

        Raises:
            SetupError: a host cannot be used, or the user refused a change; ``changes`` has the changes before it.
            ClusterError: the installation on a host failed, or the doctor found a failure.
        """
        names = self._host_names()
        surveys = _survey_all([name for name in names if name != THIS_MACHINE], self._options.python)
        _show_hosts(names, surveys)
        with tempfile.TemporaryDirectory() as folder:
            wheel = write_wheel(Path(folder))
            digest = wheel_digest(wheel)
            self._install(wheel, [survey for survey in surveys.values() if survey.installed_digest != digest])
        # of a host in the existing hostfile, keep the keys that setup does not set, such as model and memory_gb
        previous_hosts = {host.ssh: host for host in self._previous_hosts()}
        hosts = [
            msgspec.structs.replace(
                previous_hosts.get(name, Host(ssh=name)),
                python=surveys[name].environment_python if name in surveys else None,
                ips=(),
                rdma=(),
            )
            for name in names
        ]
        request = self._with_addresses(hosts)
        self._write_files(request)
        self._run_doctor(request)

    def _host_names(self) -> list[str]:
        """Return the names of the hosts in the order of their layers, from the arguments or the user's answer."""
        names = list(self._options.hosts)
        if not names:
            question = "Macs, as ssh knows them, in the order of their layers (`this` is this Mac): "
            names = _ask(question, "name the hosts as arguments, and give --yes to make all changes").split()
        names = [THIS_MACHINE if name in _LOCAL_NAMES else name for name in names]
        if not names:
            raise RequestError("no host was named: name at least one, for instance: mlx-k2 setup this mac-2")
        if len(set(names)) < len(names):
            raise RequestError("give each Mac once, for instance: mlx-k2 setup this mac-2")
        for name in names:
            if name.startswith("-") or not name.isprintable():
                raise RequestError(f"{name!r} is not a host name that ssh accepts")
        return names

    def _confirm(self, question: str) -> None:
        """Ask before a change.

        Raises:
            SetupError: the answer is no.
        """
        if self._options.yes:
            return
        answer = _ask(f"{question} [y/N] ", "give --yes to make all changes")
        if answer.strip().lower() not in ("y", "yes"):
            raise SetupError("the answer was no: ended before this change")

    def _install(self, wheel: Path, surveys: Sequence[HostSurvey]) -> None:
        if not surveys:
            return
        names = ", ".join(survey.host for survey in surveys)
        self._confirm(f"Install mlx-k2 {__version__} on {names}, in ~/{INSTALL_FOLDER} there?")
        pins = [f"mlx=={version('mlx')}"]
        wheels = None if self._options.wheels is None else Path(self._options.wheels)
        failures = []
        for survey in surveys:
            self.changes.append(f"the installation on {survey.host} was begun and not finished: ~/{INSTALL_FOLDER}")
            try:
                with console.status(f"installing on {survey.host} ..."):
                    install(survey, wheel, pins, wheels)
            except SetupError as error:
                failures.append(f"{survey.host}: {error}")
            else:
                self.changes.pop()
                self._log_change(f"mlx-k2 {__version__} is installed on {survey.host}: ~/{INSTALL_FOLDER}/env")
        if failures:
            raise ClusterError("; ".join(f"not installed on {failure}" for failure in failures))

    def _log_change(self, line: str) -> None:
        self.changes.append(line)
        log(line)

    def _with_addresses(self, hosts: Sequence[Host]) -> DeploymentRequest:
        """Return the request for these hosts. Several hosts get addresses, a single host needs none.

        The addresses are those of --address, else those in the existing hostfile if they are still a possible choice,
        else the fastest.
        """
        options = ClusterOptions(hostfile=str(self._options.hostfile_path))  # a path for messages, not read here
        hostfile = Hostfile(hosts=tuple(hosts), backend=Backend.RING)
        request = DeploymentRequest(options, hostfile, ModelSource(path_or_repo=BUILTIN))
        addresses = self._options.addresses
        if len(hosts) == 1:
            return request
        if not addresses:
            with console.status("looking for addresses, and measuring them ..."):
                choices = address_choices(host_interfaces(request))
                previous_ips = tuple(host.ips[0] for host in self._previous_hosts() if host.ips)
                addresses, bytes_per_s = fastest_choice(request, [previous_ips] if previous_ips in choices else choices)
            speed = "" if bytes_per_s is None else f": {bytes_per_s / 1e9:.2f} GB/s"
            log(f"addresses {', '.join(addresses)}{speed}")
        if len(addresses) != len(hosts):
            raise RequestError(f"{len(addresses)} addresses for {len(hosts)} hosts: give --address once for each")
        return with_addresses(request, addresses)

    def _previous_hosts(self) -> tuple[Host, ...]:
        """Return the hosts in the existing hostfile; none if it is missing or malformed."""
        with suppress(HostfileError):
            return read_hostfile(self._options.hostfile_path).hosts
        return ()

    def _write_files(self, request: DeploymentRequest) -> None:
        """Write the hostfile and the profile, if their content changes."""
        content = _hostfile_text(request.hostfile)
        profile = profile_path()
        text_before = profile.read_text(encoding="utf-8") if profile.exists() else ""
        text_after = with_value(text_before, "hostfile", str(self._options.hostfile_path))
        if self._options.model is not None:
            text_after = with_value(text_after, "model", self._options.model)
        texts = {self._options.hostfile_path: content, profile: text_after}
        changed_texts = {path: text for path, text in texts.items() if not path.exists() or path.read_text() != text}
        if not changed_texts:
            return
        for path, text in changed_texts.items():
            log(f"{path}:\n{text.rstrip()}")
        self._confirm(f"Write {' and '.join(map(str, changed_texts))}?")
        for path, text in changed_texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text.encode(), 0o644)
            self._log_change(f"written: {path}")

    def _run_doctor(self, request: DeploymentRequest) -> None:
        with ConsoleListener(verbose=False) as listener:
            checks = probe_cluster(request, None, listener, deep=False)
        show_checks(checks)
        if any(check.result is CheckResult.FAILURE for check in checks):
            raise ClusterError("the doctor found a failure: fix it, then run `mlx-k2 doctor`")
        model = self._options.model
        must_be_fetched = model is not None and is_repo(ModelSource(path_or_repo=model))
        log(f"next: mlx-k2 {'download' if must_be_fetched else 'chat'}; `mlx-k2 config` shows the profile")


def _survey_all(names: Sequence[str], python: str | None) -> dict[str, HostSurvey]:
    """Return the survey of each host by its name.

    Raises:
        SetupError: at least one host cannot be used; has a line for each such host.
    """
    surveys, problems = {}, []
    for name in names:
        try:
            with console.status(f"asking {name} ..."):
                surveys[name] = survey_host(name, python)
        except SetupError as error:
            problems.append(f"{name}: {error}")
        else:
            if (problem := surveys[name].problem) is not None:
                problems.append(f"{name}: {problem}")
    if problems:
        raise SetupError("\n".join(problems))
    return surveys


def _hostfile_text(hostfile: Hostfile) -> str:
    """Return the hostfile as JSON with one host a line."""
    entries = [msgspec.to_builtins(host) for host in hostfile.hosts]
    lines = [json.dumps({key: value for key, value in entry.items() if value}) for entry in entries]
    text = "[\n" + ",\n".join(f"  {line}" for line in lines) + "\n]\n"
    parse_hostfile(text.encode(), "the new hostfile")  # raises HostfileError before the file is written
    return text


def _show_hosts(names: Sequence[str], surveys: dict[str, HostSurvey]) -> None:
    rows = []
    for name in names:
        if name in surveys:
            survey = surveys[name]
            installed = "installed by setup" if survey.installed_digest else "not installed"
            rows.append((name, survey.system, gigabytes(survey.memory_bytes), survey.python or "", installed))
        else:
            memory = gigabytes(psutil.virtual_memory().total)
            rows.append(("this machine", sys.platform, memory, sys.executable, __version__))
    headings = ("host", "system", "memory", "Python", "mlx-k2")
    show_table(headings, rows, folded=headings)


def _ask(question: str, hint: str) -> str:
    """Return the user's answer, one line. ``hint`` says what to give where nobody can be asked.

    Raises:
        RequestError: standard input is no terminal, or has ended.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise RequestError(f"nobody can be asked here: {hint}")
    line = ""
    try:
        sys.stderr.write(question)
        sys.stderr.flush()
        line = sys.stdin.readline()
    finally:
        if not line.endswith("\n"):  # end of input, or a signal: what follows starts on a line of its own
            sys.stderr.write("\n")
    if not line:
        raise RequestError("the input has ended")
    return line.rstrip("\n")
