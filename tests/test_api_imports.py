"""Tests of how programs import the Python API: cost, types, and the examples of the documentation."""

import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_k2

ROOT = Path(__file__).parents[1]
NUM_IMPORTS = 20
MAX_IMPORT_S = 0.005


def cpu_s(statement: str) -> float:
    """Return the CPU time of a new Python process that runs ``statement``."""
    process = subprocess.Popen([sys.executable, "-c", statement], cwd="/")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0
    return usage.ru_utime + usage.ru_stime


def test_an_import_costs_at_most_5_ms_and_loads_no_other_module() -> None:
    statement = "import sys; before = set(sys.modules); import mlx_k2; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.split() == ["mlx_k2"]
    times_s = [(cpu_s("import mlx_k2"), cpu_s("pass")) for _ in range(NUM_IMPORTS)]
    with_import_s, without_s = map(statistics.median, zip(*times_s, strict=True))
    assert with_import_s - without_s <= MAX_IMPORT_S


def test_the_api_is_imported_without_mlx() -> None:
    statement = "import sys; from mlx_k2 import Cluster; assert 'mlx' not in sys.modules; print(Cluster.__module__)"
    result = subprocess.run([sys.executable, "-c", statement], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.returncode) == ("mlx_k2.api\n", 0), result.stderr


def test_every_exported_name_exists_and_an_unknown_one_is_an_attribute_error() -> None:
    assert all(getattr(mlx_k2, name) is not None for name in mlx_k2.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Clutser'"):
        mlx_k2.Clutser  # noqa: B018


IMPORTER = """
from mlx_k2 import AsyncCluster, Cluster, Completion, MlxK2Error, Sampling

def ask(cluster: Cluster) -> str:
    for part in cluster.stream("x", Sampling(temperature=0.6)):
        reveal_type(part.text)
    reply: Completion = cluster.chat([{"role": "user", "content": "x"}])
    reveal_type(reply.usage.prompt_tokens)
    return reply.content

async def ask_async(cluster: AsyncCluster) -> None:
    async for part in cluster.stream("x"):
        reveal_type(part)

Cluster(hostfil="x")
Sampling(temperature="hot")
"""


@pytest.mark.slow
def test_mypy_infers_the_types_of_an_importing_program_and_finds_its_two_mistakes(tmp_path: Path) -> None:
    (tmp_path / "importer.py").write_text(IMPORTER)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "importer.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
    lines = [re.sub(r"^importer.py:\d+: ", "", line) for line in result.stdout.splitlines()]
    assert re.fullmatch(r'note: Revealed type is "(builtins\.)?str"', lines[0])
    assert re.fullmatch(r'note: Revealed type is "(builtins\.)?int"', lines[1])
    assert "Reasoning" in lines[2] and "Content" in lines[2]
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors[0].startswith('error: Unexpected keyword argument "hostfil" for "Cluster"')
    assert errors[1].startswith('error: Argument "temperature" to "SamplingOptions" has incompatible type "str"')
    assert lines[-1].startswith("Found 2 errors")


@pytest.mark.slow
def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(examples) == 5
    outputs = []
    for example in examples:
        command = [sys.executable, "-c", example]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        outputs.append(result.stdout)
    assert outputs[0] == "17 + 25 = 42\n"
    assert outputs[1].splitlines()[-2:-1] == ["3, 4, 5, 6, 7"]
    assert outputs[2].splitlines() == ["3 + 25 = 28", "17 + 25 = 42", "40 + 25 = 65"]
    assert outputs[3] == "get_weather {'city': 'Rome'}\nIn Rome it is sunny and 24 degrees.\n"
    assert outputs[4] == "1, 2, 3, 4, 5\n2 + 2 = 4 3 + 3 = 6\n"
