"""A full-size model's compute with a recording's acceptance.

Weights are random, so that any size can be timed where no checkpoint is at hand; every forward,
ranking and argmax is computed for real. What comes out of them is put aside: a drafter proposes the
recorded candidates, and the target says what the recorded answer says. The engine knows nothing of
it.

A prompt is as long as the recorded one; its first token is the answer's number, by which the target
knows whose pages it writes.

Needed by tools/gpu_check.sh and by tests/gpu.
"""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from smart_decoding.bench.blocks import Prompt
from smart_decoding.bench.options import BASELINE, OURS
from smart_decoding.core.selection import Fixed
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.engine.engine import Engine, EngineConfig
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.verification import TargetScores, verify_by_rows
from smart_decoding.errors import ModelError
from smart_decoding.models.checkpoints.loading import Checkpoint
from smart_decoding.models.checkpoints.memory import EngineLimits, Need, need_of
from smart_decoding.models.cpu.native_level import NativeLevel
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.reading import config_from_hf
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.files import HeadFiles
from smart_decoding.models.target import TorchTarget, device_of, dtype_of, pages_for
from smart_decoding.models.torch.head_levels import SteppedLevels
from smart_decoding.profiling.fit import fit_costs
from smart_decoding.profiling.measure import ForwardTimer
from smart_decoding.profiling.profile import ROUND_OVERHEAD
from smart_decoding.speculation import SCRATCH_PAGES
from smart_lab.cycles import AGAIN, measure, rows_of
from smart_lab.hardware import dimensions
from smart_lab.replay import Source
from smart_lab.summary import POOLED

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.rule import Draft, TreeRule
    from smart_decoding.core.tree import IntArray
    from smart_decoding.drafters.eagle import Pairs
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.rows import DraftInputs, Ranked, Rows
    from smart_lab.options import LabOptions
    from smart_lab.recording import Recording
    from smart_lab.trace import Trace

SCALE = 0.02  # of random weights: activations stay finite through many layers
DRAFT_VOCAB = 32000  # rows of the head's output matrix, as EAGLE-3's for Llama-3.1-8B
NODES = 80  # that a request may expand, at any batch size: EAGLE-2 expands 70
# Prompt tokens in a round: so many that a batch's requests begin together. Where they begin one by
# one they also end so, a next prompt is in most rounds, and those do not count.
CHUNK = 16_384
PROFILE_SECONDS = 10.0


@dataclass(frozen=True)
class RandomWeights(Mapping[str, torch.Tensor]):
    """Tensors by name, drawn on a device at each access, the same every time: a model of any size
    takes no disk."""

    shapes: Mapping[str, tuple[int, ...]]
    device: torch.device | str = "cpu"

    def __getitem__(self, name: str) -> torch.Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:  # norms and biases
            same = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, same, dtype=torch.bfloat16, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return drawn.normal_(0.0, SCALE, generator=generator)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class ReplayedTarget:
    """A target that computes everything and then says what the recorded answers say."""

    native = None
    snapshots = 0
    verify = verify_by_rows

    def __init__(self, inner: TorchTarget, trace: Trace) -> None:
        self._inner = inner
        answers = trace.recording.answers
        self.vocab = inner.vocab
        self.max_positions = inner.max_positions
        self.eos_token_ids = trace.eos_token_ids
        ends = np.cumsum([len(a.tokens) + 1 for a in answers])
        # behind an answer that was cut
        end_token = trace.eos_token_ids[0] if trace.eos_token_ids else 0
        tokens = np.concatenate([np.append(a.tokens, end_token) for a in answers])
        self._tokens = tokens.astype(np.int64)
        self._last = ends - 1
        self._first = np.concatenate(([0], ends[:-1]))
        self._prompt = np.array([a.prompt_length for a in answers], np.int64)
        self._answer_of: dict[int, int] = {}  # the first page of a request -> its answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def forward(self, rows: Rows, aux_layers: tuple[int, ...]) -> TargetScores:
        scores = self._inner.forward(rows, aux_layers)
        requested = (
            np.arange(len(rows))
            if rows.logit_rows is None
            else np.asarray(rows.logit_rows, np.int64)
        )
        if scores.greedy is None:
            self._inner.argmax(scores.logits, np.arange(len(requested)))
        truth = self._truth(rows, requested)
        return replace(scores, greedy=truth, draws_all=False)

    def _truth(self, rows: Rows, requested: IntArray) -> IntArray:
        """Return [requested] the recorded answer's token behind each row. A row whose own token is
        not the answer's gets one, too; it is never read."""
        pages = rows.pages[rows.block_table_start[: len(rows.query_start_loc) - 1]].tolist()
        for group, page in enumerate(pages):
            first = int(rows.query_start_loc[group])
            if rows.position[first] == 0:
                self._answer_of[page] = int(rows.token[first])
        answer = np.array([self._answer_of[page] for page in pages], np.int64)
        answer = answer[np.searchsorted(rows.query_start_loc, requested, side="right") - 1]
        output = np.maximum(rows.position[requested] + 1 - self._prompt[answer], 0)
        found: IntArray = self._tokens[np.minimum(self._first[answer] + output, self._last[answer])]
        return found


class ReplayedDrafter(EagleDrafter):
    """A head's forwards and rankings, and the recorded candidates as their outcome.

    on_device: whether a device may choose what levels expand."""

    name = "replayed"

    def __init__(
        self,
        head: EagleHead,
        recording: Recording,
        pool_pages: int,
        scratch_pages: int,
        on_device: bool = True,
    ) -> None:
        super().__init__(head, pool_pages, scratch_pages)
        self._recording = recording
        # On the kernels the head's own candidates would be taken in one call.
        self._on_device = on_device and not isinstance(head.levels, NativeLevel)

    def follows(self, rule: TreeRule) -> bool:
        """Only where a device may choose."""
        return self._on_device and super().follows(rule)

    def _draft_round(
        self, rule: TreeRule, proposed: DraftTrees, inputs: DraftInputs, states: Sequence[Pairs]
    ) -> Draft:
        """Put aside what a device has drafted; the recorded candidates grow by the same
        widths."""
        drafted = super()._draft_round(rule, proposed, inputs, states)
        return self._replayed(rule, proposed.batch, drafted)

    def _replayed(self, rule: TreeRule, batch: int, draft: Draft) -> Draft:
        fixed = Fixed.before(rule)
        assert fixed is not None
        trees = DraftTrees.empty(batch)
        self._source.expand(trees, np.full(batch, ROOT), rule.children, np.arange(batch))
        for level in range(1, len(draft.widths)):
            self._source.expand(trees, fixed.frontier(rule, trees, level), rule.children)
        return replace(draft, trees=trees, kept=rule.select(trees))

    def _waiting_rows(
        self, requests: Sequence[Request], states: Sequence[Pairs]
    ) -> tuple[Rows, IntArray]:
        """Look up the requests at the start of a round, then return its waiting rows."""
        self._look_up(requests)
        return super()._waiting_rows(requests, states)

    def _look_up(self, requests: Sequence[Request]) -> None:
        answers = [self._recording.answers[request.tokens[0]] for request in requests]
        roots = [
            a.first + min(len(r.output), a.positions) - 1
            for a, r in zip(answers, requests, strict=True)
        ]
        self._source = Source(self._recording, np.array(roots, np.int64))

    def _append(
        self, trees: DraftTrees, owner: IntArray, parents: IntArray, ranked: Ranked
    ) -> None:
        children = ranked[0].shape[1]
        self._source.expand(trees, parents, children, owner if (parents < 0).all() else None)


def longest_of(trace: Trace) -> int:
    """Return tokens of the longest recorded prompt with its answer."""
    answers = trace.recording.answers
    return max(a.prompt_length + max(len(a.tokens) + 1, a.limit) for a in answers)


def pages_of(options: LabOptions, trace: Trace, size: int) -> int:
    """KV pages of a batch size: its contestants hold requests at once."""
    together = size * options.most_contestants()
    return pages_for(together * longest_of(trace), together)


def need_on_gpu(options: LabOptions, trace: Trace, config: ModelConfig, size: int) -> Need:
    """Memory that a batch size needs at most. Besides a head, drafting has the features of what
    each contestant's requests have not drafted on yet, and of the end of each page."""
    dtype = dtype_of(options.dtype)
    longest = longest_of(trace)
    rows = max(size * NODES, CHUNK // 4)  # with logits; a chunk has hardly any
    need = need_of(
        Checkpoint(config, {}, Path(), {}),
        dtype,
        torch.device("cuda"),
        EngineLimits(0, 0, rows, longest),
    )
    shapes, aux_layers, _ = head_shapes(config, min(DRAFT_VOCAB, config.vocab))
    feature = len(aux_layers) * config.hidden
    drafting = len(options.arms) - 1
    elements = sum(map(math.prod, shapes.values())) + size * drafting * longest * feature
    of_token = drafting * feature // PAGE + 2 * config.kv_heads * config.head_dim
    return replace(
        need,
        draft=dtype.itemsize * elements,
        per_token=need.per_token + dtype.itemsize * of_token,
        tokens=PAGE * pages_of(options, trace, size),
    )


def random_checkpoint(config: ModelConfig, device: torch.device) -> Checkpoint:
    """Return a model of random weights, drawn where it runs."""
    return Checkpoint(config, RandomWeights(config.expected_shapes(), device), Path(), {})


class Replay:
    """The model, and engines over it."""

    def __init__(
        self,
        options: LabOptions,
        trace: Trace,
        config: ModelConfig,
        profile_seconds: float,
    ) -> None:
        """Draw weights of a model and a head, and time forwards. Raises TorchTarget's errors."""
        self.options = options
        self.trace = trace
        largest = max(options.batch_sizes)
        longest = longest_of(trace)
        self.pages = pages_of(options, trace, largest)
        self.slots = largest
        self.scratch = max(SCRATCH_PAGES, largest * NODES // PAGE)
        device = device_of(options.device)
        coarse = device.type == "cpu"
        # a GPU's profile goes on to 1,024 rows and long contexts, whatever is replayed
        self.length = longest + 1 if coarse else max(longest + 1, config.max_positions)
        self.target = TorchTarget(
            random_checkpoint(config, device),
            options.dtype,
            device,
            self.pages,
            self.length,
            allow_slow=options.allow_slow,
            max_num_seqs=largest * options.most_contestants(),
        )
        files = random_head(config, min(DRAFT_VOCAB, config.vocab), device)
        self.head = EagleHead(
            files, self.target.decoder, self.pages, self.scratch, self.length + 64
        )
        drafter = EagleDrafter(self.head, self.pages, self.scratch)
        profile = ForwardTimer(
            self.target, drafter, self.pages, largest, profile_seconds, coarse=coarse
        )
        self.cost = fit_costs(profile.run(), ROUND_OVERHEAD, self.target.experts)

    def runs(self, size: int, seconds: float | None) -> list[dict[str, Any]]:
        """Return the runs of one batch size, in so many seconds. Raises CapacityError where these
        do not suffice for one block of every contestant."""
        answers = self.trace.recording.answers
        usable = [i for i, a in enumerate(answers) if a.positions > 0][: self.options.limit]
        chosen = [usable[i % len(usable)] for i in range(max(len(usable), 2 * size))]
        prompts = self.prompts(chosen)
        engines = self.engines()
        with tqdm(desc=f"replayed acceptance, batch {size}", unit="cycle", leave=False) as bar:
            deadline = None if seconds is None else time.perf_counter() + seconds
            found = measure(engines, prompts, size, deadline, bar.update)
        return rows_of(found, size, self.options.seed)

    def ways(self, size: int, seconds: float) -> dict[str, Any]:
        """Return how much faster `smart` is where the device chooses what levels expand than where
        the host does, level by level. Raises CapacityError where the seconds are too few for a
        block of each."""
        if isinstance(self.head.levels, SteppedLevels):
            self.head.levels.device_chooses = True  # on a CPU, too: a rehearsal
        engines = {}
        for label, on_device in ((BASELINE, False), (OURS, True)):  # as `measure` knows them
            policy = self.trace.policy(OURS, self.cost)
            engines[label] = self._engine(policy, on_device=on_device)
            engines[label].share_pages(engines[BASELINE])
        answers = self.trace.recording.answers
        prompts = self.prompts([i % len(answers) for i in range(max(len(answers), 2 * size))])
        found = measure(engines, prompts, size, time.perf_counter() + seconds)
        runs = rows_of(found, size, self.options.seed)
        run = next(run for run in runs if run["policy"] == OURS and run["task"] == POOLED)
        names = ("batch_size", "speedup", "speedup_low", "speedup_high", "identical")
        return {name: run[name] for name in names}

    def engines(self) -> dict[str, Engine]:
        """Return every contestant by label, the baseline twice; it has no drafter."""
        engines: dict[str, Engine] = {}
        arms = {arm.label: arm for arm in self.options.arms}
        for label, arm in {**arms, AGAIN: arms[BASELINE]}.items():
            policy = self.trace.policy(arm.policy, self.cost, **arm.policy_options)
            engines[label] = self._engine(policy, drafts=arm.policy != BASELINE)
            engines[label].share_pages(engines[BASELINE])
        return engines

    def _engine(self, policy: Policy, drafts: bool = True, on_device: bool = True) -> Engine:
        recording = self.trace.recording
        drafter = ReplayedDrafter(self.head, recording, self.pages, self.scratch, on_device)
        target: Any = ReplayedTarget(self.target, self.trace)
        return Engine(
            target,
            policy,
            drafter if drafts else None,
            EngineConfig(self.pages, self.length, self.slots, CHUNK, prefix_caching=False),
            lambda skip: lambda ids: " " * len(ids),
        )

    def prompts(self, answers: Sequence[int]) -> dict[str, list[Prompt]]:
        """Return one prompt for each recorded answer; its first token says which."""
        found = []
        for index, number in enumerate(answers):
            answer = self.trace.recording.answers[number]
            filler = np.random.default_rng(number).integers(
                0, self.target.vocab, answer.prompt_length - 1
            )
            params = SamplingParams(temperature=0.0, max_tokens=answer.limit)
            found.append(Prompt(index, "recorded", [number, *filler.tolist()], params))
        return {"recorded": found}


def model_config(name: str) -> tuple[str, ModelConfig]:
    """Return a model of hardware.json, or a config.json, with its name. Raises ConfigError or
    ModelError."""
    path = Path(name)
    if path.is_file():
        try:
            return path.parent.name or path.name, config_from_hf(
                json.loads(path.read_text(encoding="utf-8"))
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} is not a readable config.json: {error}") from error
    d = dimensions(name)
    return name, ModelConfig(
        "llama",
        d.layers,
        d.hidden,
        d.heads,
        d.kv_heads,
        d.head_dim,
        d.ffn,
        d.vocab,
        rope_theta=500_000.0,
        rms_eps=1e-5,
        max_positions=8192,
    )


def head_shapes(
    config: ModelConfig, draft_vocab: int
) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...], ModelConfig]:
    """Return an EAGLE-3 head for a target: the shapes of its tensors, aux_layers, and its one
    layer, which reads [embedding ; features]; its own output rows."""
    aux_layers = tuple(
        sorted({max(1, config.layers // 8), max(1, config.layers // 2), max(1, config.layers - 2)})
    )
    layer = replace(config.of_head(), tie_embeddings=True)
    d = config.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (d, len(aux_layers) * d),
        "norm.weight": (d,),
    }
    for full, dims in layer.expected_shapes().items():
        if full.startswith("model.layers.0."):
            wide = full.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
            shapes[full.replace("model.layers.0.", "midlayer.")] = (
                (dims[0], 2 * d) if wide else dims
            )
    shapes |= {"midlayer.hidden_norm.weight": (d,), "lm_head.weight": (draft_vocab, d)}
    return shapes, aux_layers, layer


def random_head(
    config: ModelConfig, draft_vocab: int, device: torch.device | str = "cpu"
) -> HeadFiles:
    """Return a head of random weights; see `head_shapes`."""
    shapes, aux_layers, layer = head_shapes(config, draft_vocab)
    weights: dict[str, torch.Tensor] = dict(RandomWeights(shapes, device))
    return HeadFiles({}, {**weights, "draft_ids": torch.arange(draft_vocab)}, aux_layers, layer)
