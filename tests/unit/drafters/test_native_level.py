"""A level as one call of the CPU kernels is the level that torch computes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from smart_decoding.core.rule import NO_NODES, TreeRule
from smart_decoding.core.selection import Beam, KeepBest
from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.engine.kv import PAGE, BlockTable, PagePool
from smart_decoding.engine.request import Request
from smart_decoding.engine.rows import LevelRequest
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker
from smart_decoding.kernels.weights import QuantizedTensor, as_tensor
from smart_decoding.models.checkpoints.rounding import RoundedWeights
from smart_decoding.models.cpu import native_level
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.files import HeadFiles
from smart_decoding.models.heads.weights import HeadWeights
from smart_decoding.profiling import measure
from smart_decoding.training.head import Form, TrainableHead

from .tiny import PAGES, SCRATCH, TARGET, VOCAB, checkpoint, mtp_layer, outputs_of

if TYPE_CHECKING:
    from smart_decoding.core.tree import DraftTrees
    from smart_decoding.engine.rows import Rows

pytestmark = pytest.mark.usefixtures("variant")
TAPS = (1, 2, 4)
WIDTH = len(TAPS) * TARGET.hidden
WITH_NORMS = replace(TARGET, qk_norm=True)


@pytest.fixture(scope="module")
def files() -> HeadFiles:
    torch.manual_seed(1)
    trained = TrainableHead(Form(TARGET, len(TAPS)))
    weights = {
        name: tensor + torch.randn_like(tensor) * 0.1 for name, tensor in trained.exported().items()
    }
    return HeadFiles(
        {}, weights | {"draft_ids": torch.arange(0, VOCAB, 2)}, TAPS, replace(TARGET, layers=1)
    )


def head_of(
    files: HeadFiles, native: bool, dtype: torch.dtype = torch.float32, quantized: bool = False
) -> EagleHead:
    weights = checkpoint(TARGET).weights
    if quantized:
        weights = RoundedWeights(weights, "int8")
    decoder = Decoder(TARGET, weights, dtype, torch.device("cpu"), PAGES, 128, native)
    head = EagleHead(files, decoder, PAGES, SCRATCH, 128)
    assert isinstance(head.levels, native_level.NativeLevel) == native
    return head


def rows_of(batch: int, total: int) -> Rows:
    """The first rows of sequences of equal length."""
    pages = np.arange(batch * -(-total // batch // PAGE), dtype=np.int32)
    return measure._rows(pages.reshape(batch, -1), batch, total, 0)


def waiting(head: EagleHead, temperatures: tuple[float, ...]) -> tuple[EagleDrafter, list[Request]]:
    """Requests of which pairs wait, some with features from rounds that were logged."""
    drafter = EagleDrafter(head, PAGES, SCRATCH)
    pool = PagePool(PAGES)
    rng = np.random.default_rng(0)
    torch_rng = torch.Generator().manual_seed(0)
    width = len(head.aux_layers) * TARGET.hidden
    requests = []
    for i, temperature in enumerate(temperatures):
        params = SamplingParams(temperature=temperature)
        tokens = rng.integers(0, VOCAB, 20 + 9 * i).tolist()
        request = Request(
            str(i), tokens, params, i, BlockTable(pool), StopChecker(params, lambda ids: "")
        )
        count = len(tokens) - 1
        request.table.reserve(count)
        request.table.commit(tokens, count)
        drafter.extend(
            request,
            torch.randn(count, width, generator=torch_rng).to(head.work_dtype),
            0,
            tokens[:count],
        )
        requests.append(request)
    for _ in range(3):  # plain rounds
        for request in requests:
            request.table.reserve(1)
            request.tokens += rng.integers(0, VOCAB, 1).tolist()
            request.table.commit(request.tokens, len(request.tokens) - 1)
        drafter.extend_each(
            requests, torch.randn(len(requests), width, generator=torch_rng).to(head.work_dtype)
        )
    return drafter, requests


def drafted(head: EagleHead, temperatures: tuple[float, ...]) -> DraftTrees:
    """Two levels below the roots of several requests."""
    drafter, requests = waiting(head, temperatures)
    limits = np.full(len(requests), 9)
    rule = TreeRule(3, 4, limits, NO_NODES, Beam(2), KeepBest(9))
    trees = drafter.propose_roots(requests, rule)
    drafter.next_level(requests, trees, np.arange(0, len(trees), 2), rule)
    drafter.next_level(requests, trees, np.flatnonzero(trees.depth == 2)[::3], rule)
    return trees


@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 0.8, 1.2)])
@pytest.mark.parametrize("tokens", [VOCAB, 40])
def test_a_layer_for_multi_token_prediction_as_torch(
    tokens: int, temperatures: tuple[float, ...]
) -> None:
    found, expected = (
        drafted(head_of(mtp_layer(WITH_NORMS, tokens), native), temperatures)
        for native in (True, False)
    )
    for column in ("owner", "parent", "token"):
        assert getattr(found, column).tolist() == getattr(expected, column).tolist()
    np.testing.assert_allclose(found.draft_prob, expected.draft_prob, atol=2e-4)
    assert len(set(found.token.tolist())) <= tokens


@pytest.mark.parametrize("tokens", [VOCAB, 40])
def test_a_layer_for_multi_token_prediction_in_8_bits(tokens: int) -> None:
    """Beside quants all of it; in bf16 the rows of the output matrix, where they are not all."""
    rows = rows_of(3, 15)
    torch.manual_seed(0)
    features = torch.randn(15, TARGET.hidden)
    request = LevelRequest(tokens, np.zeros(3))
    found = []
    for dtype, quantized in (
        (torch.float32, False),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ):
        head = head_of(mtp_layer(WITH_NORMS, tokens), True, dtype, quantized)
        ids, probs = head.levels.first(rows, [features], np.array([4, 9, 14]), request)
        found.append(np.take_along_axis(probs, np.argsort(ids, axis=1), axis=1))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=0.1)
        assert not np.array_equal(other, found[0])


@pytest.mark.parametrize("temperatures", [(0.0,), (0.0, 0.8, 1.2)])
def test_as_torch(files: HeadFiles, temperatures: tuple[float, ...]) -> None:
    found, expected = (drafted(head_of(files, native), temperatures) for native in (True, False))
    for column in ("owner", "parent", "token"):
        assert getattr(found, column).tolist() == getattr(expected, column).tolist()
    np.testing.assert_allclose(found.draft_prob, expected.draft_prob, atol=2e-4)


def test_hundreds_of_waiting_rows_are_run_in_parts(files: HeadFiles) -> None:
    rows = rows_of(6, 600)
    torch.manual_seed(0)
    features = torch.randn(600, WIDTH)
    last = np.arange(99, 600, 100)
    request = LevelRequest(4, np.zeros(6))
    ours, plain = (
        head_of(files, native).levels.first(rows, [features], last, request)
        for native in (True, False)
    )
    assert np.array_equal(ours[0], plain[0])
    np.testing.assert_allclose(ours[1], plain[1], atol=2e-4)


def test_pictures_stand_in_for_tokens(files: HeadFiles) -> None:
    torch.manual_seed(0)
    features = torch.randn(6, WIDTH)
    part = torch.randn(2, TARGET.hidden)
    found = []
    for native in (True, False):
        for mm_embeds in ([(2, part)], []):
            rows = rows_of(1, 6)
            rows.mm_embeds = mm_embeds
            found.append(
                head_of(files, native).levels.first(
                    rows, [features], np.array([5]), LevelRequest(4, np.zeros(1))
                )[1]
            )
    np.testing.assert_allclose(found[:2], found[2:], atol=2e-4)
    assert not np.allclose(found[0], found[1], atol=1e-3)


def test_a_quantised_target_has_its_head_in_8_bits(files: HeadFiles) -> None:
    rows = rows_of(3, 15)
    torch.manual_seed(0)
    features = torch.randn(15, WIDTH)
    found = []
    for quantized in (False, True):
        head = head_of(files, True, torch.bfloat16, quantized)
        head.levels.first(rows, [features], np.array([4, 9, 14]), LevelRequest(4, np.zeros(3)))
        found.append(outputs_of(head))
    scale = float(found[0].abs().max())
    np.testing.assert_allclose(found[1], found[0], atol=0.05 * scale)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize(("native", "quantized"), [(True, True), (True, False), (False, False)])
def test_a_head_in_4_bits_gives_what_its_rounded_numbers_would(
    files: HeadFiles, native: bool, quantized: bool
) -> None:
    """Up to the rounding of inputs."""
    rows = rows_of(3, 15)
    torch.manual_seed(0)
    features = torch.randn(15, WIDTH)
    rounded = RoundedWeights(files.weights, "int4")
    widened = {name: as_tensor(weight) for name, weight in rounded.items()}
    found = []
    for weights in (rounded, widened, files.weights):
        head = head_of(replace(files, weights=weights), native, torch.bfloat16, quantized)
        head.levels.first(
            rows, [features.to(head.work_dtype)], np.array([4, 9, 14]), LevelRequest(4, np.zeros(3))
        )
        found.append(outputs_of(head).float())
    near, far = ((found[0] - other).norm() / found[0].norm() for other in found[1:])
    assert near < 0.02 < 0.5 * far


def test_beside_a_target_of_quants_4_bits_stay_4_bits(files: HeadFiles) -> None:
    target = Decoder(
        TARGET,
        RoundedWeights(checkpoint(TARGET).weights, "int8"),
        *(torch.bfloat16, torch.device("cpu"), PAGES, 128, True),
    )
    rounded = RoundedWeights(files.weights, "int4")
    held = HeadWeights(replace(files, weights=rounded), target).held
    formats = [matrix.format for matrix in held.values() if isinstance(matrix, QuantizedTensor)]
    assert set(formats) == {"Q4_1"}
