"""Check of names: none has a word that the project has replaced by a plain word or by the field's term."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mlx_k2", "tests", "bench", "training", "examples")

# Retired words with their inflections, and what to write instead. An underscore joins words that are retired together.
RETIRED_WORDS = (
    ("draw draws drawn drawing drawings", "sample"),
    ("guess guesses guessed guessing", "draft"),
    ("hit hits", "accepted"),
    ("disguise disguised disguises reveal revealed reveals", "escape, unescape"),
    ("interject interjection", "forced_tokens"),
    ("compute_ahead settle settled", "prefill the next prompt, cancel_prefill"),
    ("vigil", "HealthMonitor"),
    ("standing standings announce announced announces announcement", "StageStatus, PhaseUpdate, report_phase"),
    ("lasting renew renewed renews go_on start_over", "RestartingDeployment, restart, resume, reset"),
    ("foresight foresee foresees", "dry_run, preview"),
    ("watcher watchers", "DeploymentListener, watchdog"),
    ("pace paces meter meters", "StepPolicy, SpeedEstimator"),
    ("patience", "StepTimeout, stall_timeout_s"),
    ("consent tally served said leave", "ToolApproval, UsageTotals, ModelFrontend, MessageAdded, Quit"),
    ("hush hushed heeded", "hide_progress, handled"),
    ("regime regimes trusted", "kernel_for, usable"),
    ("verdict verdicts remember remembered remembers", "CheckResult, KernelCheck, CachedChecks"),
    ("place places share shares", "StageLocation, StageAssignment"),
    ("greet greets gather gathered gathers", "handshake, collect"),
    ("examine examined examines examination examining", "probe"),
    ("take takes taken taker takers took give_back", "acquire, release"),
    ("say says tell tells told note notes notice notices noticed", "log, notify"),
    ("room rooms", "package"),
    ("as_it_is is_as", "is_raw"),
)
INSTEAD_OF = {tuple(words.split("_")): instead for line, instead in RETIRED_WORDS for words in line.split()}

# Class names that meant several things. Their words may be parts of other names.
RETIRED_CLASSES = ("Piece", "Answer", "Verdict", "Pace")

# Exceptions as "kind name", each with its reason: another package, a protocol or a file format dictates the name.
ALLOWED: dict[str, str] = {
    "test test_mlx_gather_qmv_fast_is_correct": "gather_qmv_fast is the name of MLX's kernel",
    "test test_mlx_gather_qmm_rhs_is_correct": "gather_qmm_rhs is the name of MLX's kernel",
    "variable ROOMS": "training data: the rooms of a house",
    "key guessing": "the name of a benchmark script in rows that were measured before it was renamed",
    "key mlx_k2_prefix_cache_hits": "a metric's name in vLLM, with our prefix",
    "key room": "training data: an argument of a light switch's tool, the room of a house",
}

_NAME = re.compile(r"-{0,2}[A-Za-z_][\w-]*")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_ENUM_BASES = ("Enum", "IntEnum", "StrEnum", "Flag", "IntFlag")
_LOCAL_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.comprehension
_OPTION_CALLS = ("option", "argument", "Option", "Argument", "add_argument")


class DefinedName(NamedTuple):
    """A name, its kind (such as function, option or key), and the line of its definition."""

    kind: str
    name: str
    line: int


def defined_names(tree: ast.Module, path: Path) -> Iterator[DefinedName]:
    """Yield each name that a source file defines. `path` is relative to the repository and names folders and module.

    Names that the file only uses are left out: imports, keyword arguments of calls, attributes that are read.
    """
    yield from (DefinedName("folder", folder, 1) for folder in path.parts[:-1])
    yield DefinedName("module", path.stem, 1)
    yield from _names_in_tree(tree, "variable")


def _names_in_tree(node: ast.AST, scope: str) -> Iterator[DefinedName]:
    """Yield the names that a node and its descendants define. ``scope`` is the kind of a variable there."""
    yield from _names_of_node(node, scope)
    if isinstance(node, ast.ClassDef):
        is_enum = any(_last_name(base) in _ENUM_BASES for base in node.bases)
        scope = "enum member" if is_enum else "attribute"
    elif isinstance(node, _LOCAL_SCOPES):
        scope = "local"
    for child in ast.iter_child_nodes(node):
        yield from _names_in_tree(child, scope)


def _names_of_node(node: ast.AST, scope: str) -> Iterator[DefinedName]:
    """Yield the names that a node itself defines."""
    match node:
        case ast.ClassDef(name=name, lineno=line):
            yield DefinedName("class", name, line)
            tags = [keyword.value for keyword in node.keywords if keyword.arg == "tag"]
            yield from _literals("tag", tags)
        case ast.FunctionDef(name=name, lineno=line) | ast.AsyncFunctionDef(name=name, lineno=line):
            yield DefinedName("test" if name.startswith("test_") else "function", name, line)
        case ast.arg(arg=name, lineno=line):
            yield DefinedName("argument", name, line)
        case ast.Attribute(attr=name, ctx=ast.Store(), lineno=line):
            yield DefinedName("attribute", name, line)
        case (
            ast.Name(id=str(name), ctx=ast.Store(), lineno=line)
            | ast.ExceptHandler(name=str(name), lineno=line)
            | ast.MatchAs(name=str(name), lineno=line)
            | ast.MatchStar(name=str(name), lineno=line)
            | ast.MatchMapping(rest=str(name), lineno=line)
        ):
            yield DefinedName(scope, name, line)
        case ast.alias(asname=str(name), lineno=line):
            yield DefinedName("alias", name, line)
        case ast.Dict(keys=keys):
            yield from _literals("key", [key for key in keys if key is not None])
        case ast.Subscript(slice=key, ctx=ast.Store()):
            yield from _literals("key", [key])
        case ast.Call():
            yield from _names_of_call(node)


def _names_of_call(call: ast.Call) -> Iterator[DefinedName]:
    match _last_name(call.func):
        case "parametrize":
            yield from _literals("argument", call.args[:1])
        case "field":
            yield from _literals("field", [keyword.value for keyword in call.keywords if keyword.arg == "name"])
        case name if name in _OPTION_CALLS:
            yield from _literals("option", call.args)


def _literals(kind: str, nodes: list[ast.expr]) -> Iterator[DefinedName]:
    """Yield the names in string literals, also in lists of them and in "a,b" and "--a/--b". Prose is not a name."""
    for node in nodes:
        match node:
            case ast.List(elts=items) | ast.Tuple(elts=items):
                yield from _literals(kind, items)
            case ast.Constant(value=str(text), lineno=line):
                names = re.split(r"\s*[,/]\s*", text)
                if all(_NAME.fullmatch(name) for name in names):
                    yield from (DefinedName(kind, name, line) for name in names)


def _last_name(node: ast.expr) -> str:
    """Return the name after the last dot of an expression, without a subscript; '' if there is none."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Subscript(value=value):
            return _last_name(value)
    return ""


def words_of(name: str) -> tuple[str, ...]:
    """Split a name in snake_case, CamelCase or kebab-case into words in lower case."""
    return tuple(word.lower() for word in _WORD.findall(name))


def allowed_key(defined: DefinedName) -> str:
    """Return the key of a name in `ALLOWED`."""
    return f"{defined.kind} {defined.name}"


def retired_words(defined: DefinedName) -> list[str]:
    """Return the retired words in a name, in their order; words that are retired together are joined by `_`."""
    if allowed_key(defined) in ALLOWED:
        return []
    words = words_of(defined.name)
    word_groups = [words[start : start + length] for start in range(len(words)) for length in (1, 2, 3)]
    retired = ["_".join(group) for group in dict.fromkeys(word_groups) if group in INSTEAD_OF]
    if not retired and defined.kind == "class" and defined.name in RETIRED_CLASSES:
        retired.append(defined.name)
    return retired


def read_names(path: Path) -> Iterator[DefinedName]:
    return defined_names(ast.parse((ROOT / path).read_text()), path)


def replacement(word: str) -> str:
    return INSTEAD_OF.get(tuple(word.split("_")), "a more specific name")


FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_name_has_a_retired_word(path: Path) -> None:
    violations = [
        f"{path}:{defined.line} {defined.kind} {defined.name} ({word}: write {replacement(word)})"
        for defined in read_names(path)
        for word in retired_words(defined)
    ]
    assert not violations, "\n" + "\n".join(violations)


def test_no_two_modules_of_the_package_have_the_same_name() -> None:
    names = Counter(path.stem for path in FILES if path.parts[0] == "mlx_k2")
    assert [name for name, count in names.items() if count > 1 and name not in ("__init__", "__main__")] == []


def test_each_allowed_name_is_in_use() -> None:
    names = re.compile("|".join(key.partition(" ")[2] for key in ALLOWED))
    files = [path for path in FILES if names.search((ROOT / path).read_text())]
    assert ALLOWED.keys() <= {allowed_key(defined) for path in files for defined in read_names(path)}


DEFINITIONS = (
    ("class", "SpeedMeter", "class SpeedMeter: ..."),
    ("class", "Answer", "class Answer: ..."),
    ("function", "_settle", "class Reply:\n    async def _settle(self) -> None: ..."),
    ("function", "tell", "def run() -> None:\n    def tell() -> None: ..."),
    ("test", "test_it_gives_what_it_took", "def test_it_gives_what_it_took() -> None: ..."),
    ("argument", "patience_s", "def wait(*, patience_s: float) -> None: ..."),
    ("argument", "guess", "key = lambda guess: 1"),
    ("argument", "verdict", "@pytest.mark.parametrize(('checks', 'verdict'), [])\ndef check() -> None: ..."),
    ("argument", "verdict", "@pytest.mark.parametrize('checks, verdict', [])\ndef check() -> None: ..."),
    ("variable", "MAX_DRAWS", "MAX_DRAWS = 3"),
    ("attribute", "num_hits", "class Step:\n    num_hits: int = 0"),
    ("attribute", "_place", "class Step:\n    def move(self) -> None:\n        self._place, self.x = 1, 2"),
    ("enum member", "GO_ON", "class Action(enum.Enum):\n    GO_ON = 1"),
    ("local", "taken", "def run() -> None:\n    taken = 1"),
    ("local", "taken", "def run() -> None:\n    for taken, _ in []: ..."),
    ("local", "taken", "def run() -> None:\n    with lock as taken: ..."),
    ("local", "taken", "def run() -> None:\n    if taken := 1: ..."),
    ("local", "taken", "class Step:\n    x = [1 for taken in ()]"),
    ("local", "told", "def run() -> None:\n    try: ...\n    except OSError as told: ..."),
    ("local", "told", "def run() -> None:\n    match x:\n        case [1, told]: ..."),
    ("local", "told", "def run() -> None:\n    match x:\n        case [1, *told]: ..."),
    ("local", "told", "def run() -> None:\n    match x:\n        case {'x': 1, **told}: ..."),
    ("alias", "watcher", "import asyncio as watcher"),
    ("option", "--guess", "x = click.option('--guess', type=str)"),
    ("option", "--start-over", "x = click.option('-r/-R', '--start-over/--no-restart')"),
    ("option", "guess", "x = click.argument('guess')"),
    ("key", "num_guesses", "x = {'model': 1, **y, 'num_guesses': 2}"),
    ("key", "num_guesses", "x['num_guesses'] = 2"),
    ("field", "isAsItIs", "class Part:\n    is_raw: bool = msgspec.field(name='isAsItIs')"),
    ("tag", "announcement", "class PhaseUpdate(Struct, tag='announcement'): ..."),
)


@pytest.mark.parametrize(("kind", "name", "source"), DEFINITIONS)
def test_a_retired_word_is_found_in_every_kind_of_definition(kind: str, name: str, source: str) -> None:
    names = defined_names(ast.parse(source), Path("x.py"))
    assert [(defined.kind, defined.name) for defined in names if retired_words(defined)] == [(kind, name)]


def test_a_retired_word_is_found_in_folder_and_module_names() -> None:
    names = defined_names(ast.parse(""), Path("tests/cluster_room/pace.py"))
    assert [defined.name for defined in names if retired_words(defined)] == ["cluster_room", "pace"]


@pytest.mark.parametrize(
    ("name", "retired"),
    [
        ("_give_back", ["give_back"]),
        ("giveBack", ["give_back"]),
        ("GIVE_BACK", ["give_back"]),
        ("--give-back", ["give_back"]),
        ("HTTPWatcher2", ["watcher"]),
        ("is_as_it_is", ["is_as", "as_it_is"]),
        ("drawn_or_taken", ["drawn", "taken"]),
        ("num_shared_experts", []),
        ("parameter", []),
        ("go_back", []),
        ("withdraw", []),
        ("hide_thinking", []),
    ],
)
def test_retired_words_are_found_in_names_of_every_spelling(name: str, retired: list[str]) -> None:
    assert retired_words(DefinedName("function", name, 1)) == retired


@pytest.mark.parametrize(
    "source",
    [
        "from mlx.core import take",
        "import room.pace",
        "x = mx.take_along_axis(logits, indices, axis=-1)",
        "x = tqdm(steps, leave=False)",
        "x = response.served + response['hits']",
        "class Answers: ...",
        "answer = 1",
        "x = {'the answer is told once': 1}",
    ],
)
def test_the_use_of_a_name_is_not_a_definition(source: str) -> None:
    names = defined_names(ast.parse(source), Path("x.py"))
    assert not [defined for defined in names if retired_words(defined)]
