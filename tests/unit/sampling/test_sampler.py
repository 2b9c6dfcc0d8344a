"""The sampler: the distributions of transformers' processors in vLLM's order, exact survivors, and
tokens that depend on their own row alone."""

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from smart_decoding.engine.history import SampleSpec, TokenHistory
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ModelError
from smart_decoding.models.sampling import drawing
from smart_decoding.models.sampling.drawing import NEAR
from smart_decoding.models.sampling.noise import gumbel, noise_key
from smart_decoding.models.sampling.processors import min_p_distance, process
from smart_decoding.models.sampling.sampler import Sampler, _first_maximum

VOCAB = 50
SEEDS = 2000
PROMPT = [3, 7, 7, 12, 30]
OUTPUT = [5, 7, 5, 5, 41]
EOS = 9

CASES = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "tiny_top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.15},
    "repetition": {"repetition_penalty": 1.4},
    "reward": {"repetition_penalty": 0.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.8},
    "bias": {"logit_bias": {2: 2.5, 5: -100.0, 7: 1.0}},
    "min_tokens": {"min_tokens": 8, "stop_token_ids": [4]},
    "top_k_top_p": {"top_k": 12, "top_p": 0.8, "temperature": 1.3},
    "top_p_min_p": {"top_p": 0.9, "min_p": 0.1, "temperature": 1.3},
    "small_top_p_min_p": {"top_p": 0.5, "min_p": 0.3},
    "all": {
        "logit_bias": {2: 2.5, 9: 3.0, 7: 1.0},
        "min_tokens": 8,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "temperature": 1.2,
        "top_k": 25,
        "top_p": 0.9,
        "min_p": 0.03,
    },
}


class PresenceAndFrequency(LogitsProcessor):
    """transformers has none; as documented by OpenAI and vLLM: logits -= frequency * count +
    presence * (count > 0)."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params

    def __call__(self, input_ids, scores):
        counts = torch.bincount(torch.tensor(OUTPUT), minlength=VOCAB).float()
        return (
            scores
            - self.params.frequency_penalty * counts
            - self.params.presence_penalty * (counts > 0).float()
        )


def transformers_scores(logits: torch.Tensor, params: SamplingParams) -> np.ndarray:
    """[vocab] transformers' processed scores of one row, -inf where cut."""
    chain = LogitsProcessorList()
    if params.logit_bias:
        chain.append(
            SequenceBiasLogitsProcessor({(t,): float(b) for t, b in params.logit_bias.items()})
        )
    if params.min_tokens:
        eos = [EOS, *params.stop_ids]
        chain.append(
            MinNewTokensLengthLogitsProcessor(len(PROMPT), params.min_tokens, eos, device="cpu")
        )
    if params.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(PresenceAndFrequency(params))
    if not params.greedy:
        chain.append(TemperatureLogitsWarper(float(params.temperature)))
        chain.extend([MinPLogitsWarper(params.min_p)] if params.min_p > 0 else [])
        chain.extend([TopKLogitsWarper(params.top_k)] if params.top_k > 0 else [])
        chain.extend([TopPLogitsWarper(params.top_p)] if params.top_p < 1 else [])
    return chain(torch.tensor([PROMPT + OUTPUT]), logits[None])[0].numpy()


def draw(row: np.ndarray, spec: SampleSpec) -> int:
    return drawing.draw([row], [spec])[0]


def spec_for(params: SamplingParams, **changes: object) -> SampleSpec:
    given = {
        "position": len(OUTPUT),
        "history": TokenHistory(PROMPT, OUTPUT),
        "eos_ids": (EOS,),
        **changes,
    }
    return SampleSpec(params, **given)


def small_logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 1.5


def chi_square(tokens: np.ndarray, probs: np.ndarray) -> float:
    """p-value that `tokens` were drawn from `probs`; rare tokens are pooled, impossible ones must
    not occur."""
    counts = np.bincount(tokens, minlength=len(probs))
    assert not counts[probs == 0].any()
    expected = probs / probs.sum() * len(tokens)
    common = expected >= 5
    observed = [*counts[common], counts[~common].sum()]
    wanted = [*expected[common], expected[~common].sum()]
    if wanted[-1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    return 1.0 if len(wanted) == 1 else float(stats.chisquare(observed, wanted).pvalue)


def softmax(scores: np.ndarray) -> np.ndarray:
    return torch.softmax(torch.from_numpy(scores).double(), -1).numpy()


@pytest.mark.parametrize("name", CASES)
def test_draws_follow_transformers_processed_softmax(name):
    params = SamplingParams(**CASES[name])
    logits = small_logits()
    row = logits.numpy()
    history = TokenHistory(PROMPT, OUTPUT)
    tokens = [draw(row, spec_for(params, seed=seed, history=history)) for seed in range(SEEDS)]
    assert chi_square(np.array(tokens), softmax(transformers_scores(logits, params))) > 1e-3


def test_the_chi_square_would_notice_another_distribution():
    row = small_logits().numpy()
    tokens = np.array(
        [draw(row, SampleSpec(SamplingParams(temperature=0.8), seed=seed)) for seed in range(SEEDS)]
    )
    assert chi_square(tokens, softmax(row / 0.8)) > 1e-3 > chi_square(tokens, softmax(row / 0.9))


def survivors(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Ascending ids of the tokens of processed logits [vocab] that top-k, top-p and min-p leave:
    what is drawn from, which drawing itself never lists."""
    top = int(row.argmax())
    min_p_floor = float(row[top]) + min_p_distance(params)
    floor = max(drawing.top_k_floor(row, params.top_k), min_p_floor)
    nucleus = drawing._Nucleus(row, top, floor, params)
    tokens = np.flatnonzero(row >= floor)
    return np.array([token for token in tokens if int(token) in nucleus], np.int64)


@pytest.mark.parametrize("name", CASES)
def test_survivors_are_exactly_transformers(name):
    params = SamplingParams(**CASES[name])
    for seed in range(40):
        logits = small_logits(seed)
        processed = process(logits.numpy(), spec_for(params))
        kept = np.flatnonzero(np.isfinite(transformers_scores(logits, params)))
        alive = survivors(processed, params)
        assert alive[np.isfinite(processed[alive])].tolist() == kept.tolist()


@pytest.mark.parametrize("name", CASES)
def test_processed_greedy_is_transformers_argmax(name):
    params = SamplingParams(**{**CASES[name], "temperature": 0})
    for seed in range(40):
        logits = small_logits(seed)
        expected = int(transformers_scores(logits, params).argmax())
        assert Sampler().sample(logits[None], [0], [spec_for(params)]).tolist() == [expected]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 300, "top_p": 0.97}]
)
def test_the_bounds_never_change_the_winner(options):
    """Against noise for every survivor, on rows so flat that far tokens win."""
    params = SamplingParams(**options)
    rng = np.random.default_rng(1)
    far_wins = 0
    for seed in range(40):
        row = (rng.standard_normal(1000) * params.temperature * (0.5 + seed % 4)).astype(np.float32)
        row[:3] += 6 * params.temperature
        alive = survivors(row, params)
        noise = gumbel(noise_key(seed, 0, 4), alive)
        perturbed = (row[alive] / np.float32(params.temperature)).astype(np.float64) + noise
        token = draw(row, SampleSpec(params, seed=seed, position=4))
        assert token == alive[perturbed.argmax()]
        far_wins += row[token] < row.max() - NEAR * params.temperature
    assert far_wins > 3


def mixed_specs(rows: int) -> list[SampleSpec]:
    options = list(CASES.values())
    options += [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0.8},
    ]
    return [
        spec_for(SamplingParams(**options[i % len(options)]), seed=i, sample=i % 3)
        for i in range(rows)
    ]


def test_a_row_alone_equals_the_row_within_any_batch():
    logits = torch.randn(38, 3000, generator=torch.Generator().manual_seed(2)) * 3
    sampler = Sampler()
    specs = mixed_specs(38)
    together = sampler.sample(logits, range(38), specs)
    alone = [int(sampler.sample(logits[i : i + 1], [0], [specs[i]])[0]) for i in range(38)]
    backwards = sampler.sample(logits, range(37, -1, -1), specs[::-1])[::-1]
    assert together.tolist() == alone == backwards.tolist()
    some = [4, 31, 7]
    assert (
        sampler.sample(logits, some, [specs[i] for i in some]).tolist() == together[some].tolist()
    )


def test_logits_are_left_unchanged():
    logits = torch.randn(19, VOCAB)
    before = logits.clone()
    Sampler().sample(logits, range(19), mixed_specs(19))
    assert torch.equal(logits, before)


def test_tokens_on_the_path_count_as_if_committed():
    history = TokenHistory(PROMPT, OUTPUT)
    path = (41, 20, 20, 3)
    tokens, counts = history.at(path)
    committed = TokenHistory(PROMPT, OUTPUT)
    committed.append(path)
    expected = dict(zip(*(a.tolist() for a in committed.at()), strict=True))
    assert dict(zip(tokens.tolist(), counts.tolist(), strict=True)) == expected
    assert expected == {3: 1, 7: 1, 12: 0, 30: 0, 5: 3, 41: 2, 20: 2}
    params = SamplingParams(repetition_penalty=1.5, frequency_penalty=0.7, presence_penalty=0.2)
    row = small_logits().numpy()
    on_tree = process(row, spec_for(params, history=history, path=path))
    assert (on_tree == process(row, spec_for(params, history=committed))).all()
    assert dict(zip(*(a.tolist() for a in history.at()), strict=True)) == {
        3: 0,
        7: 1,
        12: 0,
        30: 0,
        5: 3,
        41: 1,
    }


def test_history_grows_beyond_its_first_arrays():
    history = TokenHistory(range(100), [*range(50, 250)] * 2)
    tokens, counts = history.at()
    assert tokens.tolist() == list(range(250))
    assert counts.tolist() == [0] * 50 + [2] * 200


def test_min_tokens_masks_until_enough_tokens_are_out():
    row = np.zeros(VOCAB, np.float32)
    row[EOS], row[4] = 5, 4
    params = SamplingParams(temperature=0, min_tokens=3, stop_token_ids=[4])
    assert [draw(row, SampleSpec(params, position=t, eos_ids=(EOS,))) for t in (0, 2, 3)] == [
        0,
        0,
        EOS,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_go_to_the_lowest_id(dtype):
    logits = torch.zeros(3, 5000, dtype=dtype)
    logits[0, [4000, 17, 2500]] = 3.0
    logits[1, [4999, 4998]] = 1.0
    assert Sampler().argmax(logits).tolist() == [17, 4998, 0]
    assert _first_maximum(logits).tolist() == [17, 4998, 0]  # where there are no kernels
    specs = [SampleSpec(SamplingParams(temperature=0, logit_bias={1: -1.0}))] * 3
    assert Sampler().sample(logits, [0, 1, 2], specs).tolist() == [17, 4998, 0]


def test_tokens_that_tie_at_the_boundary_all_survive():
    row = np.array([3, 1, 1, 2, 1, 0], np.float32)
    assert survivors(row, SamplingParams(top_k=3)).tolist() == [0, 1, 2, 3, 4]
    assert survivors(row, SamplingParams(top_p=0.87)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("change", [{"position": 1}, {"sample": 1}, {"seed": 1}])
def test_draws_of_two_rows_are_independent_and_differ(change):
    row = np.array([1, 0.5, 0, -0.5], np.float32)
    params = SamplingParams()
    first = np.array([draw(row, SampleSpec(params, seed=2 * seed)) for seed in range(SEEDS)])
    moved = [
        {"seed": 2 * seed, **{k: v + (2 * seed if k == "seed" else 0) for k, v in change.items()}}
        for seed in range(SEEDS)
    ]
    second = np.array([draw(row, SampleSpec(params, **m)) for m in moved])
    joint = np.outer(softmax(row), softmax(row)).ravel()
    assert chi_square(first * 4 + second, joint) > 1e-3


def test_the_same_key_draws_the_same_token():
    row = small_logits().numpy()
    spec = SampleSpec(SamplingParams(), seed=9, sample=2, position=77)
    assert len({draw(row, spec) for _ in range(5)}) == 1


def test_nearby_logits_draw_the_same_token_almost_always():
    """Common noise: two forwards that differ by rounding agree, which no per-call generator
    gives."""
    row = small_logits().numpy()
    rng = np.random.default_rng(0)
    shaken = row + rng.uniform(-1e-5, 1e-5, VOCAB).astype(np.float32)
    specs = [SampleSpec(SamplingParams(temperature=0.8), seed=seed) for seed in range(500)]
    assert sum(draw(row, s) != draw(shaken, s) for s in specs) <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.8}])
def test_logits_without_a_finite_maximum_are_refused(bad, options):
    logits = torch.zeros(2, VOCAB)
    logits[1] = bad
    with pytest.raises(ModelError, match="NaN or infinite"):
        Sampler().sample(logits, [0, 1], [SampleSpec(SamplingParams(**options))] * 2)


def test_specs_must_match_the_rows():
    with pytest.raises(ValueError, match="2 rows but 1 specs"):
        Sampler().sample(torch.zeros(2, VOCAB), [0, 1], [SampleSpec(SamplingParams())])


@pytest.mark.parametrize("k", [0, 1, 5, -1])
def test_logprobs_are_the_raw_log_softmax(k):
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(5)) * 3
    tokens = [7, int(logits[3].argmax())]
    expected = torch.log_softmax(logits.double(), -1)
    for row, found in zip([1, 3], Sampler().logprobs(logits, [1, 3], tokens, k), strict=True):
        values, ids = expected[row].sort(descending=True)
        size = VOCAB if k < 0 else k
        assert found.top_tokens.tolist() == ids[:size].tolist()
        np.testing.assert_allclose(found.top_logprobs, values[:size], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.logprob, expected[row, found.token], rtol=1e-6)
        assert found.rank == 1 + ids.tolist().index(found.token)
    assert found.rank == 1
