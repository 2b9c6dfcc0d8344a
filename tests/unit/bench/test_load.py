"""Random arrivals on a set clock: what waits, waits; every policy sees the same; percentiles are
over requests."""

from __future__ import annotations

import numpy as np
import pytest
import worlds

from smart_decoding.bench.load import Time, arrivals, capacity, load_run, measure_load, serve
from smart_decoding.bench.options import BenchOptions
from smart_decoding.bench.report import load_table
from smart_decoding.bench.results import Results
from smart_decoding.bench.sections import as_text
from smart_decoding.errors import ConfigError


def sleeping(clock: worlds.Clock):
    def sleep(seconds: float) -> None:
        assert seconds > 0
        clock.now += seconds

    return sleep


def test_latencies_count_from_arrival() -> None:
    clock = worlds.Clock()
    engine = worlds.engine(clock)
    first, second, third = worlds.prompts(
        count=3, tokens=10
    )  # 10, 11 and 12 tokens, a round of 1 s each
    segment = serve(
        engine, [(0.5, first), (3.0, second), (100.0, third)], Time(clock, sleeping(clock))
    )
    a, b, c = segment.served
    assert (a.ttft, a.tpot) == (
        pytest.approx(1.0),
        pytest.approx(1.0),
    )  # idle until 0.5, then a round
    assert b.ttft == pytest.approx(1.5)  # came at 3.0 while the round of 2.5 to 3.5 ran
    assert c.ttft == pytest.approx(1.0)
    assert c.latency == pytest.approx(12.0)
    assert [len(s.tokens) for s in segment.served] == [10, 11, 12]
    assert segment.seconds == pytest.approx(112.0)
    assert 1.0 < segment.running < 2.0
    assert not engine.has_unfinished_requests
    engine.check_integrity()


def test_capacity_is_that_of_a_full_queue() -> None:
    clock = worlds.Clock()
    prompts = worlds.prompts(count=12, tokens=20)  # 20 to 22 tokens
    requests, tokens = capacity(worlds.engine(clock, batch=4), prompts, 4, clock)
    assert (
        3.0 < tokens <= 4.0
    )  # four at once, one token a second each; rounds that prefill some less
    assert requests == pytest.approx(tokens / 21, rel=0.03)


def test_arrivals_are_poisson_and_repeatable() -> None:
    prompts = worlds.prompts(count=5)
    wave = arrivals(prompts, rate=2.0, seconds=500.0, seed=(0, 1))
    times = np.array([at for at, _ in wave])
    gaps = np.diff(times)
    assert len(wave) == pytest.approx(1000, rel=0.1)
    assert (gaps >= 0).all()
    assert times[-1] <= 500
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.12)  # as of an exponential
    assert arrivals(prompts, 2.0, 500.0, (0, 1)) == wave != arrivals(prompts, 2.0, 500.0, (0, 2))
    assert len(arrivals(prompts, 1e-9, 1.0, (0, 0))) == 1


def test_policies_are_served_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smart_decoding.bench.load.SECONDS", 900.0)
    clock = worlds.Clock()
    engines = {
        "off": worlds.engine(clock, batch=4),
        "chain": worlds.engine(
            clock, "chain", worlds.RuleDrafter(clock, seconds=0.25), batch=4, length=2
        ),
    }
    prompts = {"code": worlds.prompts("code", 6, 0, 30), "maths": worlds.prompts("maths", 4, 6, 30)}
    timing = Time(clock, sleeping(clock))
    found = measure_load(engines, prompts, (0.3, 0.8), 0, 4000.0, timing)
    by = {(run["policy"], run["load"]): run for run in found["runs"]}
    assert set(by) == {(p, s) for p in engines for s in (0.3, 0.8)}
    assert found["slots"] == 4
    plain, chain = by["off", 0.8], by["chain", 0.8]
    assert plain["requests"] == chain["requests"] > 5
    assert chain["identical"]
    assert chain["tpot_ratio"] == pytest.approx(0.5, abs=0.06)  # three tokens in 1.5 s
    assert plain["tpot_ms"]["p50"] <= plain["tpot_ms"]["p95"] <= plain["tpot_ms"]["p99"]
    assert by["off", 0.8]["ttft_ms"]["p95"] >= by["off", 0.3]["ttft_ms"]["p50"]
    assert by["off", 0.3]["running"] < by["off", 0.8]["running"] <= 4
    (section,) = load_table(Results({}, (), load=found))
    table = as_text(section)
    assert len(section.rows) == 4
    assert "80 %" in table
    assert "chain" in table


def test_another_token_is_seen() -> None:
    clock = worlds.Clock()
    other = worlds.engine(
        clock, target=worlds.RuleTarget(clock, rule=lambda t: worlds.successor(t) + (t == 25))
    )
    wave = [(0.0, prompt) for prompt in worlds.prompts(count=2)]
    base, odd = (
        serve(engine, wave, Time(clock, sleeping(clock)))
        for engine in (worlds.engine(clock), other)
    )
    assert not load_run("x", 0.5, 1.0, [odd], [base])["identical"]
    assert load_run("x", 0.5, 1.0, [base], [base])["tpot_ratio"] == 1.0


@pytest.mark.parametrize("load", [(0.0,), (-0.5,), (5.0,)])
def test_impossible_loads_are_refused(load: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="shares of the capacity"):
        BenchOptions(load=load)
