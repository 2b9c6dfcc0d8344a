"""Scripts in the shape of vLLM's offline examples run once their imports are changed.

Only import lines are rewritten, and the model's name, for which the tiny model stands.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from serving import save_tiny_model

MOVED = (
    (r"from vllm(\.sampling_params|\.inputs)? import", "from smart_decoding import"),
    (r"from vllm\.v1\.metrics\.reader import", "from smart_decoding.engine.metrics import"),
    (r"from vllm\.utils import FlexibleArg", "from argparse import ArgumentParser as FlexibleArg"),
)

BASIC = """
from vllm import LLM, SamplingParams

questions = ["The first thing to pack is", "A good name for a cat is", "Ships sink when"]
params = SamplingParams(temperature=0.8, top_p=0.95, seed=1)

llm = LLM(model="MODEL", dtype="auto", tensor_parallel_size=1, gpu_memory_utilization=0.5,
          swap_space=1, trust_remote_code=False, tokenizer="MODEL", enforce_eager=True)
outputs = llm.generate(questions, params, use_tqdm=True)
for question, output in zip(questions, outputs):
    assert output.prompt == question and output.finished
    assert len(output.outputs[0].token_ids) <= 16
    print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
assert len({output.outputs[0].text for output in outputs}) == 3
"""

GENERATE = """
from vllm import LLM, EngineArgs
from vllm.utils import FlexibleArgumentParser


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
many = llm.chat([talk] * 3, params, use_tqdm=True)
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
          enable_chunked_prefill=True, speculative_config={
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
accepted = found["vllm:spec_decode_num_accepted_tokens"]
assert 0 < accepted <= found["vllm:spec_decode_num_draft_tokens"]
assert sum(found["vllm:spec_decode_num_accepted_tokens_per_pos"]) == accepted
assert len(found["vllm:spec_decode_num_accepted_tokens_per_pos"]) <= 3
assert found["vllm:num_requests_running"] == 0
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with defaults of its own for sampling."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    path = folder / "generation_config.json"
    defaults = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "do_sample": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), **defaults}))
    return folder


@pytest.mark.parametrize("script", [BASIC, GENERATE, CHAT, STRUCTURED, SPECULATIVE])
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
