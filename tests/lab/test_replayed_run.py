"""A tiny model of random weights runs for real, and its tokens are the recording's."""

import json

import pytest

from smart_decoding.core.costs import CostModel
from smart_lab import replayed_run
from smart_lab.options import LabOptions
from smart_lab.replay import replay
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace, read_trace, write_trace

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}
SMALL = {"depth": 2, "top_k": 3, "total_tokens": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replayed")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_trace(
        folder / "t",
        Trace(synthetic(2.8, answers=6, length=30, context=20), {"temperature": 0.0}, (299,)),
    )
    return folder


def bench(folder, trace="t", **given):
    config = replayed_run.model_config(str(folder / "config.json"))[1]
    return replayed_run.Replay(options(**given), read_trace(folder / trace), config, 0.05)


def options(**given):
    return LabOptions(
        **{
            "dtype": "fp32",
            "batch_sizes": (2,),
            "policies": ("off", "eagle2"),
            "policy_options": ("eagle2:depth=2,top_k=3,total_tokens=6",),
            **given,
        }
    )


def test_tokens_and_rounds_are_those_of_a_replay(folder):
    """The engine, with a real model's forwards, accepts what the replay without one accepts."""
    runs = bench(folder, batch_sizes=(1,)).runs(1, None)
    (run,) = (r for r in runs if r["task"] == "all" and r["policy"] != "off")
    assert run["identical"]
    assert run["prompts"] == 6
    trace = read_trace(folder / "t")
    found = replay(trace.policy("eagle2", **SMALL), trace.recording, CostModel.default(), 1)
    assert run["tokens_per_round"] == pytest.approx(found.tokens_per_round, rel=0.03)
    assert run["tokens_per_round"] > 1.3
    assert run["rows_per_round"] > 4


def test_answers_are_the_recorded_ones_under_every_policy(folder):
    trace = read_trace(folder / "t")
    made = bench(folder, policies=("off", "smart", "eagle2"))
    for label, engine in made.engines().items():
        prompts = made.prompts([0, 1, 2])["recorded"]
        requests = [engine.add_request(str(p.index), p.tokens, p.params)[0] for p in prompts]
        while engine.has_unfinished_requests:
            engine.step()
        for number, request in enumerate(requests):
            assert request.output == trace.recording.answers[number].tokens.tolist(), label
        engine.check_integrity()


def test_ways_are_one_with_the_device_choosing_and_one_with_the_host(folder, monkeypatch):
    monkeypatch.setattr("smart_decoding.models.target.use_native", lambda *given: False)
    made = bench(folder, allow_slow=True)
    observed = {"device": set(), "host": set()}

    def noting(name, method):
        def noted(self, *given):
            observed[name].add(id(self))
            return method(self, *given)

        return noted

    for name, method in (("device", "_replayed"), ("host", "propose_roots")):
        kind = replayed_run.ReplayedDrafter
        monkeypatch.setattr(kind, method, noting(name, getattr(kind, method)))
    found = made.ways(1, 30.0)
    assert found["identical"]
    assert [len(drafters) for drafters in observed.values()] == [1, 1]
    assert not observed["device"] & observed["host"]
