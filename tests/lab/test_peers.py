"""Peers without peers: a worker that follows a rule, environments that are not installed, tables
that are exact."""

from __future__ import annotations

import ast
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import worlds

from smart_decoding.bench.sections import as_text
from smart_decoding.errors import ConfigError, DownloadError, ModelError
from smart_lab.options import LabOptions
from smart_lab.peers import environment, session
from smart_lab.peers.catalogue import (
    ENVIRONMENTS,
    PEERS,
    Environment,
    Peer,
    environments_of,
    wanted,
)
from smart_lab.peers.environment import MADE, python_for, requirements
from smart_lab.peers.session import WORKERS, Timed, Worker, answer_ours, lasting, peer_run
from smart_lab.peers.weights import write_bf16
from smart_lab.resume import Progress
from smart_lab.tables import peers as peer_sections

RULE = f"""
import os, sys
sys.path.insert(0, {str(WORKERS)!r})
from lines import serve

def load(settings):
    print("a library chatters on standard output")
    if settings.get("fails") == "loading":
        raise ValueError("no such weights\\nand more")
    if settings.get("fails") == "dying":
        print("Illegal instruction", file=sys.stderr, flush=True)
        os._exit(3)
    def answer(prompts, tokens):
        if settings.get("fails") == "answering":
            raise MemoryError("too much")
        answers = [[(p[-1] + 1 + i) % {worlds.EOS} for i in range(tokens)] for p in prompts]
        return {{"seconds": 0.01 * tokens, "tokens": (tokens - 1) * len(prompts),
                "answers": answers, "prefill_seconds": 0.5}}
    return {{"version": "1.2", "precision": settings["dtype"]}}, answer

serve(load)
"""
SETTINGS = {"threads": 1, "dtype": "fp32"}


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "rule.py"
    file.write_text(RULE)
    return file


def test_a_worker_says_what_it_is_and_answers(script: Path) -> None:
    with Worker(Path(sys.executable), script, SETTINGS) as worker:
        assert worker.about == {"version": "1.2", "precision": "fp32"}
        timed = worker.answer([[5], [7, 8]], 3)
    assert timed == Timed(0.03, 4, 0.5, [[6, 7, 8], [9, 10, 11]])
    assert timed.rate == pytest.approx(4 / 0.03)
    assert worker._process.returncode == 0


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("loading", "ValueError: no such weights"),
        ("dying", "ended with 3: Illegal"),
        ("answering", "MemoryError"),
    ],
)
def test_what_a_worker_dies_of_is_told_in_one_line(fails: str, message: str, script: Path) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        Worker(Path(sys.executable), script, {**SETTINGS, "fails": fails}).answer([[1]], 2)
    assert "\n" not in str(caught.value)


def test_a_silent_worker_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LOADING", 0.2)
    file = tmp_path / "silent.py"
    file.write_text("import time; time.sleep(60)")
    with pytest.raises(ModelError, match="no answer within"):
        Worker(Path(sys.executable), file, SETTINGS)


def test_ours_counts_decoding_alone() -> None:
    engine = worlds.engine(worlds.Clock())
    timed = answer_ours(engine, [[1, 2], [50, 51, 52]], 6)
    assert timed.answers == [[3, 4, 5, 6, 7, 8], [53, 54, 55, 56, 57, 58]]
    assert timed.tokens == 10
    assert timed.seconds > 0
    assert not engine.has_unfinished_requests


def test_only_answers_that_last_are_compared() -> None:
    prompts = worlds.prompts(count=6, tokens=20)  # 20, 21 and 22 tokens
    assert [p.index for p in lasting(worlds.engine(worlds.Clock()), prompts, 21)] == [1, 2, 4, 5]


def test_all_are_warmed_up_and_begin_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def answer(name: str, prompts: Any, tokens: int) -> Timed:
        asked.append((name, tokens))
        return Timed(1.0, tokens, 0.5, [[1] * tokens for _ in prompts])

    monkeypatch.setattr(session, "PAUSE", 0.0)
    monkeypatch.setattr(session, "answer_ours", answer)
    worker = SimpleNamespace(answer=partial(answer, "peer"))
    engines: Any = {"plain": "plain", "smart": "smart"}
    prompts = worlds.prompts(count=4, tokens=20)
    found = session.compare(cast("Any", worker), engines, prompts, 1, 9)
    assert found["chunks"] == 4
    names = ["peer", "plain", "smart"]
    assert asked[:3] == [(name, session.WARM_UP_TOKENS) for name in names]
    assert {tokens for _, tokens in asked[3:]} == {9}
    assert [name for name, _ in asked[3::3]] == ["peer", "plain", "smart", "peer"]
    for at in range(3, 15, 3):
        assert sorted(name for name, _ in asked[at : at + 3]) == names


def test_rates_ratios_and_agreement_are_exact() -> None:
    def chunks(seconds: float, answer: list[int]) -> list[Timed]:
        return [Timed(seconds, 30, 0.1, [answer])] * 3

    run = peer_run(
        {
            "peer": chunks(2.0, [1, 2, 9, 4]),
            "plain": chunks(1.0, [1, 2, 3, 4]),
            "smart": chunks(0.5, [1, 2, 3, 4]),
        },
        1,
    )
    assert (run["tokens_per_s"], run["plain_tokens_per_s"], run["smart_tokens_per_s"]) == (
        15.0,
        30.0,
        60.0,
    )
    assert (run["speedup"], run["plain_speedup"]) == (pytest.approx(4.0), pytest.approx(2.0))
    assert run["same"] == 0.5
    assert run["chunks"] == 3


def world(monkeypatch: pytest.MonkeyPatch, script: Path, tmp_path: Path) -> dict[str, Any]:
    """Three peers: one that works, one whose worker fails, one that cannot be installed."""
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    peers = {
        "good": Peer("good", "here", str(script), "folder", largest=2),
        "bad": Peer("bad", "here", str(script), "folder", {"fails": "answering"}),
        "absent": Peer("absent", "gone", str(script), "folder"),
    }
    environments = {name: Environment(name, ("x==1",)) for name in ("here", "gone")}
    for module in ("catalogue", "session"):
        monkeypatch.setattr(f"smart_lab.peers.{module}.ENVIRONMENTS", environments)
    monkeypatch.setattr("smart_lab.peers.catalogue.PEERS", peers)
    monkeypatch.setattr(session, "weights_for", lambda kind, model: tmp_path)
    monkeypatch.setattr(session, "PAUSE", 0.0)

    def not_to_be_had(environment: Environment) -> Path:
        raise DownloadError(f"pip could not install {environment.name}")

    monkeypatch.setattr(session, "python_for", not_to_be_had)
    return {
        "peers": ("all",),
        "peer_env": (f"here={tmp_path / 'env'}",),
        "batch_sizes": (1, 2, 4),
        "max_tokens": 12,
        "dtype": "fp32",
    }


def peer_table(peers: list[Any]) -> str:
    (section,) = peer_sections(peers)
    return as_text(section)


def test_a_whole_session_reports_failures_beside_figures(
    monkeypatch: pytest.MonkeyPatch, script: Path, tmp_path: Path
) -> None:
    options = LabOptions(**world(monkeypatch, script, tmp_path))
    ours = {name: worlds.engine(worlds.Clock()) for name in ("plain", "smart")}
    prompts = {"code": worlds.prompts("code", 8, 0, 12), "maths": worlds.prompts("maths", 6, 8, 12)}
    file = tmp_path / "part"
    good, bad, absent = session.measure_peers(options, ours, prompts, Progress(file, {}))
    assert [run["batch_size"] for run in good["runs"]] == [1, 2]
    assert good["note"] == "not offered at batch 4"
    first = good["runs"][0]
    assert first["same"] == 1.0
    assert first["tokens_per_s"] == pytest.approx(11 / 0.12)
    assert first["chunks"] == 12
    assert good["runs"][1]["chunks"] == 6
    assert (good["version"], good["precision"]) == ("1.2", "fp32")
    assert bad["error"] == "MemoryError: too much"
    assert bad["runs"] == []
    assert absent["error"] == "pip could not install gone"
    table = peer_table([good, bad, absent])
    assert "good 1.2" in " ".join(table.split())
    assert "bad: MemoryError" in table
    assert "absent: pip could not" in table
    kept = json.loads(file.read_text())["units"]
    assert list(kept) == ["peer good"]  # what failed is tried again
    assert session.measure_peers(options, ours, prompts, Progress(file, {})) == [good, bad, absent]


def test_a_faster_peer_is_said() -> None:
    run = {
        "batch_size": 4,
        "tokens_per_s": 90.0,
        "plain_tokens_per_s": 50.0,
        "smart_tokens_per_s": 60.0,
        "speedup": 0.67,
        "speedup_low": 0.6,
        "speedup_high": 0.7,
        "same": 1.0,
    }
    table = peer_table([{"name": "other", "version": "2", "precision": "bf16", "runs": [run]}])
    assert "other is faster than ours at batch 4: 0.67 (0.60-0.70)" in table


def test_environments_are_made_once_and_again_when_their_contents_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMART_CACHE", str(tmp_path))
    made, calls = [], []
    monkeypatch.setattr(
        environment.venv, "create", lambda folder, **_: (made.append(folder), folder.mkdir())
    )

    def call(command: Any, variables: Any, log: Path) -> int:
        calls.append((list(command[1:]), dict(variables)))
        return 0

    one = Environment("x", ("a==1",), ("b",), {"CMAKE_ARGS": "-DX"})
    folder = tmp_path / "peers" / "x"
    assert python_for(one, call) == folder / "bin" / "python" == python_for(one, call)
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-input"]
    assert calls == [
        ([*pip, "install", "a==1"], {"CMAKE_ARGS": "-DX"}),
        ([*pip, "uninstall", "--yes", "b"], {"CMAKE_ARGS": "-DX"}),
    ]
    python_for(Environment("x", ("a==2",)), call)
    assert made == [folder, folder]
    assert len(calls) == 3


def test_a_failed_installation_names_the_log_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMART_CACHE", str(tmp_path))
    monkeypatch.setattr(environment.venv, "create", lambda folder, **_: folder.mkdir())

    def call(command: Any, variables: Any, log: Path) -> int:
        log.write_text("building\nERROR: no compiler\nhint\n")
        return 1

    with pytest.raises(DownloadError, match=r"could not install a==1: no compiler \(see .*x.log\)"):
        python_for(Environment("x", ("a==1",)), call)
    assert not (tmp_path / "peers" / "x" / MADE).exists()


def test_requirements_take_our_torch() -> None:
    import torch

    assert (
        requirements(ENVIRONMENTS["transformers"])[0]
        == f"torch=={torch.__version__.partition('+')[0]}"
    )
    assert all("==" in text for each in ENVIRONMENTS.values() for text in requirements(each))


def test_unknown_peers_and_environments_are_refused_before_a_model_is_loaded(
    tmp_path: Path,
) -> None:
    assert wanted(("all",)) == list(PEERS.values())
    for given, message in (
        ({"peers": ("llama",)}, "unknown peer 'llama'"),
        ({"peer_env": ("vllm",)}, "name=folder"),
        ({"peer_env": (f"vllm={tmp_path}",)}, "no virtual environment"),
    ):
        with pytest.raises(ConfigError, match=message):
            LabOptions(**given)
    assert environments_of(()) == {}


def test_workers_import_nothing_of_ours() -> None:
    scripts = {peer.worker for peer in PEERS.values()}
    assert scripts == {path.name for path in WORKERS.glob("run_*.py")}
    for path in WORKERS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else ([node.module or ""] if isinstance(node, ast.ImportFrom) else [])
            )
            assert not [name for name in names if name.startswith("smart_decoding")], path


def test_a_gguf_file_in_bf16_has_the_same_numbers(tmp_path: Path) -> None:
    import gguf
    from gguf.quants import dequantize, quantize

    rng = np.random.default_rng(0)
    matrix, vector = rng.standard_normal((4, 64)).astype(np.float32), np.arange(5, dtype=np.float32)
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_tensor("m.weight", quantize(matrix, q4_1), raw_dtype=q4_1)
    writer.add_tensor("norm.weight", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_bf16(tmp_path / "a.gguf", tmp_path / "b.gguf")
    old, new = gguf.GGUFReader(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "b.gguf")
    assert [str(t.tensor_type.name) for t in new.tensors] == ["BF16", "F32"]
    exact = dequantize(old.tensors[0].data, q4_1)
    assert np.allclose(
        dequantize(new.tensors[0].data, gguf.GGMLQuantizationType.BF16), exact, rtol=2**-8
    )
    assert np.array_equal(new.tensors[1].data, vector)
    for name in ("llama.block_count", "tokenizer.ggml.tokens", "numbers", "general.architecture"):
        assert new.fields[name].contents() == old.fields[name].contents()
