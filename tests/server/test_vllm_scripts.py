"""Scripts in the shape of vLLM's examples run once their imports are changed.

Only import lines are rewritten, and the model's name, for which the tiny model stands.
"""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from serving import save_tiny_model

from smart_decoding import ConfigError, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

    from smart_decoding import LLM

MOVED = (
    (r"from vllm\.engine\.arg_utils import", "from smart_decoding import"),
    (r"from vllm\.v1\.engine\.async_llm import", "from smart_decoding import"),
    (r"from vllm(\.\w+)? import", r"from smart_decoding\1 import"),
    (r"from vllm\.v1\.metrics\.reader import", "from smart_decoding.engine.metrics import"),
    (
        r"from vllm\.utils(\.argparse_utils)? import FlexibleArg",
        "from argparse import ArgumentParser as FlexibleArg",
    ),
)

BASIC = """
from vllm import LLM, SamplingParams

questions = ["The first thing to pack is", "A good name for a cat is", "Ships sink when"]
params = SamplingParams(temperature=0.8, top_p=0.95, seed=1)

llm = LLM(model="MODEL", dtype="auto", tensor_parallel_size=1, gpu_memory_utilization=0.5,
          swap_space=1, trust_remote_code=True, tokenizer="MODEL", enforce_eager=True,
          kv_cache_dtype="auto", block_size=16, revision=None, max_logprobs=20)
outputs = llm.generate(questions, params, use_tqdm=True, lora_request=None)
for question, output in zip(questions, outputs):
    assert output.prompt == question and output.finished
    assert len(output.outputs[0].token_ids) <= 16
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
assert len({output.outputs[0].text for output in outputs}) == 3
"""

GENERATE = """
from vllm import LLM, EngineArgs
from vllm.outputs import RequestOutput
from vllm.utils.argparse_utils import FlexibleArgumentParser


def main(args: dict):
    limit = args.pop("max_tokens")
    warmth = args.pop("temperature")
    llm = LLM(**args)
    params = llm.get_default_sampling_params()
    assert (params.top_k, params.top_p, params.temperature) == (5, 0.9, 0.7)
    if limit is not None:
        params.max_tokens = limit
    if warmth is not None:
        params.temperature = warmth
    (output,) = llm.generate("Rain falls when", params)
    assert isinstance(output, RequestOutput)
    assert len(output.outputs[0].token_ids) == limit
    assert llm.get_tokenizer().decode(output.outputs[0].token_ids) == output.outputs[0].text


parser = FlexibleArgumentParser()
group = parser.add_argument_group("engine")
EngineArgs.add_cli_args(group)
group.set_defaults(model="MODEL")
parser.add_argument("--max-tokens", type=int)
parser.add_argument("--temperature", type=float)
main(vars(parser.parse_args()))
"""

CHAT = """
from vllm import LLM, SamplingParams

tools = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object"}}}]
talk = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": [{"type": "text", "text": "What is the time?"}]},
]
llm = LLM(model="MODEL", max_model_len=600)
params = SamplingParams(temperature=0, max_tokens=8)
(one,) = llm.chat(talk, params, use_tqdm=False)
many = llm.chat([talk] * 3, params, use_tqdm=True, lora_request=None,
                chat_template_content_format="auto")
assert [each.outputs[0].text for each in many] == [one.outputs[0].text] * 3
template = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ mood }}{{ tools | tojson }}"
(own,) = llm.chat(talk, params, chat_template=template, add_generation_prompt=False,
                  tools=tools, chat_template_kwargs={"mood": "calm"})
assert own.prompt.startswith("<Answer in one word.><Hello>")
assert "calm[" in own.prompt and '"clock"' in own.prompt
try:
    llm.chat(talk, params, tools=tools)
except ValueError as error:
    assert "the chat template takes no tools" in str(error)
else:
    raise AssertionError("the tools were dropped")
"""

STRUCTURED = """
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

sql = '''
root ::= query
query ::= "select " column " from " table
column ::= "a" | "b"
table ::= "t" | "u"
'''
mail = StructuredOutputsParams(regex=r"[a-z]{1,8}@mail\\.com\\n")
schema = {"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"]}
wanted = {
    "choice": StructuredOutputsParams(choice=["Good", "Bad"]),
    "regex": mail,
    "json": StructuredOutputsParams(json=schema),
    "grammar": StructuredOutputsParams(grammar=sql),
}
llm = LLM(model="MODEL", max_model_len=300)
said = {}
for name, form in wanted.items():
    params = SamplingParams(structured_outputs=form, max_tokens=120, stop=["\\n"], seed=2)
    outputs = llm.generate(prompts="How was it? ", sampling_params=params)
    said[name] = outputs[0].outputs[0].text
assert said["choice"] in ("Good", "Bad")
assert said["json"].startswith("{")
assert said["regex"].endswith("@mail.com")
assert said["grammar"] in [f"select {c} from {t}" for c in "ab" for t in "tu"]
"""

SPECULATIVE = """
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.metrics.reader import Counter, Gauge, Histogram, Vector

table = "| 1 | Ann | 31 | Bern |\\n| 2 | Bob | 45 | Oslo |\\n" * 6
llm = LLM(model="MODEL", max_model_len=900, enable_prefix_caching=True, disable_log_stats=False,
          enable_chunked_prefill=False, disable_chunked_mm_input=True, max_num_seqs=None,
          runner="generate", speculative_config={
              "method": "ngram", "num_speculative_tokens": 3, "policy": "static",
              "prompt_lookup_max": 3, "prompt_lookup_min": 2})
params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=2)
ids = llm.get_tokenizer().encode(table + "Ann is ")
(first,) = llm.generate([TokensPrompt(prompt_token_ids=ids)], sampling_params=params)
(second,) = llm.generate(table + "Bob is ", sampling_params=params)
assert first.num_cached_tokens == 0 < 200 < second.num_cached_tokens
answer = first.outputs[0]
assert answer.cumulative_logprob == sum(
    entry[token].logprob for token, entry in zip(answer.token_ids, answer.logprobs))
assert all(entry[token].decoded_token is not None and entry[token].rank == 1
           for token, entry in zip(answer.token_ids, answer.logprobs))
found = {}
for metric in llm.get_metrics():
    if isinstance(metric, Vector):
        found[metric.name] = metric.values
    elif isinstance(metric, Histogram):
        assert metric.count == metric.buckets["+Inf"] == 2
        found[metric.name] = metric.sum
    else:
        assert isinstance(metric, Counter | Gauge)
        found[metric.name] = metric.value
assert found["vllm:generation_tokens"] == 80
assert found["vllm:prompt_tokens"] == 2 * len(ids)
assert found["vllm:prefix_cache_hits"] == second.num_cached_tokens
assert found["vllm:prefix_cache_queries"] == found["vllm:prompt_tokens"]
accepted = found["vllm:spec_decode_num_accepted_tokens"]
assert 0 < accepted <= found["vllm:spec_decode_num_draft_tokens"]
assert sum(found["vllm:spec_decode_num_accepted_tokens_per_pos"]) == accepted
assert len(found["vllm:spec_decode_num_accepted_tokens_per_pos"]) <= 3
assert found["vllm:num_requests_running"] == 0
"""

STREAMING = """
import asyncio

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM


async def told(engine: AsyncLLM, prompt: str, name: str) -> str:
    params = SamplingParams(
        max_tokens=30, temperature=0.8, top_p=0.95, seed=7, ignore_eos=True,
        output_kind=RequestOutputKind.DELTA)
    pieces = []
    async for output in engine.generate(request_id=name, prompt=prompt, sampling_params=params):
        pieces.append(output.outputs[0].text)
        if output.finished:
            break
    return "".join(pieces)


async def main() -> None:
    args = AsyncEngineArgs(model="MODEL", enforce_eager=True, max_model_len=300)
    engine = AsyncLLM.from_engine_args(args)
    try:
        one = [await told(engine, prompt, prompt) for prompt in ("A fox is", "An ox is")]
        both = await asyncio.gather(told(engine, "A fox is", "a"), told(engine, "An ox is", "b"))
        assert one == both and one[0] != one[1]
        params = SamplingParams(max_tokens=30, temperature=0.8, top_p=0.95, seed=7,
                                ignore_eos=True)
        (whole,) = engine.llm.generate("A fox is", params)
        assert whole.outputs[0].text == one[0]
    finally:
        engine.shutdown()


asyncio.run(main())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with defaults of its own for sampling."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    path = folder / "generation_config.json"
    defaults = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "do_sample": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **defaults}))
    return folder


@pytest.mark.parametrize("script", [BASIC, GENERATE, CHAT, STRUCTURED, SPECULATIVE, STREAMING])
def test_a_script_runs_with_other_imports(
    script: str, model: Path, short_profile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is STRUCTURED:
        pytest.importorskip("llguidance")
    line = ["script", "--max-tokens", "9", "--max-model-len", "128", "--temperature", "0.5"]
    monkeypatch.setattr(sys, "argv", line)
    for theirs, ours in MOVED:
        script = re.sub(f"^{theirs}", ours, script, flags=re.MULTILINE)
    assert "vllm import" not in script
    exec(compile(script.replace("MODEL", str(model)), "script", "exec"), {"__name__": "script"})


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("shows_bar", [True, False])
def test_progress_is_shown_on_a_terminal_unless_it_is_not_wanted(
    plain: LLM, monkeypatch: pytest.MonkeyPatch, terminal: bool, shows_bar: bool
) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", shown)
    params = SamplingParams(max_tokens=2, seed=1)
    plain.generate(["a", "b"], params) if shows_bar else plain.generate("a", params, use_tqdm=False)
    assert ("2/2" in shown.getvalue()) == (terminal and shows_bar)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_request": object()}, "lora_request=<object"),
        ({"chat_template_content_format": "openai"}, "chat_template_content_format='openai' is"),
        ({"continue_final_message": True}, "continue_final_message=True is not supported"),
    ],
)
def test_what_a_call_cannot_do_is_refused_by_name(
    plain: LLM, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plain.chat([{"role": "user", "content": "hi"}], **change)
    assert str(caught.value).startswith(message)
    with pytest.raises(TypeError, match="temprature"):
        plain.chat([{"role": "user", "content": "hi"}], temprature=1)


def test_log_probabilities_are_limited_where_that_is_asked_for(load: Callable[..., LLM]) -> None:
    llm = load(speculative_config=False, max_logprobs=5)
    (answer,) = llm.generate("a", SamplingParams(max_tokens=1, logprobs=5))
    assert len(answer.outputs[0].logprobs[0]) in (5, 6)
    for options in ({"logprobs": 6}, {"prompt_logprobs": -1}):
        with pytest.raises(ConfigError, match="must be at most max_logprobs=5"):
            llm.generate("a", SamplingParams(max_tokens=1, **options))
