"""How quants are multiplied: measured, predicted, kept; no option of drafting matters to it."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from gguf import GGMLQuantizationType

from smart_decoding import LLM, SamplingParams
from smart_decoding.kernels import library, ops
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.checkpoints.registry import shipped_head
from smart_decoding.profiling import ways
from smart_decoding.profiling.cache import BUSY_LASTS, told
from smart_decoding.profiling.ways import ROWS, Way, choose, fastest, measure, sample
from smart_decoding.speculation import stored_prior

from .test_loading import write_gguf

if TYPE_CHECKING:
    from smart_decoding.models.checkpoints.loading import Checkpoint

COUNT = torch.get_num_threads()
THREADS = f"{COUNT} thread{'' if COUNT == 1 else 's'}"
EXACT, ROUNDED = Way("amx", "exact"), Way("amx", "int8")
BY_VECTORS = Way("avx512-bf16", "int8")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, in a process in which no kernels are in use."""
    monkeypatch.setenv("SMART_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SMART_ISA", raising=False)
    monkeypatch.setattr(library, "_running", library._Running())
    return tmp_path / "cache"


def tiny(folder: Path, name: str = "qwen3") -> Checkpoint:
    write_gguf(folder / f"{name}.gguf", name, GGMLQuantizationType.Q8_0)
    return load_checkpoint(folder / f"{name}.gguf", quantization=None)


def by_rows(*milliseconds: float) -> dict[int, float]:
    return {rows: each / 1e3 for rows, each in zip(ROWS, milliseconds, strict=True)}


def prior() -> dict[str, Any]:
    return stored_prior(shipped_head("qwen2.5-coder-1.5b"))


# --- the prediction: forwards of the 1.5B, as they were measured on three machines ---

XEON = {EXACT: by_rows(83, 86, 91, 155), ROUNDED: by_rows(40, 50, 67, 219)}
OTHER_XEON = {EXACT: by_rows(54.1, 55.3, 58.6, 84.2), ROUNDED: by_rows(38.5, 46.8, 55.4, 129.1)}


def test_one_request_on_a_xeon_has_8_bits_whatever_its_instruction_set_is_called() -> None:
    """`smart` had 26.6 tokens per second in 8 bits there, and 17.1 exact: 1.56 times as many."""
    choice = fastest(XEON, 1, prior())
    assert choice.way == ROUNDED
    assert choice.reason == (
        f"8 bits on amx, predicted for one request on {THREADS} "
        "to be 1.51 times as fast as exact on amx"
    )


def test_a_full_queue_on_a_xeon_has_tiles() -> None:
    choice = fastest(XEON, 32, prior())
    assert choice.way == EXACT
    assert choice.reason.startswith(
        f"exact on amx, predicted for 32 requests on {THREADS} to be 1."
    )


def test_the_prediction_is_of_drafting_rounds_too() -> None:
    """One row says 1.4 times as fast, and four rows 1.25: drafts need several."""
    plain = OTHER_XEON[EXACT][1] / OTHER_XEON[ROUNDED][1]
    levels = by_rows(3.9, 4.7, 5.5, 12.9)
    found = {way: ways.predicted_rate(OTHER_XEON[way], levels, 1, prior()) for way in OTHER_XEON}
    assert plain > 1.4
    assert found[EXACT] > 1 / OTHER_XEON[EXACT][1]
    assert 1.0 < found[ROUNDED] / found[EXACT] < plain - 0.1


def test_near_ties_are_exact_and_three_ways_are_compared() -> None:
    nearly = {rows: each / 1.04 for rows, each in XEON[EXACT].items()}
    assert fastest({EXACT: XEON[EXACT], ROUNDED: nearly}, 1, prior()).way == EXACT
    better = {rows: each / 1.3 for rows, each in XEON[ROUNDED].items()}
    choice = fastest({**XEON, BY_VECTORS: better}, 1, prior())
    assert choice.way == BY_VECTORS
    assert "times as fast as exact on amx, 1.2" in choice.reason


# --- the measurement ---


@pytest.mark.parametrize("name", ["qwen3", "qwen3moe"])
def test_a_sample_stands_for_the_whole_model(name: str, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path, name)
    parts = list(sample(checkpoint))
    shapes = checkpoint.config.expected_shapes()
    whole = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
    if not checkpoint.config.tie_embeddings:
        whole -= prod(shapes["model.embed_tokens.weight"])
    assert sum(part.times * prod(part.matrix.shape) for part in parts) == pytest.approx(whole)
    assert any(part.is_expert for part in parts) == (name == "qwen3moe")


def test_a_sample_of_a_large_model_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows of some layers' matrices, which are spread over the model."""
    asked: list[tuple[str, int]] = []

    def first_rows(weights: object, name: str, rows: int) -> torch.Tensor:
        asked.append((name, rows))
        return torch.empty(rows, shapes[name][1], device="meta")

    monkeypatch.setattr(ways, "_first_rows", first_rows)
    config = replace(
        load_checkpoint("smollm2-135m", quantization=None).config,
        layers=28,
        hidden=1536,
        ffn=8960,
        vocab=151_936,
    )
    shapes = config.expected_shapes()
    parts = list(sample(type("Large", (), {"config": config, "weights": {}})))  # type: ignore[arg-type]
    assert sum(prod(part.matrix.shape) for part in parts) < 1.2 * ways.WEIGHTS
    layers = [name.split(".")[2] for name, _ in asked if "gate_proj" in name]
    assert layers == ["3", "10", "17", "24"]
    assert {rows % ways.LEAST_ROWS for name, rows in asked if "gate_proj" in name} == {0}


def test_every_way_is_timed_for_all_rows_in_turn(tmp_path: Path) -> None:
    """A clock that goes on by what a product is to take: bytes once, and arithmetic by rows."""
    checkpoint = tiny(tmp_path)
    now = 0.0
    timed: list[tuple[str, int]] = []
    multiply = ops.multiply

    def slow(x: torch.Tensor, packed: Any, out: torch.Tensor, hint: int) -> None:
        nonlocal now
        rounds = bool(packed.struct.in_bytes)
        timed.append((library.chosen(), len(x)))
        multiply(x, packed, out, hint)
        now += packed.n * packed.k * (1e-9 + len(x) * (2e-9 if rounds else 1e-9))

    mine = library.best()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "multiply", slow)
        found, _ = measure(checkpoint, [Way(mine, "exact"), Way(mine, "int8")], lambda: now)
    shapes = checkpoint.config.expected_shapes()
    whole = sum(prod(s) for name, s in shapes.items() if len(s) == 2 and "embed" not in name)
    for rows in ROWS:
        assert found[mine, "exact"][rows] == pytest.approx(whole * (1 + rows) * 1e-9)
        assert found[mine, "int8"][rows] == pytest.approx(whole * (1 + 2 * rows) * 1e-9)
    assert {rows for _, rows in timed} == set(ROWS)
    assert not library._running.final  # a trial uses nothing up


def test_a_row_of_a_mixture_reads_its_experts_only(tmp_path: Path) -> None:
    """Of some rows each awake expert has few."""
    checkpoint = tiny(tmp_path, "qwen3moe")
    mixture = checkpoint.config.experts
    assert mixture is not None
    now = 0.0

    def bytes_only(x: torch.Tensor, packed: Any, out: torch.Tensor, hint: int) -> None:
        nonlocal now
        now += packed.n * packed.k

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "multiply", bytes_only)
        found, _ = measure(checkpoint, [Way(library.best(), "exact")], lambda: now)
    sizes = {True: 0.0, False: 0.0}
    for part in sample(checkpoint):
        sizes[part.is_expert] += part.times * prod(part.matrix.shape)
    one, many = found[library.best(), "exact"][1], found[library.best(), "exact"][32]
    assert one == pytest.approx(sizes[False] + sizes[True] * mixture.per_token / mixture.count)
    assert many == pytest.approx(sizes[False] + sizes[True], rel=0.05)


# --- what is kept, and what runs ---


@pytest.fixture
def two_variants(monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The best variant and the least one are candidates, as with AMX."""
    names = library.runnable()[0], library.runnable()[-1]
    if names[0] == names[1]:
        pytest.skip("one variant runs here")
    monkeypatch.setattr(
        library,
        "candidates",
        lambda: [library.chosen()] if library._running.final else list(names),
    )
    return names


def test_the_fastest_variant_runs_and_a_later_start_measures_nothing(
    two_variants: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny(tmp_path)
    first, second = two_variants
    faked = {
        Way(first, "exact"): XEON[EXACT],
        Way(second, "exact"): XEON[EXACT],
        Way(first, "int8"): {rows: 2 * each for rows, each in XEON[ROUNDED].items()},
        Way(second, "int8"): XEON[ROUNDED],
    }
    calls = []

    def measured(checkpoint: Checkpoint, ways: list[Way]) -> Any:
        calls.append(ways)
        return faked, False

    monkeypatch.setattr(ways, "measure", measured)
    choice = choose(checkpoint, "auto", 1, {})
    assert choice.way == Way(second, "int8")
    assert library.chosen() == second
    assert calls == [list(faked)]  # the most exact ones first
    monkeypatch.setattr(library, "_running", library._Running())  # another process
    assert choose(checkpoint, "auto", 1, {}) == choice
    monkeypatch.setattr(library, "_running", library._Running())
    assert choose(checkpoint, "auto", 32, {}).way.activations == "exact"
    assert len(calls) == 1
    (reasons,) = told().values()
    threads = torch.get_num_threads()
    keys = [f"{size} with {threads} threads" for size in (1, 32)]
    assert list(reasons) == keys
    assert reasons[keys[0]] == choice.reason
    monkeypatch.setattr(library, "_running", library._Running())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    choose(checkpoint, "auto", 1, {})
    assert len(calls) == 2  # other threads have other costs
    assert list(told().popitem()[1]) == [*keys, "1 with 77 threads"]  # each says whose it is


@pytest.mark.parametrize("busy", [False, True])
def test_seconds_measured_beside_other_work_count_for_an_hour(
    busy: bool, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, calls = tiny(tmp_path), []
    counts = itertools.count(0, int(busy))  # of interruptions, one more at each look
    monkeypatch.setattr(ways, "preemptions", lambda: next(counts))

    def counted(*given: Any) -> Any:
        calls.append(given)
        return measure(*given)

    monkeypatch.setattr(ways, "measure", counted)

    def starts(size: int) -> int:
        monkeypatch.setattr(library, "_running", library._Running())
        choose(checkpoint, "auto", size, {})
        return len(calls)

    assert starts(1) == 1
    (path,) = (own_cache / "profiles").iterdir()
    late = path.stat().st_mtime - BUSY_LASTS + 60
    os.utime(path, (late, late))
    assert starts(8) == 1  # which does not give it another hour
    late -= 120
    if busy:
        assert path.stat().st_mtime == pytest.approx(late + 120)
    os.utime(path, (late, late))
    assert starts(1) == 1 + busy


def test_options_and_smart_isa_fix_it(
    two_variants: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny(tmp_path)
    faked = lambda _, ways: (dict.fromkeys(ways, XEON[EXACT]), False)  # noqa: E731
    monkeypatch.setattr(ways, "measure", faked)
    first, second = two_variants
    for activations in ("exact", "int8"):
        choice = choose(checkpoint, activations, 1, {})
        assert choice.way == Way(first, activations)
        monkeypatch.setattr(library, "_running", library._Running())
    monkeypatch.setattr(library, "candidates", lambda: [second])
    for activations in ("exact", "int8"):  # nothing is left to choose from
        assert choose(checkpoint, activations, 1, {}) == ways.ChosenWay(Way(second, activations))


def test_an_engine_answers_as_one_whose_options_name_the_choice(
    two_variants: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, on the variant that is not the best one."""
    second = two_variants[1]
    tiny(tmp_path)

    def answer(**options: Any) -> Any:
        monkeypatch.setattr(library, "_running", library._Running())
        llm = LLM(tmp_path / "qwen3.gguf", max_model_len=64, max_num_seqs=1, **options)
        assert library.chosen() == second
        params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=4, ignore_eos=True)
        (output,) = llm.generate([[5, 6, 7, 5, 6]], params, use_tqdm=False)
        return output.outputs[0].logprobs

    def faked(checkpoint: Checkpoint, ways: list[Way]) -> Any:
        slow, fast = XEON[EXACT], XEON[ROUNDED]
        return {way: fast if way == (second, "int8") else slow for way in ways}, False

    monkeypatch.setattr(ways, "measure", faked)
    auto = answer(speculative_config={"method": "ngram"})
    assert auto == answer(speculative_config=False)
    monkeypatch.setattr(library, "candidates", lambda: [second])
    monkeypatch.setenv("SMART_ISA", second)
    library.best.cache_clear()
    try:
        assert auto == answer(speculative_config=False, activations="int8")
        assert auto != answer(speculative_config=False, activations="exact")
    finally:
        library.best.cache_clear()


@pytest.mark.parametrize(
    "config", [None, False, {"method": "ngram"}, {"policy": "chain", "method": "ngram"}]
)
def test_no_option_of_drafting_matters(
    config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an answer's bits would depend on how it is drafted."""
    asked: list[Any] = []

    def chosen(checkpoint: Checkpoint, activations: str, size: int, prior: Any) -> ways.ChosenWay:
        asked.append((checkpoint.provenance, activations, size, prior))
        return ways.ChosenWay(Way(library.best(), "int8"), "as told")

    tiny(tmp_path)
    monkeypatch.setattr("smart_decoding.llm.choose", chosen)
    llm = LLM(tmp_path / "qwen3.gguf", speculative_config=config, max_num_seqs=3, max_model_len=64)
    assert [each[1:] for each in asked] == [("auto", 3, {})]
    assert llm.precision.endswith("activations in 8 bits")
    assert "activations in 8 bits" in llm.provenance["dtype"]
    assert llm.choice is not None
    assert llm.target.decoder.in_bytes


def test_models_without_quants_choose_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "plain.gguf", "qwen3")
    llm = LLM(tmp_path / "plain.gguf", speculative_config=False, max_model_len=64)
    assert llm.choice is None
