"""Rooflines, synthetic acceptance, and the answer to "does it pay there?"."""

import json

import pytest

from smart_decoding.cli.main import main
from smart_decoding.core.costs import CostModel
from smart_lab.__main__ import LAB
from smart_lab.hardware import acceptances, card, dimensions, roofline
from smart_lab.replay import HostCosts
from smart_lab.simulate import (
    EAGLE2,
    EAGLE_2,
    PAPER,
    SMART,
    Prediction,
    Simulation,
    Simulator,
    name_of,
)
from smart_lab.sweep import Sweep
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace, write_trace

COST = CostModel.from_table(
    {1: {1: 1.0, 8: 1.05, 64: 5.0}, 8: {8: 1.1, 64: 2.6}}, {1: 0.05, 64: 0.1}, 0.01
)


@pytest.fixture(scope="module")
def trace() -> Trace:
    about = {"provenance": {"weights": {"model": "a model"}, "head": "a head"}, "temperature": 0.0}
    return Trace(synthetic(3.0, answers=8, length=24, context=50), about, (), COST, HostCosts())


def test_a_roofline_is_what_its_formula_says():
    sheet, model = card("h100"), dimensions("llama-3.1-8b")
    cost = roofline(sheet, model)
    assert model.weights == pytest.approx(7.5e9, rel=0.01)  # 8.03 G less the input embedding
    bytes_ = 2 * model.weights
    assert cost.verify_seconds(1, 1, 0.0) == pytest.approx(bytes_ / 3.35e12, rel=1e-6)
    keys = 1000 * 4 * 32 * 2 * 8 * 128 * 2 / 3.35e12
    scores = 1000 * 4 * 32 * 4 * 32 * 128 / (sheet.efficiency * 989.5e12)
    assert cost.verify_seconds(4, 4, 1000.0) == pytest.approx(
        bytes_ / 3.35e12 + keys + scores, rel=1e-6
    )
    rows = 4 * sheet.tile * 100
    assert cost.verify_seconds(1, rows, 0.0) == pytest.approx(
        2 * model.weights * rows / (sheet.efficiency * 989.5e12)
    )
    assert cost.verify_seconds(1, rows + 1, 0.0) == pytest.approx(
        cost.verify_seconds(1, rows + sheet.tile, 0.0)
    )
    eager = roofline(card("h100", eager=True), model)
    assert eager.verify_seconds(1, 1, 0.0) == pytest.approx(
        32 * 700e-6
    )  # the host is what it waits for


@pytest.mark.parametrize("tokens", [1.5, 3.2])
def test_synthetic_acceptance_is_what_was_asked_for(tokens):
    recording = synthetic(tokens, answers=30, length=40)
    ((_, found),) = Sweep(recording, [EAGLE_2]).rank(COST, 1)
    assert found.tokens_per_round == pytest.approx(tokens, rel=0.12)  # answers end in mid-round


def test_where_it_stops_paying_is_interpolated(trace):
    found = Simulator(trace, COST).prediction(1)

    def at(size: int, value: float) -> Prediction:
        return Prediction(size, 1.0, {SMART: 1.5, EAGLE2: value}, EAGLE_2, found.smart)

    simulation = Simulation("h", "m", "a", [at(4, 1.5), at(8, 1.1), at(16, 0.9)])
    assert simulation.crossing(EAGLE2) == pytest.approx(12.0)
    assert simulation.crossing(SMART) is None


def test_the_command_prints_and_writes(trace, tmp_path, capsys):
    write_trace(tmp_path / "t", trace)
    data = tmp_path / "p.json"
    arguments = [
        "simulate",
        "--trace",
        str(tmp_path / "t"),
        "--batch-sizes",
        "1,8",
        "--json",
        str(data),
    ]
    assert main(arguments, LAB) == 0
    out = capsys.readouterr().out
    assert "SIMULATED, not measured" in out
    assert "recorded: t, a model, a head" in out
    assert "EAGLE-2's size" in out
    read = json.loads(data.read_text())
    assert read["simulated"] is True
    assert [o["batch_size"] for o in read["outlooks"]] == [1, 8]
    assert read["outlooks"][1]["use"] in ("smart", name_of(read["outlooks"][1]["fixed"]))
    assert (
        main(
            [
                *arguments[:3],
                "--hardware",
                "l40s",
                "--model",
                "vicuna-7b",
                "--batch-sizes",
                "2",
                "--context",
                "900",
            ],
            LAB,
        )
        == 0
    )
    assert "864 GB/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either --trace"),
        (["--acceptance", "eagle9"], "unknown acceptance"),
        (["--acceptance", "eagle3"], "no measured profile"),
        (["--acceptance", "3", "--hardware", "h900"], "unknown hardware"),
        (["--acceptance", "3", "--hardware", "h100", "--model", "nope"], "unknown model"),
        (
            ["--acceptance", "3", "--hardware", "h100", "--batch-sizes", "4,257"],
            "between 1 and 256",
        ),
        (["--trace", "t", "--model", "vicuna-7b"], "give --hardware NAME"),
        (["--trace", "t", "--hardware", "p.json", "--eager"], "give --hardware NAME"),
        (["--trace", "/nonexistent"], "cannot be read"),
        (["--acceptance", "3", "--hardware", "/nonexistent.json"], "cannot be read"),
        (["--acceptance", "3", "--context", "0"], "--context"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("smart_lab.synthetic.synthetic", lambda tokens, context, tree: None)
    assert main(["simulate", *arguments], LAB) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def msd() -> Trace:
    level = acceptances()["msd"]
    return Trace(
        synthetic(level["tokens_per_round"], context=level["context"], tree=level["tree"]), {}
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [("l40s", (1, 8, 16)), ("rtx-pro-6000", (1, 16, 32))])
def test_the_shape_of_the_published_figures(name, sizes, msd):
    """MSD's tree gains much at batch 1 and falls below 1x, later on the faster card; the published
    rule and smart stay well above.

    Published: 1.82 at batch 1 on L40S and below 1x between batch 8 and 12; below 1x before 32 on
    RTX PRO 6000. With the rule 1.77 and 1.50 at batch 1 and 8 on L40S, missed by less than a
    tenth."""
    tree = acceptances()["msd"]["tree"]
    simulator = Simulator(msd, roofline(card(name, eager=True), dimensions("vicuna-7b")), tree=tree)
    simulation = Simulation(
        name, "vicuna-7b", "msd", [simulator.prediction(size) for size in sizes]
    )
    assert simulation.predictions[0].speedup[EAGLE2] == pytest.approx(1.82, rel=0.05)
    crossing = simulation.crossing(EAGLE2)
    assert crossing is not None
    assert 10 < crossing < 14 if name == "l40s" else 14 < crossing < 32
    assert min(o.speedup[SMART] for o in simulation.predictions) > 1.39
    assert min(o.speedup[PAPER] for o in simulation.predictions) > 1.2
    rule = acceptances()["msd"]["published"][name]["smart"]
    for prediction in simulation.predictions if name == "l40s" else ():
        if str(prediction.batch_size) in rule:
            published = rule[str(prediction.batch_size)]
            assert prediction.speedup[PAPER] == pytest.approx(published, rel=0.1)
    assert simulator.rounds > 10_000
