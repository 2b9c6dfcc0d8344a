"""One vLLM engine in a process of its own, timed through its public offline API.

    python -m smart_decoding.integrations.vllm.measure '{"model": ..., "speculative_config": ...}'

reads lines of JSON, {"prompts": [...], "max_tokens": n, "load": n}, and answers each with
{"seconds", "tokens", "drafted", "accepted"}, while so many requests are under way, and the means
{"prompt_tokens", "answer_tokens"}. Before the first it prints {"ready": vLLM's version}. `Measured`
is the other end. With --resolve before the arguments it prints vLLM's settings and loads nothing;
`resolved` is the other end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.integrations.vllm.schedule import SCHEDULE
from smart_decoding.integrations.vllm.seams import reads
from smart_decoding.kernels import children

# The method by which a draft model proposes in Model Runner V2.
DRAFT_MODEL = (
    "vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator:StandaloneARSpeculator.propose"
)
WITH_CONFIDENCES = ("draft_model", "eagle", "eagle3", "mtp", "dflash", "dspark")
ENDING = 30.0  # seconds that an engine has to end by itself
COUNTERS = {
    "vllm:spec_decode_num_draft_tokens": "drafted",
    "vllm:spec_decode_num_accepted_tokens": "accepted",
}


class Measured:
    """An engine with these arguments of `vllm.LLM`, in a process; use it as a context manager."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self._name = f"vLLM with speculative_config={arguments.get('speculative_config')}"
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, json.dumps(dict(arguments))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
            start_new_session=True,  # Ctrl-C is for us, who end it
            preexec_fn=children.end_with_parent,
        )

    def ready(self) -> str:
        """Wait until the engine has started; return vLLM's version.

        Raises ModelError if it did not start."""
        return str(self._answer()["ready"])

    def run(self, prompts: Sequence[str], max_tokens: int, load: int) -> dict[str, Any]:
        """Answer all prompts, `load` at once, up to `max_tokens` tokens each.

        Raises ModelError if the process has ended."""
        job = {"prompts": list(prompts), "max_tokens": max_tokens, "load": load}
        with suppress(BrokenPipeError):  # reported by `_answer`
            print(json.dumps(job), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ModelError(
                f"{self._name} ended with code {self._process.wait()}: its own message stands above"
            )
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Measured:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # the other end stops then
        try:  # one that is broken off is in the middle of its work
            self._process.wait(0 if any(error) else ENDING)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(OSError):  # what it started and left, too
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            children.wait_for_group(self._process.pid, ENDING)
            self._process.stdout.close()


def environment() -> dict[str, str]:
    """Return the user's; vLLM logs warnings and errors only, unless the user says otherwise: an
    engine would print a hundred lines for each of ours."""
    return {"VLLM_LOGGING_LEVEL": "WARNING", **children.environment()}


def resolved(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return vLLM's settings under these arguments, whose speculative config has a schedule; see
    `_resolve`.

    Raises ConfigError if vLLM refuses them."""
    command = [sys.executable, "-m", __spec__.name, "--resolve", json.dumps(dict(arguments))]
    run = subprocess.run(command, stdout=subprocess.PIPE, env=environment(), text=True, check=False)
    if run.returncode:
        raise ConfigError("vLLM does not take these arguments: its own message stands above")
    answer: dict[str, Any] = json.loads(run.stdout)
    return answer


def main(arguments: list[str]) -> None:
    """Run the process. Its answers go to the real stdout, all other output to stderr."""
    children.become_another_program()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine_args = json.loads(arguments[-1])
    if "--resolve" in arguments:
        print(json.dumps(_resolve(engine_args)), file=answers, flush=True)
    else:
        _serve(engine_args, answers)


def _resolve(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return vLLM's settings under a schedule, as JSON.

    scheduled: whether it is kept. graphs: CUDA graphs without it, and with it. all_passes: whether
    a draft model runs all its passes under any schedule. no_adaptive: why vLLM's adaptive
    verification cannot run in its place; None: it can."""
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    speculative = arguments["speculative_config"]
    without = {name: value for name, value in speculative.items() if name != SCHEDULE}
    configs = [
        EngineArgs(**{**arguments, "speculative_config": config}).create_engine_config()
        for config in (without, dict(speculative))
    ]
    config = configs[1]
    return {
        "vllm": vllm.__version__,
        "scheduled": getattr(config.speculative_config, SCHEDULE) is not None,
        "graphs": [each.compilation_config.cudagraph_mode.name for each in configs],
        "all_passes": config.use_v2_model_runner
        and config.speculative_config.method == "draft_model"
        and not reads(DRAFT_MODEL, "num_speculative_tokens"),
        "no_adaptive": _no_adaptive({**arguments, "speculative_config": without}),
    }


def _no_adaptive(arguments: dict[str, Any]) -> str | None:
    """Return why adaptive verification cannot run with these arguments, in vLLM's own words."""
    from vllm.engine.arg_utils import EngineArgs

    speculative = {**arguments["speculative_config"], "enable_adaptive_verification": True}
    if speculative.get("method") not in WITH_CONFIDENCES:
        return f"the drafter {speculative.get('method')!r} has no confidences"
    try:
        EngineArgs(**{**arguments, "speculative_config": speculative}).create_engine_config()
    except Exception as error:  # whatever vLLM raises says why
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return next((line for line in lines if "daptive" in line), lines[0] if lines else "")
    return None


def _serve(arguments: dict[str, Any], answers: Any) -> None:
    import vllm

    llm = vllm.LLM(**{"disable_log_stats": False, **arguments})
    tokenizer = llm.get_tokenizer()

    def encoded(prompt: str) -> list[int]:
        if not tokenizer.chat_template:
            return list(tokenizer.encode(prompt))
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return list(tokenizer.encode(text, add_special_tokens=False))

    print(json.dumps({"ready": vllm.__version__}), file=answers, flush=True)
    for number, line in enumerate(sys.stdin):
        job = json.loads(line)
        params = vllm.SamplingParams(temperature=0.0, max_tokens=job["max_tokens"])
        prompts = {f"{number}-{at}": encoded(text) for at, text in enumerate(job["prompts"])}
        before = _counts(llm)
        answer = answered(llm.llm_engine, prompts, params, job["load"])
        answer |= {name: count - before[name] for name, count in _counts(llm).items()}
        print(json.dumps(answer), file=answers, flush=True)


def answered(
    engine: Any,
    prompts: Mapping[str, list[int]],
    params: Any,
    load: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Answer prompts by name, `load` at once: as one ends, the next one begins. When none is left
    to begin, the clock stops, and what is under way is dropped: it would run with fewer others."""
    waiting, counts = list(prompts.items())[::-1], dict.fromkeys(prompts, 0)
    running: set[str] = set()

    def begin() -> bool:
        if not waiting:
            return False
        name, prompt = waiting.pop()
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
        running.add(name)
        return True

    start = clock()
    for _ in range(load):
        begin()
    busy = True
    while busy:
        for output in engine.step():
            counts[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                running.discard(output.request_id)
                busy = begin() and busy
    seconds = clock() - start
    engine.abort_request(sorted(running))
    while engine.has_unfinished_requests():
        engine.step()
    lengths = [count for count in counts.values() if count]
    return {
        "seconds": seconds,
        "tokens": sum(lengths),
        "prompt_tokens": sum(map(len, prompts.values())) / len(prompts),
        "answer_tokens": sum(lengths) / len(lengths),
    }


def _counts(llm: Any) -> dict[str, int]:
    counts = dict.fromkeys(COUNTERS.values(), 0)
    for metric in llm.get_metrics():
        if metric.name in COUNTERS:
            counts[COUNTERS[metric.name]] += int(metric.value)
    return counts


if __name__ == "__main__":
    main(sys.argv[1:])
