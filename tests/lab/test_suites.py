"""The long and the edit suite are functions of their sources: right lengths, real edits, nothing
twice."""

from __future__ import annotations

import ast
import re

import pytest

from smart_decoding.measuring.tasks import load_task, ngrams
from smart_decoding.training.seeds import TEXTS
from smart_lab.suites import LONG_CHARACTERS, edits, long_contexts, solution


def code(count: int) -> list[dict[str, str]]:
    """Functions of about 450 characters."""
    return [
        {
            "prompt": f"def add_{i}(first, second):\n"
            f'    """ Adds {i} times. {"Words that fill a line. " * 15}"""\n',
            "canonical_solution": f"    total = first + {i} * second\n    return total\n",
            "entry_point": f"add_{i}",
        }
        for i in range(count)
    ]


def maths(count: int) -> list[dict[str, str]]:
    return [
        {
            "prompt": f"What is {i} + 1? {'It is not hard. ' * 20}",
            "upstream_answer": f"It is <<{i}+1={i + 1}>>\n#### {i + 1}",
        }
        for i in range(count)
    ]


def test_long_prompts_have_their_lengths_and_repeat_nothing() -> None:
    prompts = long_contexts(code(60), maths(60))
    assert len(prompts) == len(set(prompts)) == 60
    for i, prompt in enumerate(prompts):
        assert LONG_CHARACTERS[i % 5] <= len(prompt) < LONG_CHARACTERS[i % 5] + 1700
        names = re.findall(r"def (\w+)", prompt) or re.findall(r"What is (\d+)", prompt)
        assert len(names) == len(set(names)) > 5
    assert "Complete one more function" in prompts[0]
    assert prompts[0].rstrip("`\n").endswith('"""')
    assert "<<" not in prompts[2]
    assert "The answer is" in prompts[2]
    assert "####" not in prompts[2]


def test_what_is_to_be_completed_or_explained_is_there_or_not() -> None:
    prompts = long_contexts(code(60), maths(60))
    name = re.findall(r"def (\w+)", prompts[3])[-1]
    assert f"total = first + {name.removeprefix('add_')} *" not in prompts[3]  # not solved above
    explained = re.findall(r"how `(\w+)` works", prompts[1])[0]
    assert f"def {explained}(" in prompts[1]


def test_edits_hold_the_whole_function_and_one_wish() -> None:
    functions = code(8)
    prompts = edits(functions)
    wishes = [prompt.split("\n")[0] for prompt in prompts]
    wish = "Rename the parameter `first` of `add_0` to `first_value`."
    assert wishes[0] == f"{wish} Answer with the whole function."
    assert [wish.split()[0] for wish in wishes[:4]] == ["Rename", "`add_1`", "Add", "Print"]
    for task, prompt in zip(functions, prompts, strict=True):
        source = prompt.split("```python\n")[1].removesuffix("\n```")
        ast.parse(source)
        broken = "has a bug" in prompt
        assert (source != solution(task)) == broken
        assert not broken or "first - " in source


@pytest.mark.model
@pytest.mark.parametrize("task", ["long", "edit"])
def test_training_shares_nothing_with_the_suites(task: str) -> None:
    built = (text.format(topic) for text in TEXTS["tasks"] for topic in TEXTS["topics"])
    taught = set().union(*map(ngrams, [*TEXTS["openings"], *built]))
    assert not any(ngrams(prompt) & taught for prompt in load_task(task))


@pytest.mark.model
def test_the_real_suites() -> None:
    from smart_decoding.models.checkpoints.loading import load_checkpoint
    from smart_decoding.models.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(load_checkpoint("smollm2-135m").tokenizer_source)
    lengths = [len(tokenizer.encode(prompt)) for prompt in load_task("long")]
    assert len(lengths) == 60
    assert min(lengths) >= 1024
    assert max(lengths) <= 4000
    assert len(load_task("edit")) == 164
