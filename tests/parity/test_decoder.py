"""The decoder against transformers, and against itself: however tokens are cut into forwards, the
logits are the same.

On the CPU kernels "the same" is bitwise, in torch within rounding."""

import copy

import numpy as np
import pytest
import torch

from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.rows import build_rows
from smart_decoding.models.families.decoder import Decoder

from .checkpoints import (
    HYBRIDS,
    MODELS,
    OTHERS,
    VOCAB,
    Memory,
    config_of,
    decoder,
    plain_rows,
    random_trees,
    reference,
    span,
)

TOLERANCE = 1e-4
TOKENS = np.random.default_rng(0).integers(0, VOCAB, 150)
BOTH = [pytest.param(True, id="native"), pytest.param(False, id="torch")]
ALL = MODELS | HYBRIDS
FORMS = [
    pytest.param(True, torch.float32, id="native"),
    pytest.param(True, torch.bfloat16, id="native bf16"),
    pytest.param(False, torch.float32, id="torch"),
]
pytestmark = pytest.mark.usefixtures("variant")


def assert_same(got: torch.Tensor, expected: torch.Tensor, native: bool) -> None:
    if native:
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=0, atol=2 * TOLERANCE)


def full(model: Decoder, tokens: np.ndarray, seed: int = 1) -> torch.Tensor:
    """[tokens, vocab] in one forward."""
    return model.forward(
        plain_rows(span(tokens, 0, Memory(seed).pages(len(tokens))))
    ).logits.clone()


@pytest.mark.parametrize("native", BOTH)
@pytest.mark.parametrize("name", ALL)
def test_logits_are_those_of_transformers(name: str, native: bool) -> None:
    with torch.no_grad():
        expected = reference(name)(torch.from_numpy(TOKENS)[None]).logits[0]
    assert expected.std() > 0.5
    tolerance = max(TOLERANCE, 2 * own_error(name, expected)) if name in HYBRIDS else TOLERANCE
    torch.testing.assert_close(
        full(decoder(name, native), TOKENS), expected, rtol=0, atol=tolerance
    )


def own_error(name: str, logits: torch.Tensor) -> float:
    """How far transformers' logits in float32 are from its own in float64. Its delta rule in chunks
    errs by 1.3e-4 on some CPUs."""
    model = copy.deepcopy(reference(name))
    model.set_experts_implementation("eager")
    with torch.no_grad():
        exact = model.double()(torch.from_numpy(TOKENS)[None]).logits[0]
    return float((logits - exact).abs().max())


@pytest.mark.parametrize("name", ALL)
def test_logits_in_bf16_are_near(name: str) -> None:
    """Keys and values may lie in another order then. Where two experts are about as probable, a row
    may have the other one. Linear attention divides keys by their length, however short."""
    with torch.no_grad():
        expected = reference(name)(torch.from_numpy(TOKENS)[None]).logits[0]
    error = (full(decoder(name, True, torch.bfloat16), TOKENS) - expected).std(dim=1)
    same = error < 0.2 * expected.std()
    config = config_of(name)
    kinds = (config.experts is not None) + (config.linear is not None)
    assert same.all() or same.float().mean() > 1 - 0.05 * kinds
    bound = 0.05 * kinds if config.linear else 0.03
    assert error[same].square().mean().sqrt() < bound * expected.std()


@pytest.mark.parametrize("name", [name for name in MODELS if config_of(name).experts])
def test_the_experts_that_rows_wake_are_counted(name: str) -> None:
    experts = config_of(name).experts
    found = []
    for native in (True, False):
        model = decoder(name, native)
        for tokens in (TOKENS[:1], TOKENS[:6]):
            rows = plain_rows(span(tokens, 0, Memory(1).pages(len(tokens))))
            found.append(model.forward(rows).experts)
    assert found[0] == found[2] == experts.per_token
    assert found[1] == found[3]
    assert min(experts.per_token + 1, experts.count) <= found[1] <= experts.count


@pytest.mark.parametrize("name", OTHERS)
def test_shapes_without_kernels_run_on_torch(name: str) -> None:
    model = decoder(name, False)
    with torch.no_grad():
        expected = reference(name)(torch.from_numpy(TOKENS)[None]).logits[0]
    torch.testing.assert_close(full(model, TOKENS), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("native", "dtype"), FORMS)
@pytest.mark.parametrize("name", ALL)
def test_chunks_and_single_tokens_equal_the_full_forward(
    name: str, native: bool, dtype: torch.dtype
) -> None:
    """Two requests in one batch, cut differently: one in chunks of 37, the other token by token
    after 100."""
    model = decoder(name, native, dtype)
    expected = full(model, TOKENS)
    memory = Memory(2)
    tables = memory.pages(150), memory.pages(150)
    starts = [0, 0]
    got = ([], [])
    while min(starts) < len(TOKENS):
        sizes = [37, 100 if starts[1] == 0 else 1]
        parts = [
            (i, span(TOKENS[starts[i] :][: sizes[i]], starts[i], tables[i], state=2 * i))
            for i in (0, 1)
            if starts[i] < len(TOKENS)
        ]
        logits = model.forward(plain_rows(*(part for _, part in parts))).logits.clone()
        for (i, part), rows in zip(
            parts, logits.split([len(part.tokens) for _, part in parts]), strict=True
        ):
            got[i].append(rows)
            starts[i] += len(part.tokens)
    for rows in got:
        assert_same(torch.cat(rows), expected, native)
    # the place of a state serves another request
    again = model.forward(plain_rows(span(TOKENS[:9], 0, tables[0], state=2))).logits
    assert_same(again, expected[:9], native)


@pytest.mark.parametrize(("native", "dtype"), FORMS)
@pytest.mark.parametrize("name", ALL)
def test_tree_rows_equal_plain_rows_and_can_be_committed(
    name: str, native: bool, dtype: torch.dtype
) -> None:
    """Trees of three requests around page and chunk boundaries beside a prompt. Of two of them the
    deepest paths are moved into place and decoding goes on from there."""
    model = decoder(name, native, dtype)
    contexts = (5, 63, 126)
    trees = random_trees(3, len(contexts), 24)
    memory = Memory(4)
    tables = [memory.pages(context + 40) for context in contexts]
    model.forward(
        plain_rows(
            *(
                span(TOKENS[:c], 0, table, state=i)
                for i, (c, table) in enumerate(zip(contexts, tables, strict=True))
            )
        )
    )
    spans = [
        span(TOKENS[c : c + 1], c, table, len(trees.nodes_of(i)), i)
        for i, (c, table) in enumerate(zip(contexts, tables, strict=True))
    ]
    spans.append(span(TOKENS[:20], 0, memory.pages(20), state=3))
    rows, last, node_row = build_rows(spans, trees, [True] * 3 + [False])
    scores = model.forward(rows)
    logits = scores.logits.clone()
    paths = [trees.path(node) for node in range(len(trees))]
    assert max(map(len, paths)) >= 4

    def sequence(owner: int, path: list[int]) -> np.ndarray:
        return np.concatenate((TOKENS[: contexts[owner] + 1], trees.token[path]))

    fresh = decoder(name, native, dtype)
    for owner in range(3):
        assert_same(logits[owner], full(fresh, sequence(owner, []))[-1], native)
    for node, path in enumerate(paths):
        alone = full(fresh, sequence(int(trees.owner[node]), path))[-1]
        assert_same(logits[3 + node], alone, native)
    accepted = [max((paths[node] for node in trees.nodes_of(i)), key=len) for i in range(3)]
    accepted[1] = []
    assert (scores.advance is not None) == (name in HYBRIDS)
    if scores.advance is not None:
        scores.advance([[node_row[node] for node in path] for path in accepted])
    for owner, (table, path) in enumerate(zip(tables, accepted, strict=True)):
        source = rows.slot_mapping[[node_row[node] for node in path]]
        target = rows.slot_mapping[last[owner] + 1 : last[owner] + 1 + len(path)]
        model.kv.move(torch.from_numpy(source), torch.from_numpy(target.copy()))
        tokens = np.append(sequence(owner, path), 7)
        for more in (1, 2):  # after a forward that changed the state
            next_one = span(tokens[-1:], len(tokens) - 1, table, state=owner)
            after = model.forward(plain_rows(next_one)).logits.clone()
            assert_same(after[0], full(fresh, tokens)[-1], native)
            tokens = np.append(tokens, 7 + more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in ALL if "tied" not in name])
def test_what_is_no_number_reaches_no_row_that_does_not_see_it(
    name: str, dtype: torch.dtype
) -> None:
    """Where products are of pairs, weights of 0 times NaN were NaN: of rows before it in a prompt,
    whose page then was kept for other prompts, and of a node's younger sibling. Plain torch still
    masks by such products."""
    poison = int(np.setdiff1d(np.arange(VOCAB), TOKENS)[0])
    clean, model = decoder(name, True, dtype), decoder(name, True, dtype, poison=poison)
    for at in (1, 70, 79, 130):
        tokens = TOKENS.copy()
        tokens[at] = poison
        got = full(model, tokens)
        assert torch.equal(got[:at], full(clean, TOKENS)[:at])
        assert got[at : at + 4].isnan().all()
    context = 62
    pages = Memory(1).pages(context + 40)
    model.forward(plain_rows(span(TOKENS[:context], 0, pages, state=0)))
    trees = DraftTrees.empty(1)
    trees.append([0, 0], [poison, 7], [ROOT, ROOT], [0.5, 0.4])
    trees.append([0], [9], [0], [0.5])  # the poison's child
    root = span(TOKENS[context : context + 1], context, pages, len(trees), 0)
    rows, _, (bad, sibling, child) = build_rows([root], trees, [True])
    logits = model.forward(rows).logits
    assert torch.equal(logits[sibling], full(clean, np.append(TOKENS[: context + 1], 7))[-1])
    assert logits[[bad, child]].isnan().all()


@pytest.mark.parametrize("native", BOTH)
def test_aux_hidden_states_are_the_residual_streams_after_the_layers(native: bool) -> None:
    model = decoder("qwen3", native)
    out = model.forward(plain_rows(span(TOKENS[:20], 0, Memory(1).pages(20))), aux_layers=(1, 2))
    with torch.no_grad():
        states = (
            reference("qwen3")
            .model(torch.from_numpy(TOKENS[:20])[None], output_hidden_states=True)
            .hidden_states
        )
        final = reference("qwen3").model.norm
        torch.testing.assert_close(out.features[:, :96], states[1][0], rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(
            final(out.features[:, 96:]), states[2][0], rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("native", BOTH)
def test_only_requested_logits_are_computed(native: bool) -> None:
    model = decoder("llama", native)
    rows = plain_rows(span(TOKENS[:20], 0, Memory(1).pages(20)))
    everything = model.forward(rows).logits.clone()
    for requested in ([19, 3], []):
        rows.logit_rows = np.array(requested, np.int64)
        assert_same(model.forward(rows).logits.clone(), everything[requested], native)


@pytest.mark.parametrize("name", ["llama", "qwen3.5"])
def test_the_number_of_threads_changes_no_bit(name: str) -> None:
    before = torch.get_num_threads()
    logits = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            logits.append(full(decoder(name, True), TOKENS[:70]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])
