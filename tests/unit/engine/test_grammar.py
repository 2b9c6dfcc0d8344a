"""Grammars per tree node: the tokens equal plain decoding under the grammar, whatever the
tree was."""

from __future__ import annotations

import functools
import os
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from smart_decoding.core.policies import POLICIES
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams, grammatical
from smart_decoding.errors import ConfigError
from smart_decoding.models.text import grammars as models_grammars
from smart_decoding.models.text.grammars import Grammars
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_decoding.server.tools import Offer, Tool

from .fakes import EOS, VOCAB, alone, finish, make_engine, random_requests, text_of

sys.path.append(str(Path(__file__).parents[2] / "server"))
from serving import OUTGROWING, outgrowing

pytest.importorskip("llguidance")

PATTERNS = [
    r"([abce]{2}[f-k]{1,3})+",
    r"(abc|abe|ace)*w?",
    r"[a-w]{5,30}",
    r"(v[ab]+u){2,4}",
]  # d is end of sequence
# name -> (requests, sampling, engine)
SCENARIOS = {
    "greedy": (4, {"temperature": 0.0, "max_tokens": 30}, {}),
    "drawn": (
        4,
        {"temperature": 0.9, "top_p": 0.9, "max_tokens": 30},
        {"max_num_batched_tokens": 16},
    ),
    "penalties": (
        4,
        {"temperature": 0.8, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}, "max_tokens": 30},
        {},
    ),
    "tight memory": (4, {"temperature": 0.0, "max_tokens": 40}, {"pages": 8}),
}


@functools.cache
def grammars() -> Grammars:
    """On the fakes' vocabulary: one letter a token, EOS is special."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={text_of([i]): i for i in range(VOCAB)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text_of([EOS]), special=True)])
    return Grammars(Tokenizer(backend), VOCAB, (EOS,))


def requests_of(name: str) -> list[tuple[list[int], SamplingParams]]:
    """A pattern each; the last request has none."""
    count, sampling, _ = SCENARIOS[name]
    structures = [*(StructuredOutputsParams(regex=pattern) for pattern in PATTERNS), None]
    return [
        random_requests(1, i, **sampling, structured_outputs=structures[i])[0]
        for i in range(count + 1)
    ]


@functools.cache
def expected(name: str) -> list[list[int]]:
    return [alone(prompt, params, grammars())[0].output for prompt, params in requests_of(name)]


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_are_those_of_plain_decoding_under_the_grammar(policy: str, name: str) -> None:
    engine = make_engine(policy, constrain=grammars(), **SCENARIOS[name][2])
    requests = []
    for i, (prompt, params) in enumerate(requests_of(name)):
        requests += engine.add_request(str(i), prompt, params)
        if i % 2:
            engine.step()  # later requests join a running batch
    finish(engine)
    assert [request.output for request in requests] == expected(name)
    bound = requests[:-1]
    for pattern, request in zip(PATTERNS, bound, strict=True):
        text = text_of([token for token in request.output if token != EOS])
        assert request.stop.finish_reason == "length" or re.fullmatch(pattern, text)
        assert set(text) <= set("abcefghijkluvw") or "a-w" in pattern
    assert any(request.stop.finish_reason == "stop" for request in bound)
    if policy == "off":
        assert sum(r.metrics.verified for r in bound) == 0
    else:
        assert sum(r.metrics.accepted for r in bound) > 0


def test_forbidden_nodes_are_not_verified() -> None:
    """Only abc is allowed: of all drafted nodes only nodes of abc are verified."""
    engine = make_engine("static", constrain=grammars())
    (request,) = engine.add_request(
        "x",
        [1, 2],
        SamplingParams(
            temperature=0,
            max_tokens=20,
            structured_outputs=StructuredOutputsParams(regex="(abc){5}"),
        ),
    )
    while engine.has_unfinished_requests:
        engine.step()
        record = engine.last_round
        assert record is not None
        nodes = record.round.trees.take(record.round.kept)
        before = text_of(request.tokens[: -len(record.acceptance.emitted[0])])[2:]
        for node in range(len(nodes)):
            path = text_of(nodes.token[nodes.path(node)].tolist()).removesuffix("d")
            assert ("abc" * 5).startswith(before + path)
    assert text_of(request.output) == "abc" * 5 + "d"
    assert request.metrics.accepted > 0
    assert request.metrics.verified < request.metrics.drafted


def constraint(**what: Any) -> Any:
    return grammars()(StructuredOutputsParams(**what))


def ids(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]


def allowed(of: Any, path: str = "") -> str:
    return text_of(np.flatnonzero(of.allowed(ids(path))).tolist())


def test_masks_follow_paths_and_forget_them() -> None:
    one = constraint(regex="ab?(c|e)")
    assert allowed(one) == "a"
    assert allowed(one, "a") == "bce"
    assert allowed(one, "ab") == "ce"
    assert allowed(one, "abc") == "d"
    assert allowed(one, "abcd") == "d"
    assert allowed(one) == "a"
    assert [
        one.accepts(ids(path)) for path in ("a", "ac", "acd", "b", "acc", "ad", "acda", "d")
    ] == [True, True, True, False, False, False, False, False]
    one.append(ids("ac"))
    assert allowed(one) == "d"
    assert one.accepts(ids("d"))
    assert not one.accepts(ids("a"))
    one.append(ids("d"))
    assert allowed(one) == "d"
    assert not one.accepts(ids("d"))


CALLS = [Tool.model_validate({"type": "function", "function": {"name": "now"}})]
CALL = '\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("must", [True, False])
def test_added_tokens_that_are_text_may_be_said(must: bool) -> None:
    """As Qwen's <think> and <tool_call>, which its tokenizer adds without calling them special."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [AddedToken(text, special=text == "<end>") for text in ("<end>", "<tool_call>", "<think>")]
    )
    end, call, think = (backend.token_to_id(text) for text in ("<end>", "<tool_call>", "<think>"))
    vocab = backend.get_vocab_size() + 5  # the model's columns are padded, as they often are
    make = Grammars(Tokenizer(backend), vocab, (end,))
    one = make(StructuredOutputsParams(grammar=Offer(CALLS, must, many=False).grammar(None)))
    spelt = backend.encode(CALL).ids[:4]
    assert one.allowed([])[think] == (not must)
    assert one.allowed([])[call]
    assert not one.allowed([])[vocab - 5 :].any()
    assert one.accepts([call, *spelt])
    if not must:
        one.append([think, call])
        assert np.flatnonzero(one.allowed([])).tolist() == spelt[:1]
    else:
        assert not one.accepts([end])
        assert np.flatnonzero(one.allowed([])).tolist() == [call]


def test_answers_to_one_prompt_do_not_share_their_place() -> None:
    engine = make_engine("eagle2", constrain=grammars())
    params = SamplingParams(
        n=3,
        temperature=1.0,
        seed=1,
        max_tokens=20,
        structured_outputs=StructuredOutputsParams(choice=["abab", "cece", "ukuk"]),
    )
    answers = engine.add_request("x", [1], params)
    finish(engine)
    assert all(text_of(answer.output) in ("ababd", "ceced", "ukukd") for answer in answers)


@pytest.fixture(params=[False, True], ids=["in the round", "beside"])
def expensive(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether every mask takes too long for a round to wait for it, or none."""
    monkeypatch.setattr(models_grammars, "EXPENSIVE", -1.0 if request.param else np.inf)
    return bool(request.param)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("policy", ["off", "static", "smart"])
def test_tokens_are_the_same_if_masks_are_computed_beside_the_rounds(
    policy: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one without a grammar does not wait, nor does it if one is aborted meanwhile."""
    reference = expected(name)
    monkeypatch.setattr(models_grammars, "EXPENSIVE", -1.0)
    engine = make_engine(policy, constrain=grammars(), **SCENARIOS[name][2])
    requests = []
    for i, (prompt, params) in enumerate(requests_of(name)):
        requests += engine.add_request(str(i), prompt, params)
        requests += engine.add_request(f"again {i}", prompt, params)
        engine.add_request(f"gone {i}", prompt, params)
        engine.step()
        engine.check_integrity()
        engine.abort(f"gone {i}")
    finish(engine)
    engine.check_integrity()
    assert engine.pool.used == 0
    assert [request.output for request in requests[::2]] == reference
    assert [request.output for request in requests[1::2]] == reference
    assert all(request.constraint.expensive for request in requests[:-2])


def test_masks_are_computed_where_they_take_what_rounds_leave() -> None:
    def nice() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    if sys.platform == "linux":
        beside = models_grammars._MASKS.submit("", nice).result()
        assert beside == min(19, nice() + models_grammars.NICE)


def test_the_client_whose_masks_took_least_has_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """First come, first served let one who had six grammars have six times as many."""
    monkeypatch.setattr(models_grammars.time, "thread_time", lambda: 0.0)
    free = threading.Event()
    done: list[str] = []
    beside = models_grammars.MaskThread()
    beside.submit("many", free.wait)
    for client in ("many", "many", "few", "many", "few"):
        last = beside.submit(client, functools.partial(done.append, client))
    free.set()
    last.result(10)
    assert done[:3] == ["few", "many", "few"]
    with pytest.raises(ConfigError):
        beside.submit("few", functools.partial(constraint, regex="(")).result(10)
    clients: list[str] = []
    monkeypatch.setattr(models_grammars, "EXPENSIVE", -1.0)
    submit = models_grammars._MASKS.submit
    monkeypatch.setattr(
        models_grammars._MASKS,
        "submit",
        lambda client, work: clients.append(client) or submit(client, work),
    )
    engine = make_engine("off", constrain=grammars())
    for client in ("many", "few"):
        for prompt, params in requests_of("drawn"):
            engine.add_request(f"{client} {prompt}", prompt, params, client=client)
    finish(engine)
    assert set(clients) == {"many", "few"}


@pytest.mark.parametrize("policy", ["off", "static"])
def test_a_grammar_that_fails_in_a_round_ends_its_own_request_only(
    policy: str, expensive: bool
) -> None:
    """The others' tokens are the same as in a batch of one, and no forward is done twice."""
    bad = SamplingParams(
        temperature=1.0,
        seed=5,
        max_tokens=60,
        logit_bias={EOS: -100.0},
        structured_outputs=StructuredOutputsParams(grammar=OUTGROWING),
    )
    good = [(prompt, replace(params, seed=7)) for prompt, params in requests_of("drawn")]
    expected = [alone(prompt, params, grammars())[0].output for prompt, params in good]
    rounds = []
    for failing in (0, 2):
        engine = make_engine(policy, constrain=grammars())
        forwards = []
        verify = engine.target.verify
        engine.target.verify = lambda *args, verify=verify, forwards=forwards: (  # type: ignore[method-assign]
            forwards.append(1) or verify(*args)  # type: ignore[func-returns-value]
        )
        others = [engine.add_request(f"g{i}", *each)[0] for i, each in enumerate(good)]
        failed = [engine.add_request(f"b{i}", [1, 2], bad)[0] for i in range(failing)]
        finish(engine)
        rounds.append(len(forwards))
        assert [request.output for request in others] == expected
        for request in failed:
            assert isinstance(request.error, ConfigError)
            assert "items" in str(request.error)
            assert 3 < len(request.output) < 60
    assert expensive or rounds[1] <= rounds[0] + 3


def test_an_error_on_a_drafted_path_is_none_of_the_answer() -> None:
    one = constraint(grammar=outgrowing('"g" | "e" r0', 80))
    path = ids("e" + "abc" * 4)
    assert not one.accepts([*path, EOS])
    one.allowed(path)
    assert one.before_error(ids("eag")) == ids("eag")
    assert one.before_error([*path, EOS]) == path
    assert one.error is None
    assert allowed(one) == "eg"
    assert allowed(one, "ea") == "abcd"
    one.append(ids("e"))
    one.allowed(path[1:])
    one.append(ids("a"))
    assert one.error is None
    assert allowed(one) == "abcd"
    one.allowed(path[2:])
    one.append(path[2:])
    assert "items" in str(one.error)


@functools.cache
def outgrown(policy: str, **params: Any) -> tuple[str, str | None, str]:
    """An answer whose grammar fails after nine tokens or so: its text, how it ends, its error."""
    engine = make_engine(policy, constrain=grammars())
    form = StructuredOutputsParams(grammar=outgrowing("/[abc]{6}/ r0", 240))
    defaults = {"temperature": 1.0, "seed": 5, "max_tokens": 60, "logit_bias": {EOS: -100.0}}
    (request,) = engine.add_request(
        "x", [1, 2], SamplingParams(**{**defaults, **params}, structured_outputs=form)
    )
    finish(engine)
    assert policy == "off" or request.metrics.accepted > 0
    return text_of(request.output), request.stop.finish_reason, str(request.error)


def test_an_answer_that_ends_before_its_grammars_error_has_none() -> None:
    text, reason, error = outgrown("off")
    assert len(text) > 6
    assert (reason, "items" in error) == (None, True)
    assert outgrown("off", stop=text[-3:]) == (text, "stop", "None")
    assert outgrown("off", max_tokens=len(text)) == (text, "length", "None")


def test_tokens_and_end_before_an_error_are_those_of_plain_decoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = outgrown("off")[0]
    for end in ({}, {"stop": text[-4:-1]}, {"stop": text[-3:]}, {"max_tokens": len(text)}):
        assert outgrown("static", **end) == outgrown("off", **end)
        with monkeypatch.context() as patch:
            patch.setattr(models_grammars, "EXPENSIVE", -1.0)
            assert outgrown.__wrapped__("off", **end) == outgrown("off", **end)


def test_many_choices_are_one_terminal() -> None:
    """As alternatives of a rule more than 2000 of them failed, after a time quadratic in them."""
    texts = [f"{a}{b}{c}{'e' * (b == 'f')}" for a in "abc" for b in "efghijklmn" for c in "opqrst"]
    many = StructuredOutputsParams(choice=[*texts, "ae", *(f"u{'v' * i}" for i in range(2500))])
    one = grammars()(many)
    assert allowed(one) == "abcu"
    assert allowed(one, "ae") == "dopqrst"
    assert allowed(one, "bfo") == "e"
    assert one.accepts(ids("aed"))
    assert not one.accepts(ids("afod"))


def test_pruning_takes_what_is_below_a_forbidden_node() -> None:
    trees = DraftTrees.empty(2)
    trees.append([0, 0, 1], ids("abz"), [ROOT, ROOT, ROOT], [0.5, 0.3, 0.5])
    trees.append([0, 0, 1], ids("bcz"), [0, 1, 2], [0.5, 0.5, 0.5])
    trees.append([0, 0], ids("ed"), [3, 3], [0.5, 0.5])
    kept = grammatical([constraint(regex="abe+"), None], trees, np.array([0, 1, 2, 3, 4, 5, 6]))
    assert kept.tolist() == [0, 2, 3, 5, 6]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StructuredOutputsParams(), "exactly one"),
        (lambda: StructuredOutputsParams(regex="a", choice=["b"]), "exactly one"),
        (lambda: StructuredOutputsParams(json="{"), "no JSON schema"),
        (lambda: StructuredOutputsParams(json="[]"), "no JSON schema"),
        (lambda: StructuredOutputsParams(json={"const": float("nan")}), "no JSON schema"),
        (lambda: StructuredOutputsParams(choice=[]), "choice"),
        (lambda: StructuredOutputsParams(choice=["a", ""]), "choice"),
        (lambda: StructuredOutputsParams(regex=3), "text"),
        (lambda: StructuredOutputsParams(json_object=""), "json_object"),
        (lambda: SamplingParams(structured_outputs={"regex": "a"}), "StructuredOutputsParams"),
        (
            lambda: SamplingParams(
                structured_outputs=StructuredOutputsParams(regex="a"), ignore_eos=True
            ),
            "ignore_eos",
        ),
        (
            lambda: SamplingParams(
                structured_outputs=StructuredOutputsParams(regex="a"), min_tokens=2
            ),
            "min_tokens",
        ),
        (lambda: constraint(regex="("), "regex"),
        (lambda: constraint(regex="a(?=b)"), "look-around"),
        (lambda: constraint(grammar="start: x"), "x"),
        (lambda: constraint(json={"type": "nope"}), "Invalid type"),
        (lambda: constraint(json={"not": {}}), "Unimplemented"),
        (lambda: constraint(json={"enum": []}), "Unsatisfiable"),
        (lambda: constraint(json={"not": {}, "x-guidance": {"lenient": True}}), "Unimplemented"),
        (
            lambda: Grammars(Tokenizer(tokenizers.Tokenizer(models.BPE())), 9, ())(
                StructuredOutputsParams(regex="a")
            ),
            "no end-of-sequence",
        ),
        (
            lambda: make_engine().add_request(
                "x", [1], SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
            ),
            "no grammars",
        ),
    ],
)
def test_what_cannot_be_fulfilled_is_refused_in_one_line(
    make: Callable[[], Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        make()
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400
