"""Tests that the documents match the program."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.claims import README, with_table
from tests.conftest import KINDS

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("bench/*.md")]
)


def test_the_command_reference_equals_the_help_output() -> None:
    command = [sys.executable, "-m", "tests.cli_reference"]  # in a new process: click caches the first help option
    reference = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert (ROOT / "docs" / "cli.md").read_text() == reference, "run python -m tests.cli_reference > docs/cli.md"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_between_documents_have_existing_targets(page: Path) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


def test_the_index_lists_every_page_of_docs_and_of_docs_dev() -> None:
    index = ROOT / "docs" / "index.md"
    targets = re.findall(r"\]\(([^)]+)\)", index.read_text())
    listed = {(index.parent / target).resolve() for target in targets}
    pages = {*index.parent.glob("*.md"), *index.parent.glob("dev/*.md")} - {index}
    assert pages <= listed


def test_the_table_of_claims_in_bench_equals_the_measured_rows() -> None:
    readme = README.read_text()
    assert "| `bench." in readme, "the table has no rows"
    assert with_table(readme) == readme, "run python -m bench.claims"


def test_the_kinds_of_tests_that_the_workflows_job_on_a_mac_may_lack_are_known() -> None:
    workflow = (ROOT / ".github" / "workflows" / "check.yml").read_text()
    (kinds,) = re.findall(r'MAY_LACK="([^"]+)"', workflow)
    assert set(kinds.split(",")) <= KINDS


def test_every_design_page_has_a_unique_number() -> None:
    numbers = [path.name[:4] for path in (ROOT / "docs" / "design").glob("*.md")]
    assert all(re.fullmatch(r"\d{4}", number) for number in numbers)
    assert len(set(numbers)) == len(numbers)
