"""Tests of measured rows: rows of a working tree with uncommitted changes are neither saved nor shown."""

import sys
from pathlib import Path

import pytest

from bench import claims

HEADER = "date,machine,mlx_k2,mlx,mlx_lm,commit,script,claim,first,second,ratio,asked\n"


def test_a_changed_tree_may_not_save_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(claims, "commit", lambda: "0123456+")  # + marks a tree with changes
    monkeypatch.setattr(sys, "argv", ["bench.overlap"])
    assert not claims.read_options(description=None).save
    monkeypatch.setattr(sys, "argv", ["bench.overlap", "--save"])
    with pytest.raises(SystemExit):
        claims.read_options(description=None)
    assert "--save needs a working tree without changes" in capsys.readouterr().err


def test_a_clean_tree_may_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "commit", lambda: "0123456")
    monkeypatch.setattr(sys, "argv", ["bench.overlap", "--save"])
    assert claims.read_options(description=None).save


def test_the_table_shows_the_newest_rows_of_a_clean_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "claims.csv").write_text(
        HEADER
        + "2026-11-23,Linux,0.1.0,1,1,aaaaaaa,overlap,one stream,1,1,1.1,0.9\n"
        + "2026-11-24,Linux,0.1.0,1,1,bbbbbbb,overlap,one stream,1,1,1.2,0.9\n"
        + "2026-11-25,Linux,0.1.0,1,1,ccccccc+,overlap,one stream,1,1,9.9,0.9\n"
    )
    monkeypatch.setattr(claims, "RESULTS", tmp_path)
    assert claims.table().splitlines()[2:] == ["| `bench.overlap` | one stream | 1.20 | 0.9 | 1, bbbbbbb |"]
