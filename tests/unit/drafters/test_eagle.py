"""The head at inference equals the head in training: same pairs, same shift, same positions, same
tree attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from smart_decoding.core.rule import NO_NODES, TreeRule
from smart_decoding.core.selection import Beam, KeepBest
from smart_decoding.core.tree import DraftTrees
from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.engine.kv import BlockTable, PagePool
from smart_decoding.engine.request import Request
from smart_decoding.engine.rows import Span, build_rows
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker
from smart_decoding.errors import ModelError
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.export import smart_config
from smart_decoding.models.heads.features import stacked
from smart_decoding.models.heads.files import load_head
from smart_decoding.training.head import Form, TrainableHead

from .tiny import outputs_of

CONFIG = ModelConfig("llama", 4, 32, 4, 2, 16, 48, 97, 10_000.0, 1e-5, 256, tie_embeddings=True)
TAPS = (1, 2, 4)
PAGES = 16
SCRATCH = 8


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        n: torch.randn(s, generator=generator) * 0.3 for n, s in CONFIG.expected_shapes().items()
    }


@pytest.fixture(scope="module")
def trained() -> TrainableHead:
    torch.manual_seed(1)
    head = TrainableHead(Form(CONFIG, len(TAPS)))
    for parameter in head.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
        parameter.data = parameter.data.bfloat16().float()
    return head


@pytest.fixture
def folder(tmp_path: Path, trained: TrainableHead) -> Path:
    import json

    ids = torch.arange(0, CONFIG.vocab, 2).int()
    save_file({**trained.exported(), "draft_ids": ids}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(smart_config(CONFIG, TAPS, len(ids))))
    return tmp_path


def check_children(head: EagleHead, trees: DraftTrees, node: int, logits: torch.Tensor) -> None:
    """The children of `node` are the four likeliest."""
    probs, at = logits.softmax(-1).topk(4)
    children = np.flatnonzero(trees.parent == node)
    assert trees.token[children].tolist() == head.draft_ids[at].tolist()
    np.testing.assert_allclose(trees.draft_prob[children], probs.detach().numpy(), atol=1e-3)


@pytest.mark.parametrize("native", [True, False])
def test_drafting_equals_the_unrolled_training_forward(
    weights: dict[str, torch.Tensor], trained: TrainableHead, folder: Path, native: bool
) -> None:
    decoder = Decoder(CONFIG, weights, torch.float32, torch.device("cpu"), PAGES, 128, native)
    head = EagleHead(load_head(folder, CONFIG), decoder, PAGES, SCRATCH, 128)
    drafter = EagleDrafter(head, PAGES, SCRATCH)
    pool = PagePool(PAGES)
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab, 40).tolist()
    params = SamplingParams(temperature=0.0)
    request = Request("r", tokens, params, 0, BlockTable(pool), StopChecker(params, lambda ids: ""))
    n = len(tokens) - 1  # positions that the target has processed
    slots = request.table.reserve(n)
    pages = np.array(request.table.pages, np.int32)
    rows, _, _ = build_rows([Span(tokens[:n], 0, slots, pages)], DraftTrees.empty(1), [True])
    aux_hidden = decoder.forward(rows, TAPS).features
    assert aux_hidden is not None
    request.table.commit(tokens, n)
    drafter.extend(request, aux_hidden[:10], 0, tokens[:10])
    drafter.extend(request, aux_hidden[10:], 10, tokens[10:n])

    rule = TreeRule(3, 4, np.array([9]), NO_NODES, Beam(2), KeepBest(9))
    trees = drafter.propose_roots([request], rule)
    first = int(np.argmax(trees.draft_prob))
    drafter.next_level([request], trees, np.array([first, (first + 1) % 4]), rule)
    second = 4 + int(np.argmax(trees.draft_prob[4:12]))
    drafter.next_level([request], trees, np.array([second]), rule)

    path = trees.path(second)
    drafted = trees.token[path].tolist()
    g = trained.features(aux_hidden[None])
    with torch.no_grad():
        expected = _chain(trained, g, weights["model.embed_tokens.weight"], tokens[1:], drafted)
    produced = outputs_of(head)
    torch.testing.assert_close(produced[0], expected[0], atol=2e-4, rtol=2e-4)
    row = 0 if path[0] == min(first, (first + 1) % 4) else 1
    torch.testing.assert_close(produced[1 + row], expected[1], atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(produced[3], expected[2], atol=2e-4, rtol=2e-4)

    logits = trained.norm(expected[2]) @ weights["model.embed_tokens.weight"][head.draft_ids].T
    check_children(head, trees, second, logits)


def test_rows_that_wait_do_not_keep_whole_rounds_alive(
    weights: dict[str, torch.Tensor], folder: Path
) -> None:
    """Rounds that read prompts have hundreds of rows; a head does not draft then, and waits with
    one or two of each."""
    decoder = Decoder(CONFIG, weights, torch.float32, torch.device("cpu"), PAGES, 128, False)
    head = EagleHead(load_head(folder, CONFIG), decoder, PAGES, SCRATCH, 128)
    drafter = EagleDrafter(head, PAGES, SCRATCH)
    params = SamplingParams(temperature=0.0)
    tokens = list(range(60))
    table = BlockTable(PagePool(PAGES))
    table.reserve(40)
    request = Request("r", tokens, params, 0, table, StopChecker(params, lambda ids: ""))
    width = len(TAPS) * CONFIG.hidden
    for as_array in (np.asarray, torch.as_tensor):
        drafter.release(request)
        for position in range(20):  # every fourth round has no prompt
            features = as_array(np.full((300, width), position, np.float32))
            table.length = position + 1
            if position % 4 == 3:
                drafter.extend_each([request], features[:1])
            else:
                drafter.extend(request, features[7:8], position, tokens[position : position + 1])
        drafter._hand_out()
        (state,) = drafter._states.values()
        single = [part for part in state.parts if not isinstance(part, tuple)]
        assert len(single) == 15
        assert sum(map(_held, single)) == 15 * 4 * width
        values = [float(stacked(part)[0, 0]) for part in state.parts]
        assert values == [float(position) for position in range(20)]


def test_a_draft_that_fails_leaves_the_features_to_the_next_one(
    weights: dict[str, torch.Tensor], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(CONFIG, weights, torch.float32, torch.device("cpu"), PAGES, 128, False)
    head = EagleHead(load_head(folder, CONFIG), decoder, PAGES, SCRATCH, 128)
    drafter = EagleDrafter(head, PAGES, SCRATCH)
    params = SamplingParams(temperature=9e-6)
    tokens = list(range(30))
    table = BlockTable(PagePool(PAGES))
    table.reserve(40)
    request = Request("r", tokens, params, 0, table, StopChecker(params, lambda ids: ""))
    features = torch.randn(29, len(TAPS) * CONFIG.hidden)
    table.length = 29
    drafter.extend(request, features, 0, tokens[:29])
    rule = TreeRule(1, 4, np.array([9]), NO_NODES, Beam(2), KeepBest(4))
    with monkeypatch.context() as patched:
        patched.setattr(head.levels, "first", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            drafter.propose_roots([request], rule)
    again = drafter.propose_roots([request], rule)
    assert drafter._states[id(request)].parts == []
    request.params = SamplingParams(temperature=0.0)  # nearly 0 is greedy, for drafts, too
    other = EagleDrafter(head, PAGES, SCRATCH)
    other.extend(request, features, 0, tokens[:29])
    assert np.array_equal(again.draft_prob, other.propose_roots([request], rule).draft_prob)


def _held(part: object) -> int:
    """Bytes that it keeps alive."""
    if isinstance(part, torch.Tensor):
        return part.untyped_storage().nbytes()
    assert isinstance(part, np.ndarray)
    return part.nbytes if part.base is None else part.base.nbytes


def _chain(
    head: TrainableHead,
    g: torch.Tensor,
    embedding: torch.Tensor,
    following: list[int],
    drafted: list[int],
) -> list[torch.Tensor]:
    """Outputs after the last true pair and after each drafted token, by growing the sequence one
    unrolled step each."""
    outs = []
    n = g.shape[1]
    chain: list[tuple[torch.Tensor, torch.Tensor]] = []
    total = n + len(drafted)
    tokens = torch.tensor([following + drafted])
    embedded = embedding[tokens]
    padded = torch.cat((g, torch.zeros(1, total - n, g.shape[2])), dim=1)
    for j in range(len(drafted) + 1):
        out = head(padded, embedded, chain)
        outs.append(out[0, n - 1 + j])
        padded = torch.nn.functional.pad(out, (0, 0, 1, 0))[:, :total]
    return outs


def test_a_head_that_does_not_fit_is_refused_by_name(folder: Path) -> None:
    from dataclasses import replace

    with pytest.raises(ModelError, match="hidden_size"):
        load_head(folder, replace(CONFIG, hidden=64))
    with pytest.raises(ModelError, match="vocab_size"):
        load_head(folder, replace(CONFIG, vocab=50))
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="corrupt"):
        load_head(folder, CONFIG)
