"""SMART's scheduler in the real vLLM, SmolLM2-135M on a CPU: run by `make test-vllm`, in its
environment.

Every engine is a process of its own, as a process can hold one only. Token identity is asserted in
fp32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm_engine import messages

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
MODEL = os.environ.get("SMART_TEST_MODEL", "")
if not MODEL:
    pytest.skip("SMART_TEST_MODEL is not set: make test-vllm", allow_module_level=True)

SOURCE = Path(__file__).parents[2] / "src"
ENGINE = Path(__file__).with_name("vllm_engine.py")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "2",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    **os.environ,
    "PYTHONPATH": str(SOURCE),
}
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 2,
}
SCHEDULER = "smart_decoding.integrations.vllm.SmartScheduler"
BATCHES = [1, 2, 4, 8, 16]
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "OMP_NUM_THREADS": "1"}


def engine(arguments: dict[str, Any], *, fails: bool = False, **job: Any) -> Any:
    """What an engine with these arguments of vllm.LLM answers to a job; its whole output if it is
    to fail."""
    arguments = {
        "model": MODEL,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        **arguments,
    }
    environment = {**ENVIRONMENT, **(TWO_RANKS if "tensor_parallel_size" in arguments else {})}
    run = subprocess.run(
        [sys.executable, str(ENGINE), json.dumps(arguments), json.dumps(job)],
        env=environment,
        text=True,
        capture_output=True,
        timeout=1800,
    )
    if fails:
        assert run.returncode
        return run.stdout + run.stderr
    assert run.returncode == 0, run.stdout + run.stderr
    (answer,) = [line for line in run.stdout.splitlines() if line.startswith('{"tokens"')]
    return json.loads(answer), run.stdout + run.stderr


@pytest.fixture(scope="module")
def plain() -> Any:
    return engine({}, batches=BATCHES)[0]


@pytest.fixture(scope="module")
def even(tmp_path_factory) -> str:
    """SmolLM2 with a fourth group of heads, of zeros: the same function, and two ranks can share
    its twelve heads."""
    folder = str(tmp_path_factory.mktemp("even"))
    variant("with_more_heads", MODEL, folder)
    return folder


@pytest.fixture(scope="module")
def draft(tmp_path_factory, even) -> Any:
    """Drafting by SmolLM2 without its layers 12 to 19, which agrees with it on about every second
    token."""
    folder = str(tmp_path_factory.mktemp("draft"))
    variant("without_layers", even, folder, "12", "20")
    return {"method": "draft_model", "model": folder, "num_speculative_tokens": 3}


@pytest.fixture(scope="module")
def useless(tmp_path_factory, even) -> Any:
    """Drafting by SmolLM2's first and last four layers: next to nothing is accepted."""
    folder = str(tmp_path_factory.mktemp("useless"))
    variant("without_layers", even, folder, "4", "26")
    return {"method": "draft_model", "model": folder, "num_speculative_tokens": 3}


def variant(*arguments: str) -> None:
    script = ENGINE.with_name("smollm_variants.py")
    run = subprocess.run([sys.executable, str(script), *arguments], text=True, capture_output=True)
    assert run.returncode == 0, run.stderr


def check(answer: Any, plain: Any) -> None:
    """Tokens of plain vLLM; on in some steps, off in others; drafts as counted by vLLM's own public
    metrics."""
    assert answer["tokens"] == plain["tokens"][: len(answer["tokens"])]
    counters = answer["counters"]
    assert counters["steps_on"] > 10
    assert counters["steps_off"] > 10
    assert counters["verified"] > counters["accepted"] > 0
    assert counters["verified"] == answer["vllm"]["drafted"]
    assert counters["accepted"] == answer["vllm"]["accepted"]


def test_ngram(plain) -> None:
    answer, _ = engine({"speculative_config": NGRAM, "scheduler_cls": SCHEDULER}, batches=BATCHES)
    check(answer, plain)


def test_a_draft_model_at_several_lengths(plain, draft) -> None:
    answer, _ = engine({"speculative_config": draft, "scheduler_cls": SCHEDULER}, batches=BATCHES)
    check(answer, plain)
    assert len(answer["counters"]["lengths"]) > 1


@pytest.mark.parametrize("drafter", ["ngram", "draft_model"])
def test_two_tensor_parallel_ranks_agree(plain, draft, even, drafter) -> None:
    speculative = NGRAM if drafter == "ngram" else draft
    arguments = {"model": even, "tensor_parallel_size": 2, "speculative_config": speculative}
    answer, _ = engine({**arguments, "scheduler_cls": SCHEDULER}, batches=BATCHES)
    check(answer, plain)


def test_a_draft_model_of_no_use_drafts_in_few_steps(plain, useless, even) -> None:
    arguments = {"model": even, "speculative_config": useless, "scheduler_cls": SCHEDULER}
    answer, _ = engine(arguments, batches=BATCHES)
    assert answer["tokens"] == plain["tokens"]
    counters = answer["counters"]
    assert 0 < counters["steps_on"] < counters["steps_off"] / 4


def test_every_name_that_is_relied_on_is_there() -> None:
    """The contract: names, and what they mean, on the live objects of one engine."""
    answer, _ = engine(
        {"speculative_config": NGRAM, "scheduler_cls": SCHEDULER}, batches=[2], contract=True
    )
    assert answer["missing"] == []
    assert answer["lookup"] == "Controller"


def test_the_async_class_is_refused_where_scheduling_is_not_async() -> None:
    output = engine(
        {"speculative_config": NGRAM, "scheduler_cls": SCHEDULER.replace("Smart", "SmartAsync")},
        fails=True,
    )
    assert "use --scheduler-cls smart_decoding.integrations.vllm.SmartScheduler" in output


def serving(arguments: dict[str, Any], port: int, options: dict[str, Any]) -> subprocess.Popen[str]:
    """vLLM's own OpenAI server with our scheduler."""
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    command += [
        "--max-model-len",
        "512",
        "--port",
        str(port),
        "--served-model-name",
        "m",
        "--no-enable-prefix-caching",
    ]
    command += ["--scheduler-cls", SCHEDULER, "--additional-config", json.dumps({"smart": options})]
    for name, value in arguments.items():
        command += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    ranks = TWO_RANKS if "tensor-parallel-size" in arguments else {}
    return subprocess.Popen(
        command,
        env={**ENVIRONMENT, **ranks, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("set_up", ["ngram, one rank", "draft model, two ranks"])
def test_the_openai_server_speculates_and_serves_the_counters(plain, draft, even, set_up) -> None:
    port, metrics = 18431, 18432
    arguments: dict[str, Any] = {"model": MODEL, "speculative-config": NGRAM}
    if set_up == "draft model, two ranks":
        arguments = {"model": even, "tensor-parallel-size": 2, "speculative-config": draft}
    server = serving(arguments, port, {"metrics_port": metrics})
    log: list[str] = []
    assert server.stdout is not None
    threading.Thread(target=log.extend, args=(server.stdout,), daemon=True).start()
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        for batch in (1, 4, 16):
            with ThreadPoolExecutor(batch) as pool:
                texts = list(
                    pool.map(lambda conversation: chat(port, conversation), messages(batch))
                )
            assert texts == plain["texts"][BATCHES.index(batch)], batch
        ours, theirs = scrape(metrics, "smart_vllm_"), scrape(port, "vllm:spec_decode_num_")
        assert ours["smart_vllm_steps_on_total"] > 0
        assert ours["smart_vllm_steps_off_total"] > 0
        for name, stock in (("verified", "draft"), ("accepted", "accepted")):
            assert (
                ours[f"smart_vllm_{name}_total"]
                == theirs[f"vllm:spec_decode_num_{stock}_tokens_total"]
                > 0
            )
    finally:
        server.terminate()
        server.wait(60)


def chat(port: int, conversation: list[Any]) -> str:
    body = {
        "model": "m",
        "max_tokens": 96,
        "temperature": 0,
        "ignore_eos": True,
        "messages": conversation,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"])


def scrape(port: int, prefix: str) -> dict[str, float]:
    """Prometheus samples by name, without their labels."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as reply:
        lines = [line for line in reply.read().decode().splitlines() if line.startswith(prefix)]
    return {line.split("{")[0].split()[0]: float(line.split()[-1]) for line in lines}


def test_data_parallel_ranks_that_wait_for_each_other_are_refused() -> None:
    """As an engine of a mixture of experts has it; ranks of dense models run by themselves, each
    with a size of 1."""
    output = engine(
        {"speculative_config": NGRAM, "scheduler_cls": SCHEDULER}, fails=True, pretend_ranks=2
    )
    assert "cannot run with data_parallel_size=2" in output


def test_smart_tune_measures_and_vllm_takes_what_it_writes(tmp_path) -> None:
    output = tmp_path / "schedule.json"
    arguments = json.dumps({"dtype": "float32", "enforce_eager": True, "max_model_len": 512})
    command = [
        sys.executable,
        "-m",
        "smart_decoding.cli.main",
        "tune",
        "vllm",
        MODEL,
        "--lengths",
        "3",
    ]
    command += [
        "--batch-sizes",
        "1,4",
        "--max-tokens",
        "48",
        "--time-limit",
        "900",
        "--engine-args",
        arguments,
    ]
    command += ["--output", str(output)]
    run = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=1800)
    assert run.returncode == 0, run.stderr
    reasons = json.loads(output.with_suffix(".reasons.json").read_text())
    assert {each["load"] for each in reasons["judged"]} == {1, 4}
    drafted = [each for each in reasons["judged"] if each["mode"] != "plain"]
    assert all(trial["drafted"] for each in drafted for trial in each["blocks"].values())
    schedule = [
        [1, 1, 3],
        [2, 4, 0],
    ]  # not what was measured, which is a matter of the machine: the option's form
    config = (
        json.loads(output.read_text())
        if output.exists()
        else {**NGRAM, "num_speculative_tokens": 3}
    )
    config |= {"num_speculative_tokens_per_batch_size": schedule}
    answer, _ = engine({"speculative_config": config}, batches=[1, 4])
    assert answer["vllm"]["drafted"] > 0


def wait_for(url: str, process: subprocess.Popen[Any], log: list[str]) -> None:
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"{url} did not answer: {''.join(log[-50:])}")
