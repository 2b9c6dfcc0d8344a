"""Starts of `smart run` in processes of their own, on a tiny file."""

import re

import pytest

from smart_decoding.cli.main import main
from smart_lab.__main__ import LAB
from smart_lab.gguf.random_file import MODELS, small, write


def test_a_line_for_each_start(tmp_path, capsys):
    write(tmp_path / "m.gguf", small(MODELS["qwen3-30b-a3b"]), 2)
    assert main(["first-word", str(tmp_path / "m.gguf"), "--starts", "1"], LAB) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = re.fullmatch(
        r"start 1: first word (\S+) s, end (\S+) s; (\S+) GB at its peak \(\S+\), (\S+) GB own "
        r"\(\S+\), (\S+) GB mapped \(\S+\), \S+ GB kept on disk \(\S+\)",
        line,
    )
    assert found
    first, end, total, own, mapped = map(float, found.groups())
    assert 0.2 < first <= end < 60
    assert 0.05 < own <= total <= own + mapped + 0.01
    assert not list(tmp_path.glob("tmp*"))


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("none.gguf", [], "none.gguf is not a file"),
        ("bad.gguf", ["--starts", "0"], "--starts 0 is too few"),
        ("bad.gguf", [], "smart run failed: .*bad.gguf"),
    ],
)
def test_what_cannot_be_is_one_line(name, options, said, tmp_path, capsys):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF, or not")
    assert main(["first-word", str(tmp_path / name), *options], LAB) == 2
    assert re.search(said, capsys.readouterr().err)
