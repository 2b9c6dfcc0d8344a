"""SMART's scheduler in the real vLLM, SmolLM2-135M on a CPU: run by `make test-vllm`, in its environment.

Every engine is a process of its own, as a process can hold one only. Token identity is asserted in fp32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

vllm = pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")
MODEL = os.environ.get("SMART_TEST_MODEL", "")
if not MODEL:
    pytest.skip("SMART_TEST_MODEL is not set: make test-vllm", allow_module_level=True)

SOURCE = Path(__file__).parents[2] / "src"
ENGINE = Path(__file__).with_name("vllm_engine.py")
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ, "PYTHONPATH": str(SOURCE),
}  # fmt: skip
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
DRAFT = {"method": "draft_model", "model": MODEL, "num_speculative_tokens": 3}
SCHEDULER = "smart_decoding.integrations.vllm.SmartScheduler"


def engine(arguments: dict[str, Any], *, fails: bool = False, binding: str | None = None, **job: Any) -> Any:
    """What an engine with these arguments of vllm.LLM answers to a job; its whole output if it is to fail."""
    arguments = {"model": MODEL, "dtype": "float32", "enforce_eager": True, "max_model_len": 512, **arguments}
    environment = {**ENVIRONMENT, **({"VLLM_CPU_OMP_THREADS_BIND": binding, "OMP_NUM_THREADS": "1"} if binding else {})}
    run = subprocess.run(
        [sys.executable, str(ENGINE), json.dumps(arguments), json.dumps(job)], env=environment, text=True,
        capture_output=True, timeout=1800,
    )  # fmt: skip
    if fails:
        assert run.returncode
        return run.stdout + run.stderr
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1]), run.stdout + run.stderr


@pytest.fixture(scope="module")
def plain() -> Any:
    return engine({}, batches=[1, 4, 16])[0]["tokens"]


def test_ngram_tokens_are_those_of_plain_vllm_on_in_some_steps_and_off_in_others(plain) -> None:
    answer, _ = engine({"speculative_config": NGRAM, "scheduler_cls": SCHEDULER}, batches=[1, 4, 16])
    assert answer["tokens"] == plain
    counters = answer["counters"]
    assert counters["steps_on"] > 10 and counters["steps_off"] > 10
    assert counters["drafted"] >= counters["verified"] > counters["accepted"] > 0
    assert counters["verified"] == answer["vllm"]["drafted"]  # vLLM's own counters, through its public metrics
    assert counters["accepted"] == answer["vllm"]["accepted"]


def test_draft_model_tokens_are_those_of_plain_vllm_at_several_lengths(plain) -> None:
    answer, _ = engine({"speculative_config": DRAFT, "scheduler_cls": SCHEDULER}, batches=[1, 4, 16])
    assert answer["tokens"] == plain
    assert answer["counters"]["accepted"] > 0 and len(answer["counters"]["lengths"]) > 1


def test_tensor_parallel_ranks_agree(tmp_path) -> None:
    """On a tiny random model (SmolLM2 has nine heads): two ranks, the tokens of one."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, head_dim=32, intermediate_size=256, vocab_size=len(tokenizer), initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    one = engine({"model": str(tmp_path)}, batches=[1, 4])[0]
    two, _ = engine(
        {"model": str(tmp_path), "tensor_parallel_size": 2, "speculative_config": NGRAM, "scheduler_cls": SCHEDULER},
        batches=[1, 4],
        binding="0|1",
    )
    assert two["tokens"] == one["tokens"]
    assert two["counters"]["accepted"] > 0


def test_every_name_that_is_relied_on_is_there() -> None:
    """The contract: names, and what they mean, on the live objects of one engine."""
    answer, _ = engine({"speculative_config": NGRAM, "scheduler_cls": SCHEDULER}, batches=[2], contract=True)
    assert answer["missing"] == []
    assert answer["lookup"] == "Lengths"


def test_an_unknown_version_is_stock_with_one_warning(plain) -> None:
    answer, output = engine(
        {"speculative_config": NGRAM, "scheduler_cls": SCHEDULER}, batches=[1], pretend_version="0.99.0"
    )
    assert answer["tokens"] == plain[:1] and answer["counters"] is None and answer["vllm"]["drafted"] > 0
    assert output.count("SMART leaves draft lengths to vLLM") == 1


def test_the_async_class_is_refused_where_scheduling_is_not_async() -> None:
    output = engine(
        {"speculative_config": NGRAM, "scheduler_cls": SCHEDULER.replace("Smart", "SmartAsync")}, fails=True
    )
    assert "use --scheduler-cls smart_decoding.integrations.vllm.SmartScheduler" in output


def test_the_openai_server_speculates_and_serves_the_counters(plain) -> None:
    port, metrics = 18431, 18432
    server = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", MODEL, "--dtype", "float32",
         "--enforce-eager", "--max-model-len", "512", "--port", str(port), "--served-model-name", "m",
         "--speculative-config", json.dumps(NGRAM), "--scheduler-cls", SCHEDULER,
         "--additional-config", json.dumps({"smart": {"metrics_port": metrics}})],
        env={**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server)
        answer, _ = engine({}, batches=[1], text=True)
        body = {"model": "m", "max_tokens": 96, "temperature": 0, "ignore_eos": True, "messages": answer["messages"][0]}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            assert json.load(reply)["choices"][0]["message"]["content"] == answer["texts"][0]
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        found = {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("smart_vllm_")}
        assert found["smart_vllm_steps_on_total"] > 0 and found["smart_vllm_steps_off_total"] > 0
        assert found["smart_vllm_verified_total"] >= found["smart_vllm_accepted_total"]
    finally:
        server.terminate()
        server.wait(60)


def test_smart_vllm_config_measures_and_vllm_takes_what_it_writes(tmp_path) -> None:
    output = tmp_path / "schedule.json"
    arguments = json.dumps({"dtype": "float32", "enforce_eager": True, "max_model_len": 512})
    command = [sys.executable, "-m", "smart_decoding.cli", "vllm-config", MODEL, "--lengths", "3"]
    command += ["--batch-sizes", "1,4", "--blocks", "2", "--max-tokens", "48", "--engine-args", arguments]
    command += ["--output", str(output)]
    run = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=1800)
    assert run.returncode == 0, run.stderr
    reasons = json.loads(output.with_suffix(".reasons.json").read_text())
    assert set(reasons["measured"]) == {"1", "4"} and reasons["measured"]["1"]["3"]["drafted"] > 0
    schedule = [[1, 1, 3], [2, 4, 0]]  # not what was measured, which is a matter of the machine: the option's form
    config = json.loads(output.read_text()) if output.exists() else {**NGRAM, "num_speculative_tokens": 3}
    config |= {"num_speculative_tokens_per_batch_size": schedule}
    answer, _ = engine({"speculative_config": config}, batches=[1, 4])
    assert answer["vllm"]["drafted"] > 0


def wait_for(url: str, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 1200
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(f"{url} did not answer")
