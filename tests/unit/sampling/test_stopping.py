"""Where an answer ends: stop strings that straddle tokens, ids, length, and what a stream may
show."""

import random
import time
import tracemalloc
from itertools import groupby

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stop_strings import StopString
from smart_decoding.engine.stopping import LOOP, Detokenizer, StopChecker

EOS = 0


def decode(ids):
    """A byte tokenizer: token b + 1 is byte b; EOS is special and skipped."""
    return bytes(i - 1 for i in ids if i != EOS).decode("utf-8", errors="replace")


def encode(text):
    return [b + 1 for b in text.encode()]


def checker(max_tokens=None, loop_tokens=0, **options):
    options.setdefault("max_tokens", None)
    return StopChecker(SamplingParams(**options), decode, (EOS,), max_tokens, loop_tokens)


def test_what_a_detokenizer_holds_back_are_complete_characters():
    words = [b" \xe2", b"\x82", b"\xac\xf0", b"\x9f\x98", b"\x80.", b"x"]
    reader = Detokenizer(
        lambda ids: b"".join(words[i] for i in ids).decode("utf-8", errors="replace")
    )
    seen = [(reader.push([i]), reader.held) for i in range(6)]
    assert seen == [("", " "), ("", " "), ("", " €"), ("", " €"), (" €😀.", ""), ("x", "")]


@pytest.mark.parametrize("step", [1, 100, 3000])
def test_bytes_that_never_become_a_character_do_not_pile_up(step):
    decoded = []

    def count(ids):
        decoded.append(len(ids))
        return bytes(ids).decode("utf-8", errors="replace")

    reader = Detokenizer(count)
    tokens = [0x80] * 3000
    pieces = [reader.push(tokens[at : at + step]) for at in range(0, 3000, step)]
    assert "".join([*pieces, reader.flush()]) == "\ufffd" * 3000
    assert sum(decoded) < 200 * 3000


def test_an_answer_that_takes_too_long_ends_once_it_has_a_line(monkeypatch):
    clock = iter([10.0, 10.4, 10.6, 10.7])  # seconds at the ends of rounds
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    check = checker(t_max_predict_ms=500)
    for text in ("a\n", "bc", ""):
        check.push(encode(text))
        assert check.finish_reason == (None if text else "length")
    assert check.text == "a\nbc"
    clock = iter([10.0, 10.6, 10.7])
    check = checker(t_max_predict_ms=500)
    for text in ("a", "b", "c\nd"):
        assert check.push(encode(text)) == encode(text)
        assert check.finish_reason == ("length" if "d" in text else None)
    for never in (None, 0, -1):
        check = checker(t_max_predict_ms=never)
        check.push(encode("a\n"))
        assert check.finish_reason is None


def test_a_stop_string_over_several_tokens_ends_the_answer_before_it():
    check = checker(stop=["END", "###"])
    assert check.push(encode("one two E")) == encode("one two E")
    assert check.finish_reason is None
    assert check.push(encode("ND three")) == encode("ND")  # what follows the stop is dropped
    assert (check.finish_reason, check.stop_reason, check.text) == ("stop", "END", "one two ")
    assert check.token_ids == encode("one two END")
    assert check.push(encode("x")) == []


def test_a_stop_string_inside_one_token_cuts_the_token():
    words = ["I am", " here.\n\nAnd", " more"]
    check = StopChecker(
        SamplingParams(stop=["\n\n", "\n"]), lambda ids: "".join(words[i] for i in ids)
    )
    assert check.push([0, 1, 2]) == [0, 1]
    assert (check.text, check.stop_reason) == (
        "I am here.",
        "\n\n",
    )  # earliest in the text, then first in the list


def test_the_earliest_stop_string_of_a_token_wins():
    check = StopChecker(SamplingParams(stop=["Z", "b"]), lambda ids: "abcZ" * len(ids))
    check.push([1])
    assert (check.text, check.stop_reason) == ("a", "b")


def test_streaming_never_shows_a_part_of_a_stop_string():
    check = checker(stop=["<|end|>", "\nQ:"])
    shown = []
    for token in encode("a < b <|en\nQ now <|end|> tail"):
        check.push([token])
        shown.append(check.new_text())
    assert "".join(shown) == check.text == "a < b <|en\nQ now "
    assert shown[:4] == ["a", " ", "", "< "]  # '<' waits until it cannot begin a stop string
    assert check.new_text() == ""


def test_held_text_comes_out_when_the_answer_ends_otherwise():
    check = checker(stop="END", max_tokens=4)
    check.push(encode("abE"))
    assert check.new_text() == "ab"
    check.push(encode("N"))
    assert (check.finish_reason, check.new_text()) == ("length", "EN")


@pytest.mark.parametrize("seed", range(20))
def test_how_the_tokens_are_grouped_changes_nothing(seed):
    rng = random.Random(seed)
    tokens = encode("".join(rng.choice("aab<é|日") for _ in range(60)))
    options = {"stop": ["a<|", "bé日", "||a"], "stop_token_ids": [ord("~") + 1], "min_tokens": 5}
    whole = checker(max_tokens=55, **options)
    single = checker(max_tokens=55, **options)
    grouped = checker(max_tokens=55, **options)
    streamed = ""
    whole.push(tokens)
    for token in tokens:
        single.push([token])
    while tokens:
        size = rng.randint(1, 6)
        grouped.push(tokens[:size])
        before, streamed = streamed, streamed + grouped.new_text()
        assert streamed.startswith(before)
        tokens = tokens[size:]
    states = [
        (c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in (whole, single, grouped)
    ]
    assert states[0] == states[1] == states[2]
    assert streamed == grouped.text


def test_end_of_sequence_and_stop_ids():
    check = checker()
    assert check.push([*encode("hi"), EOS, *encode("x")]) == [*encode("hi"), EOS]
    assert (check.finish_reason, check.stop_reason, check.text) == ("stop", None, "hi")
    stop_id = encode("!")[0]
    check = checker(stop_token_ids=[stop_id])
    check.push(encode("hi!x"))
    assert (check.finish_reason, check.stop_reason, check.text) == ("stop", stop_id, "hi")
    assert check.token_ids == encode("hi!")
    check = checker(stop_token_ids=[stop_id], include_stop_str_in_output=True)
    check.push(encode("hi!x"))
    assert check.text == "hi!"


def test_ignore_eos_goes_on_but_obeys_stop_ids():
    check = checker(ignore_eos=True, max_tokens=4)
    check.push([EOS, EOS, *encode("abc")])
    assert (check.finish_reason, len(check.token_ids), check.text) == ("length", 4, "ab")
    check = checker(ignore_eos=True, stop_token_ids=[EOS])
    check.push([*encode("a"), EOS])
    assert (check.finish_reason, check.stop_reason) == ("stop", EOS)


def test_the_smaller_of_max_tokens_and_the_room_in_the_context_counts():
    for params_limit, room, expected in [(5, None, 5), (5, 3, 3), (None, 7, 7), (4, 9, 4)]:
        check = StopChecker(SamplingParams(max_tokens=params_limit), decode, (EOS,), room)
        assert len(check.push(encode("abcdefghij"))) == expected
        assert (check.finish_reason, check.stop_reason) == ("length", None)


def test_a_stop_in_the_last_allowed_token_is_a_stop():
    check = checker(stop="cd", max_tokens=4)
    check.push(encode("abcdef"))
    assert (check.finish_reason, check.stop_reason, check.text) == ("stop", "cd", "ab")
    check = checker(max_tokens=3)
    check.push([*encode("ab"), EOS])
    assert check.finish_reason == "stop"


def test_min_tokens_delays_every_stop():
    check = checker(min_tokens=4, stop="ab", stop_token_ids=encode("z"))
    check.push(encode("abz"))
    assert check.finish_reason is None
    check.push(encode("xaabq"))
    assert (check.text, check.stop_reason) == ("abzxa", "ab")


def byte_fallback(ids):
    """As Llama 2's, Mistral's and Gemma's decoders: a run of bytes that is no text becomes one mark
    for each byte."""
    text = ""
    for is_byte, run in groupby(ids, lambda token: token < 256):
        run = list(run)
        try:
            text += bytes(run).decode() if is_byte else "".join(map(chr, run))
        except UnicodeDecodeError:
            text += "\ufffd" * len(run)
    return text


@given(
    st.lists(st.sampled_from([0xE2, 0x82, 0xAC, 0xC3, 0xA4, 0x41, 0x391, 0x3A9]), max_size=12),
    st.lists(st.integers(1, 5), min_size=12, max_size=12),
)
@example([0xC3, 0xA4, 0x41, 0xAC], [3, 1])  # what was given out at once is of two pieces
def test_text_does_not_depend_on_how_many_tokens_a_round_brings(tokens, sizes):
    alone = Detokenizer(byte_fallback)
    text = "".join(alone.push([token]) for token in tokens) + alone.flush()
    together, told = Detokenizer(byte_fallback), ""
    rest = tokens
    for size in sizes:
        told += together.push(rest[:size])
        rest = rest[size:]
    assert told + together.flush() == text


def test_a_token_whose_text_depends_on_its_neighbour():
    """As sentencepiece: the space before the first word of whatever is decoded is dropped."""
    words = [" the", " old", " man"]
    detokenizer = Detokenizer(lambda ids: "".join(words[i] for i in ids).removeprefix(" "))
    assert [detokenizer.push([i]) for i in (0, 1, 2, 0)] == ["the", " old", " man", " the"]
    behind_a_prompt = Detokenizer(detokenizer._decode, before=[0, 1])
    assert [behind_a_prompt.push([i]) for i in (2, 0)] == [" man", " the"]
    behind_half_a_character = Detokenizer(decode, before=encode("🙂")[:2])
    assert [behind_half_a_character.push([i]) for i in encode("ab")] == ["a", "b"]


def test_a_loop_ends_the_answer_only_where_asked():
    tokens = encode("The sum is " + "ten and " * 8)
    check = checker(loop_tokens=24)
    check.push(tokens)
    assert (check.finish_reason, check.stop_reason) == ("stop", LOOP)
    assert decode(check.token_ids[: check.loop_start]) == "The sum is ten and"
    check = checker()
    assert check.push(tokens) == tokens
    assert check.loop_start is None


@given(st.lists(st.text("ab", max_size=9), max_size=9), st.text("ab", min_size=1, max_size=6))
def test_a_stop_string_is_found_wherever_pieces_end(pieces: list[str], string: str) -> None:
    """And what of it ends the text is its longest proper prefix."""
    search = StopString(string)
    matched = 0
    text = ""
    for piece in pieces:
        ends = [at for at in range(1, len(piece) + 1) if (text + piece[:at]).endswith(string)]
        matched, end = search.advance(matched, piece)
        text += piece
        assert end == min(ends, default=None)
        assert matched == max(k for k in range(len(string)) if text.endswith(string[:k]))


def test_stop_strings_that_repeat_cost_little() -> None:
    """64 of 1,000 letters took 12 ms a token: their ends were looked for in all of the text."""
    strings = ["a" * 1000 + f"{i:024d}" for i in range(64)]
    for repeated in ("a", "aaaaaaaab"):
        tokens = encode(repeated) * 1500
        check = StopChecker(SamplingParams(stop=strings, max_tokens=None), decode)
        began = time.thread_time()
        for token in tokens:
            check.push([token])
            check.new_text()
        assert (time.thread_time() - began) / len(tokens) < 2e-4


def test_the_answers_of_a_request_share_its_stop_ids() -> None:
    """Each had two sets of its own: 13 MB for 150,000 ids."""
    params = SamplingParams(temperature=1.0, n=8, stop_token_ids=[77, *range(300, 150_299)])
    tracemalloc.start()
    checks = [StopChecker(params, decode, (EOS,)) for _ in range(8)]
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100_000
    for check in checks:
        assert check.push([65, 77, 5]) == [65, 77]
        assert check.stop_reason == 77
