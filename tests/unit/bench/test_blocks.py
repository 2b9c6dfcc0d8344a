"""Blocks count only rounds at the exact batch size, and answers only up to their loops."""

import numpy as np
import pytest
import worlds

from smart_decoding.bench.blocks import rounds_of, run_block


def test_plain_decoding_of_one_request():
    clock = worlds.Clock()
    (prompt,) = worlds.prompts(count=1, tokens=20)
    block = run_block(worlds.engine(clock), [prompt], [], 1, clock)
    # 20 rounds of 1 s: the prompt's, which yields the first token, and 19 of decoding
    assert block.counts.rounds == 19
    assert block.counts.tokens == 19
    assert block.counts.seconds == pytest.approx(19.0)
    assert block.tokens_per_s == pytest.approx(1.0)
    assert (block.total_tokens, block.total_seconds) == (20, pytest.approx(20.0))
    answer = block.answers[0]
    assert answer.tokens == [(3 + 1 + i) % worlds.EOS for i in range(20)]
    assert answer.tpot == pytest.approx(1.0)


@pytest.mark.parametrize("batch", [2, 4])
def test_the_queue_is_kept_full_and_other_rounds_are_excluded(batch):
    clock = worlds.Clock()
    every = worlds.prompts(count=7)
    engine = worlds.engine(clock, batch=batch)
    sizes = []
    step = engine.step

    def spy():
        touched = step()
        record = engine.last_round
        sizes.append((record.round.batch.size, record.round.batch.prefill_rows))
        return touched

    engine.step = spy
    block = run_block(engine, every[:batch], every[batch:], batch, clock)
    assert block.counts.rounds == sum(size == batch and rows == 0 for size, rows in sizes)
    assert any(rows > 0 for _, rows in sizes[1:])  # fillers did join
    assert all(
        size == batch or rows > 0 for size, rows in sizes
    )  # never fewer than b without one joining
    assert block.tokens_per_s == pytest.approx(batch)
    assert sorted(block.answers) == list(range(batch))
    assert not engine.has_unfinished_requests
    engine.check_integrity()


def test_nothing_follows_the_requests_of_a_closed_batch():
    clock = worlds.Clock()
    every = worlds.prompts(count=3)
    engine = worlds.engine(clock, batch=4)
    block = run_block(engine, every, None, 4, clock)
    assert sorted(block.answers) == [0, 1, 2]
    assert block.total_tokens == sum(len(answer.tokens) for answer in block.answers.values())
    assert not engine.has_unfinished_requests


def test_speculation_counts_rows_and_rounds():
    clock = worlds.Clock()
    engine = worlds.drafting_engine(clock)
    (prompt,) = worlds.prompts(count=1, tokens=31)
    counts = run_block(engine, [prompt], [], 1, clock).counts
    # After the first token, 30 are left: 10 rounds of 2 levels, 2 accepted of 4 verified nodes, 3
    # tokens. In the last round(s) the trees are bounded by what may still be emitted, which is 3
    # tokens: depth 2 fits.
    assert counts.rounds == 10
    assert counts.tokens == 30
    assert counts.rows == 10 * 5
    assert counts.emitted == 30
    assert counts.off == 0
    assert counts.seconds == pytest.approx(10 * (2 * 0.25 + 1.0 + 5 * 0.1))
    assert counts.controller_seconds == pytest.approx(0.0)


def test_a_loop_is_cut_where_it_starts_and_its_rounds_do_not_count():
    clock = worlds.Clock()

    def rule(token):
        return np.where(np.asarray(token) >= 30, 21, np.asarray(token) + 1)  # 21 .. 30 for ever

    (prompt,) = worlds.prompts(count=1, tokens=200)  # ends with token 3
    block = run_block(
        worlds.engine(clock, target=worlds.RuleTarget(clock, rule=rule)), [prompt], [], 1, clock
    )
    answer = block.answers[0]
    assert answer.tokens == list(
        range(4, 31)
    )  # the first pass through the block is part of the answer
    assert block.counts.tokens == 26
    assert block.counts.seconds == pytest.approx(26.0)


def test_an_interrupted_block_leaves_the_engine_empty():
    clock = worlds.Clock()
    engine = worlds.engine(clock)
    every = worlds.prompts(count=3)

    rounds = rounds_of(engine, every[:2], every[2:], 2, clock)
    assert [next(rounds), next(rounds)] == [2, 2]
    assert engine.has_unfinished_requests
    rounds.close()
    assert not engine.has_unfinished_requests
    engine.check_integrity()
