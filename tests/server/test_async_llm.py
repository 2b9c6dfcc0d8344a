"""`AsyncLLM`: vLLM's asynchronous interface on the engine thread."""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from serving import save_tiny_model, slow, wait_for

from smart_decoding import AsyncLLM, RequestOutputKind, SamplingParams
from smart_decoding.engine.jobs import Chunk, Delivery
from smart_decoding.errors import CapacityError, ConfigError, EngineStoppedError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from smart_decoding.engine.jobs import Job
    from smart_decoding.llm import LLM

LONG = SamplingParams(temperature=0, max_tokens=800, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AsyncLLM]:
    made = AsyncLLM(
        save_tiny_model(tmp_path_factory.mktemp("async")),
        speculative_config={"method": "ngram", "policy": "static"},
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=4,
    )
    slow(made.llm, 0.001)
    yield made
    made.shutdown()


async def collect(engine: AsyncLLM, prompt: Any, params: SamplingParams, name: str) -> list[Any]:
    return [output async for output in engine.generate(prompt, params, name)]


def idle(llm: LLM) -> bool:
    free = wait_for(lambda: not llm.engine.has_unfinished_requests, 1.0)
    llm.engine.check_integrity()
    return free and llm.engine.pool.used == 0


@pytest.mark.parametrize("n", [1, 3])
def test_outputs_grow_to_what_generate_gives(engine: AsyncLLM, plain: LLM, n: int) -> None:
    params = SamplingParams(temperature=0.7, seed=3, max_tokens=50, n=n, logprobs=2)
    outputs = asyncio.run(collect(engine, "abcabc", params, "one"))
    (expected,) = plain.generate("abcabc", params)
    last = outputs[-1]
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len(outputs) > 3
    assert (last.request_id, last.prompt) == ("one", "abcabc")
    assert last.prompt_token_ids == expected.prompt_token_ids
    for index, (mine, whole) in enumerate(zip(last.outputs, expected.outputs, strict=True)):
        assert (mine.index, mine.text, mine.token_ids) == (index, whole.text, whole.token_ids)
        assert mine.finish_reason == whole.finish_reason
        assert mine.logprobs == whole.logprobs
        for before, after in itertools.pairwise(outputs):
            longer = after.outputs[index]
            assert longer.text.startswith(before.outputs[index].text)
            assert longer.token_ids[: len(before.outputs[index].token_ids)] == (
                before.outputs[index].token_ids
            )
            assert len(longer.logprobs or []) == len(longer.token_ids)
    assert idle(engine.llm)


@pytest.mark.parametrize("n", [1, 3])
def test_other_kinds_of_output_tell_the_same(engine: AsyncLLM, n: int) -> None:
    given: dict[str, Any] = {"temperature": 0.7, "seed": 3, "max_tokens": 40, "n": n}
    given |= {"logprobs": 2, "prompt_logprobs": 1}
    found = {
        kind: asyncio.run(collect(engine, "abcabc", SamplingParams(**given, output_kind=kind), "1"))
        for kind in RequestOutputKind
    }
    (whole,) = found[RequestOutputKind.FINAL_ONLY]
    last = found[RequestOutputKind.CUMULATIVE][-1]
    news = found[RequestOutputKind.DELTA]
    assert whole.finished
    assert len(news) > 3
    assert [output.finished for output in news] == [False] * (len(news) - 1) + [True]
    assert [each.prompt_logprobs for each in news if each.prompt_logprobs] == [
        whole.prompt_logprobs
    ]
    for index, expected in enumerate(last.outputs):
        mine = [each for output in news for each in output.outputs if each.index == index]
        assert "".join(each.text for each in mine) == expected.text == whole.outputs[index].text
        assert [token for each in mine for token in each.token_ids] == expected.token_ids
        assert [entry for each in mine for entry in each.logprobs or ()] == expected.logprobs
        assert [each.finish_reason for each in mine if each.finish_reason] == [
            expected.finish_reason
        ]
    with pytest.raises(ConfigError, match="output_kind=2 is not allowed"):
        SamplingParams(output_kind=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE])
def test_where_nothing_is_new_nothing_comes(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch, kind: RequestOutputKind
) -> None:
    submit = engine.llm.engine_thread.submit

    def with_empty_chunks(job: Job) -> None:
        deliver = job.deliver

        def more(deliveries: list[Delivery]) -> None:
            deliver([Delivery(job, Chunk(0, "", [], None, None))])
            deliver(deliveries)

        job.deliver = more
        submit(job)

    monkeypatch.setattr(engine.llm.engine_thread, "submit", with_empty_chunks)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, output_kind=kind)
    outputs = asyncio.run(collect(engine, "abc", params, "one"))
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    given = [len(output.outputs[0].token_ids) for output in outputs]
    if kind is RequestOutputKind.DELTA:
        given = list(itertools.accumulate(given))
    assert given == sorted(set(given))
    assert given[-1] == 20


def test_many_at_once(engine: AsyncLLM, plain: LLM) -> None:
    prompts = [f"{i} and {i * i}" for i in range(40)]
    params = SamplingParams(temperature=0, max_tokens=20)

    async def everyone() -> list[list[Any]]:
        jobs = (collect(engine, prompt, params, prompt) for prompt in prompts)
        return await asyncio.gather(*jobs)

    texts = [outputs[-1].outputs[0].text for outputs in asyncio.run(everyone())]
    assert texts == [each.outputs[0].text for each in plain.generate(prompts, params)]
    assert idle(engine.llm)


def test_abort_frees_the_pages_and_is_told(engine: AsyncLLM) -> None:
    async def aborted() -> list[Any]:
        outputs = []
        async for output in engine.generate("abc", LONG, "gone"):
            outputs.append(output)
            if len(outputs) == 3:
                await engine.abort("gone")
                await engine.abort("gone")
                assert await asyncio.to_thread(idle, engine.llm)
        return outputs

    outputs = asyncio.run(aborted())
    assert outputs[-1].finished
    assert outputs[-1].outputs[0].finish_reason == "abort"
    assert 0 < len(outputs[-1].outputs[0].token_ids) < 100
    asyncio.run(engine.abort("gone"))
    asyncio.run(engine.abort("never heard of"))


def test_abort_before_the_prompt_is_tokenised(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_prompt = engine.llm.text_prompt

    def aborting(prompt: Any) -> Any:
        asyncio.run(engine.abort("early"))
        return text_prompt(prompt)

    monkeypatch.setattr(engine.llm, "text_prompt", aborting)
    (only,) = asyncio.run(collect(engine, "abc", LONG, "early"))
    assert only.finished
    assert only.outputs[0].finish_reason == "abort"
    assert only.outputs[0].token_ids == []


def test_a_cancelled_task_aborts_its_request_and_no_other(engine: AsyncLLM, plain: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

    async def both() -> list[Any]:
        gone = asyncio.create_task(collect(engine, "abc", LONG, "gone"))
        stays = asyncio.create_task(collect(engine, "xyz", params, "stays"))
        while len(engine.llm.engine.scheduler.running) < 2:
            await asyncio.sleep(0.001)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        async for _ in engine.generate("abc", LONG, "left"):
            break  # the loop's own clean-up ends it
        return await stays

    outputs = asyncio.run(both())
    (expected,) = plain.generate("xyz", params)
    assert outputs[-1].outputs[0].token_ids == expected.outputs[0].token_ids
    assert engine._jobs == {}
    assert idle(engine.llm)


def test_wrong_requests_raise_and_leave_nothing(engine: AsyncLLM) -> None:
    with pytest.raises(CapacityError):
        asyncio.run(collect(engine, [1] * 2000, LONG, "long"))
    with pytest.raises(ConfigError):
        asyncio.run(collect(engine, {"no": 1}, LONG, "wrong"))

    async def twice() -> None:
        async for _ in engine.generate("abc", LONG, "same"):
            await collect(engine, "abc", LONG, "same")

    with pytest.raises(ConfigError, match="'same' is already running"):
        asyncio.run(twice())
    assert engine._jobs == {}
    assert idle(engine.llm)


def test_threads_and_tasks_share_a_model(engine: AsyncLLM, plain: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)

    async def mixed() -> list[Any]:
        threads = [asyncio.to_thread(engine.llm.generate, "abc", params) for _ in range(4)]
        tasks = [collect(engine, "abc", params, str(i)) for i in range(4)]
        return await asyncio.gather(*threads, *tasks)

    (expected,) = plain.generate("abc", params)
    assert [found[-1].outputs[0].text for found in asyncio.run(mixed())] == (
        [expected.outputs[0].text] * 8
    )


def test_shutdown_is_told_to_who_runs(tmp_path: Any) -> None:
    engine = AsyncLLM(
        save_tiny_model(tmp_path), speculative_config=False, dtype="float32", max_model_len=1024
    )
    slow(engine.llm, 0.002)

    async def ended() -> None:
        async for _ in engine.generate("abc", LONG, "running"):
            engine.shutdown()

    with pytest.raises(EngineStoppedError, match="shut down"):
        asyncio.run(ended())
    with pytest.raises(EngineStoppedError, match="shut down"):
        asyncio.run(collect(engine, "abc", LONG, "late"))
