"""`LLM`: the engine behind vLLM's interface, for one machine."""

from __future__ import annotations

import copy
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tqdm import tqdm

from smart_decoding.engine.engine import Engine, EngineConfig
from smart_decoding.engine.engine_thread import EngineThread
from smart_decoding.engine.jobs import Ask, Job
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.loops import MIN_TOKENS
from smart_decoding.engine.metrics import Metric, Record
from smart_decoding.engine.outputs import RequestOutput, completion_of, prompt_logprobs_of
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine_args import EngineArgs, require_neutral
from smart_decoding.errors import CapacityError, ConfigError, ModelError
from smart_decoding.files import expanded
from smart_decoding.kernels import library
from smart_decoding.models.checkpoints import memory
from smart_decoding.models.checkpoints.loading import (
    Checkpoint,
    load_checkpoint,
    require_quants,
    with_rounded_activations,
)
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL
from smart_decoding.models.cpu.kernel_check import (
    check_activations,
    require_kernels,
    require_served,
    why_slow,
)
from smart_decoding.models.families.mtp import mtp_shape
from smart_decoding.models.heads.widening import require_served_head
from smart_decoding.models.target import TorchTarget, device_of, dtype_of, pages_for
from smart_decoding.models.text import chat_template
from smart_decoding.models.text.grammars import Grammars
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_decoding.multimodal.messages import check_messages
from smart_decoding.multimodal.pixels import load_reader
from smart_decoding.multimodal.prompts import MediaPrompt, Prompt, PromptBuilder
from smart_decoding.multimodal.text_prompts import TextPrompts, as_list, parts_of, template_options
from smart_decoding.profiling.measure import finish
from smart_decoding.profiling.ways import ChosenWay, choose
from smart_decoding.progress import on_terminal
from smart_decoding.speculation import (
    Speculation,
    SpeculativeConfig,
    build_speculation,
    check_speculation,
    own_head,
    stored_prior,
)

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.stopping import Decode

log = logging.getLogger("smart.llm")

Message = Mapping[str, Any]
T = TypeVar("T")
LOOK = 0.05  # seconds between two looks at the progress of a measurement


class LLM:
    """A model ready to answer. Requests of all threads share rounds.

    model: built-in name, hub id, folder of safetensors, or GGUF file. draft_later: a draft model's
    weights are read by `speculation.load()`, or when it first drafts. options: see `EngineArgs`.
    Raises ModelError, DownloadError, ConfigError or CapacityError, each in one line.
    """

    def __init__(
        self, model: str | Path = DEFAULT_MODEL, *, draft_later: bool = False, **options: Any
    ) -> None:
        args = self._args = EngineArgs(model=model, **options)
        device = device_of(args.device)
        slow = args.allow_slow
        require_kernels(device, slow)
        checkpoint = _load(args, device)
        self.tokenizer = _tokenizer(args, checkpoint)
        config = checkpoint.config.with_end_token(self.tokenizer.eos_token_id)  # as vLLM does
        checkpoint = replace(checkpoint, config=config)
        # of generation_config.json, or of a GGUF file
        self.default_sampling_params = args.sampling_defaults(
            checkpoint.tokenizer_source, checkpoint.sampling
        )
        self.supports_images = checkpoint.vision is not None
        self.prompts = _prompts(args, checkpoint, self.tokenizer)
        longest = args.longest(checkpoint.config.max_positions)
        self.tokenizer.context = longest
        draft_config = _draft_config(args, checkpoint, self.tokenizer, longest)
        draft_config, pages = _require_memory(args, checkpoint, draft_config, longest)
        self.choice = in_own_thread(lambda: _choice(args, checkpoint, device))
        if self.choice is not None and self.choice.way.activations == "int8":
            checkpoint = with_rounded_activations(checkpoint)
        self._checkpoint = checkpoint
        self.provenance = dict(checkpoint.provenance)

        def loaded() -> tuple[TorchTarget, Speculation]:
            target = TorchTarget(
                checkpoint,
                args.dtype,
                device,
                pages,
                longest,
                args.enforce_eager,
                slow,
                args.max_num_seqs,
            )
            speculation = build_speculation(
                draft_config, checkpoint, target, pages, args.max_num_seqs
            )
            if not draft_later:
                speculation.load()
            if speculation.profile is not None:
                speculation.profile.probe()
            return target, speculation

        self.target, self.speculation = in_own_thread(loaded)
        self.grammars = Grammars(self.tokenizer, self.target.vocab, self.target.eos_token_ids)
        self.engine_thread = EngineThread()
        self.engine = self._engine(self.speculation, _engine_config(args, pages, longest))
        self.record = Record()
        self.engine_thread.observers.append(self.record)
        self._count = itertools.count(1)
        self._measuring = threading.Lock()

    def sharing_weights(self, speculative_config: Mapping[str, Any] | bool | None) -> LLM:
        """Return another engine, drafter and policy over the same weights and KV memory, to compare
        them in one process.

        Calls of the engines wait for each other. A caller that steps `engine` itself may step
        several in turn: each takes its own pages. Call it while no request runs, since costs are
        measured at once in the same memory. Raises ConfigError if prefix caching is on: drafters
        would find pages without their keys."""
        config = self.engine.config
        if config.prefix_caching:
            raise ConfigError("engines can share weights only with enable_prefix_caching=False")
        draft_config = check_speculation(
            speculative_config,
            self._checkpoint,
            self.tokenizer,
            config.max_model_len,
            self._args.trust_pickle,
        )
        other = copy.copy(self)
        other.speculation = build_speculation(
            draft_config, self._checkpoint, self.target, config.pages, config.max_num_seqs
        )
        other.speculation.load()
        other.engine = self._engine(other.speculation, config, self.engine)
        other.take_profile()
        return other

    def keep_panels(self) -> None:
        """Store the packed weights, unless they are stored already, so that later starts can map
        them (models/cpu/panels.py)."""
        self.target.decoder.keep_panels()

    def take_profile(self) -> None:
        """Measure and store the costs of forwards now, in some seconds, unless they are known.
        Without this call they are measured bit by bit while the engine is idle.

        The measurement waits for a lone request, and is slow beside several. Raises ConfigError in
        the engine thread."""
        thread = self.engine_thread
        thread.require_another()
        profile = self.speculation.profile
        if profile is None:
            return
        with self._measuring:  # one of several callers shows the progress
            if profile.known or not thread.still_does(profile):
                return

            def measure() -> None:
                in_own_thread(lambda: finish(profile.step, lambda: profile.share))

            if thread.work_before(measure):
                return

            def waits() -> bool:
                time.sleep(LOOK)
                return thread.still_does(profile)

            profile.requested = True
            try:
                finish(waits, lambda: profile.share)
            finally:
                profile.requested = False

    def _engine(
        self, speculation: Speculation, config: EngineConfig, page_owner: Engine | None = None
    ) -> Engine:
        """page_owner: the engine whose pages are shared."""
        engine = Engine(
            self.target,
            speculation.policy,
            speculation.drafter,
            config,
            self._decoder,
            constrain=self.grammars,
        )
        if page_owner is not None:
            engine.share_pages(page_owner)
        if speculation.profile is not None:
            speculation.profile.pool = engine.pool
            self.engine_thread.add_idle_work(speculation.profile)
        return engine

    @property
    def policy(self) -> Policy:
        """The policy that sizes drafts."""
        return self.speculation.policy

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_step: Callable[[list[Request]], None] | None = None,
        use_tqdm: bool = True,
        lora_request: object = None,
        priority: object = None,
    ) -> list[RequestOutput]:
        """Answer all prompts, in order. `on_step` is called after every round, in the engine's
        thread, with the requests of these prompts that got tokens. use_tqdm: show progress where
        standard error is a terminal. lora_request, priority: vLLM's; other values than None are
        refused.

        A prompt is a text, token ids, what `chat_prompt` returns, or vLLM's {"prompt": …,
        "multi_modal_data": …}. Without sampling_params: `get_default_sampling_params`."""
        require_neutral({"lora_request": lora_request, "priority": priority})
        many = as_list(prompts)
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = _params_for(many, sampling_params)
        ready = [self.text_prompt(prompt) for prompt in many]
        job = self.job(ready, params)
        job.on_round = on_step
        with tqdm(total=job.size, desc="answers", disable=not (use_tqdm and on_terminal())) as bar:
            for _ in self.engine_thread.results(job):  # nothing comes before an answer's end
                bar.update()
        return self._outputs(job, ready)

    def _outputs(self, job: Job, prompts: Sequence[MediaPrompt]) -> list[RequestOutput]:
        requests = iter(job.answers)
        groups = [[next(requests) for _ in range(ask.params.n)] for ask in job.asks]
        text_of = self.tokenizer.token_text
        return [
            RequestOutput(
                f"{job.id}-{place}",
                prompt.text,
                list(prompt.tokens),
                [completion_of(request, text_of) for request in group],
                prompt_logprobs=prompt_logprobs_of(group[0], text_of),
            )
            for place, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        ]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        lora_request: object = None,
        chat_template_content_format: str = "auto",
        continue_final_message: bool = False,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or several, through a chat template. template: as to
        `chat_prompt`; the others as to `generate`, or vLLM's with one value only."""
        require_neutral(
            {
                "lora_request": lora_request,
                "chat_template_content_format": chat_template_content_format,
                "continue_final_message": continue_final_message,
            }
        )
        is_list = isinstance(messages, list | tuple)
        is_one = not is_list or (messages and isinstance(messages[0], Mapping))
        many = [messages] if is_one else messages
        prompts = [self.chat_prompt(each, **template) for each in many]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """Return the parameters of requests without their own: the values of the model's
        generation_config.json or GGUF file, else vLLM's defaults."""
        return SamplingParams(**self.default_sampling_params)

    @property
    def precision(self) -> str:
        """The types of weights and activations, in words, such as Q4_K_M."""
        return self._checkpoint.precision

    def get_tokenizer(self) -> Tokenizer:
        """Return the model's tokenizer."""
        return self.tokenizer

    def get_metrics(self) -> list[Metric]:
        """Return counts of all work so far, in vLLM's names; see engine/metrics.py."""
        return self.record.metrics(self.engine)

    def chat_prompt(
        self,
        messages: Sequence[Message],
        chat_template: str | Path | None = None,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> MediaPrompt:
        """Return the prompt of one conversation. Contents may be lists of OpenAI's parts, and hold
        images if the model reads them.

        chat_template: instead of the model's. tools: described by the template; answers are not
        forced to call them. chat_template_kwargs: further variables of the template.
        Raises ConfigError for values that cannot be used."""
        check_messages(messages)
        own = self.tokenizer.template
        options = template_options(
            own, chat_template, add_generation_prompt, tools, chat_template_kwargs
        )
        conversation, pictures = self.prompts.split(messages)
        tokens, text = self.prompts.conversations.tokens(conversation, **options)
        return self.prompts.plan(tokens, pictures, text).decoded()

    def text_prompt(self, prompt: Prompt) -> MediaPrompt:
        """Return a prompt as `generate` takes it, in tokens. Raises ConfigError; placeholders need
        their pictures."""
        if isinstance(prompt, MediaPrompt):
            return prompt
        return self.prompts.prompt(*parts_of(prompt))

    def stream(
        self, prompt: Prompt | Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Iterator[str]:
        """Return the text of one answer to a prompt or a conversation, piece by piece as rounds
        yield it."""
        if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
            prompt = self.chat_prompt(prompt)  # type: ignore[arg-type]
        default = {"max_tokens": 256, **self.default_sampling_params}
        params = sampling_params or SamplingParams(**default)
        job = self.job([self.text_prompt(prompt)], [params], stream=True)  # type: ignore[arg-type]
        if params.n != 1:
            raise ConfigError(f"stream gives one answer, so n={params.n} cannot be: use generate")
        with closing(self.engine_thread.results(job)) as chunks:
            for chunk in chunks:
                if chunk.text:
                    yield chunk.text

    def job(
        self, prompts: Sequence[MediaPrompt], params: Sequence[SamplingParams], stream: bool = False
    ) -> Job:
        """Return the job of some prompts for `engine_thread`. Grammars are compiled here, in the
        caller's thread. Raises ConfigError for a wrong grammar and for other types than
        SamplingParams."""
        for each in params:
            if not isinstance(each, SamplingParams):
                raise ConfigError(
                    f"sampling_params={each!r:.200} is not allowed: give SamplingParams, such as "
                    "SamplingParams(max_tokens=16)"
                )
            each.check_logprobs(self._args.max_logprobs)
        encode = partial(self.tokenizer.encode, add_special_tokens=False)
        checked = {id(each): each.checked(encode) for each in params}
        structures = [each.structured_outputs for each in checked.values()]
        grammars = [self.grammars.compiled(each) for each in structures if each is not None]
        pairs = zip(prompts, params, strict=True)
        asks = [Ask(prompt.tokens, checked[id(each)], prompt.media) for prompt, each in pairs]
        return Job(str(next(self._count)), self.engine, asks, stream, grammars=grammars)

    def _decoder(self, skip_special_tokens: bool) -> Decode:
        return lambda ids: self.tokenizer.decode(ids, skip_special_tokens)


def _params_for(prompts: Sequence[Prompt], params: Any) -> list[SamplingParams]:
    """Return one item for each prompt, of any type: `LLM.job` checks them."""
    if not isinstance(params, list | tuple):
        return [params] * len(prompts)
    if len(params) != len(prompts):
        raise ConfigError(
            f"{len(prompts)} prompts but {len(params)} sampling_params: give one, or one for each"
        )
    return list(params)


def in_own_thread(work: Callable[[], T]) -> T:
    """Return what `work` returns, or raises, in a thread that is gone afterwards.

    OpenMP keeps a team of threads for every thread that has computed. With more threads than CPUs
    OpenMP's threads sleep as soon as they are idle, so the engine's team is to be the only one.
    Ctrl-C does not wait for `work`: it goes on until it is done, or the process ends."""
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, name="smart-load", daemon=True)
    thread.start()
    thread.join()
    return result.result()


def _load(args: EngineArgs, device: torch.device) -> Checkpoint:
    quantization = quantization_of(args, device)
    holds = quantization != "off" and _holds_quants(args, device)
    check_activations(args.activations, holds)
    checkpoint = load_checkpoint(
        args.model,
        lambda config: require_served(config, device, args.allow_slow),
        quantization,
        args.trust_pickle,
    )
    if why_slow(checkpoint.config, device) is not None:  # plain torch expands quants
        check_activations(args.activations, holds_quants=False)
    if args.activations == "int8":
        require_quants(checkpoint)
    return checkpoint


def _choice(args: EngineArgs, checkpoint: Checkpoint, device: torch.device) -> ChosenWay | None:
    """Return how quants are multiplied; None where there are none on the CPU kernels."""
    on_kernels = _holds_quants(args, device) and why_slow(checkpoint.config, device) is None
    if not (on_kernels and checkpoint.has_quants):
        return None
    prior = stored_prior(own_head(checkpoint))
    return choose(checkpoint, args.activations, args.max_num_seqs, prior)


def _holds_quants(args: EngineArgs, device: torch.device) -> bool:
    """Return whether quants stay as stored: only the CPU kernels multiply them, in bfloat16."""
    in_bf16 = dtype_of(args.dtype) == torch.bfloat16
    return in_bf16 and device.type == "cpu" and library.unavailable() is None


def _draft_config(
    args: EngineArgs, checkpoint: Checkpoint, tokenizer: Tokenizer, longest: int
) -> SpeculativeConfig:
    """Return what is to draft, before it is loaded. Raises ConfigError for a drafter that does not
    fit or is not served."""
    draft_config = check_speculation(
        args.speculative_config, checkpoint, tokenizer, longest, args.trust_pickle
    )
    device = device_of(args.device)
    on_kernels = device.type == "cpu" and why_slow(checkpoint.config, device) is None
    if draft_config.files is not None and on_kernels:
        require_served_head(draft_config.files.shape)
    shape = None
    if draft_config.draft is not None:
        shape = draft_config.draft.config
    elif draft_config.mtp_tokens:
        shape = mtp_shape(checkpoint.config)
    if shape is not None:
        what = "the MTP layer" if draft_config.mtp_tokens else "the draft model"
        try:
            require_served(shape, device, args.allow_slow, what)
        except ModelError as error:
            if not draft_config.by_default:
                raise
            log.warning("n-grams draft: %s", error)
            return draft_config.without_draft()
    return draft_config


def _engine_config(args: EngineArgs, pages: int, longest: int) -> EngineConfig:
    return EngineConfig(
        pages,
        longest,
        args.max_num_seqs,
        args.chunk(device_of(args.device).type == "cuda"),
        args.enable_prefix_caching,
        args.seed,
        MIN_TOKENS if args.stop_at_loops is True else args.stop_at_loops,
    )


def _tokenizer(args: EngineArgs, checkpoint: Checkpoint) -> Tokenizer:
    other = args.tokenizer not in (None, args.model)
    folder = expanded(str(args.tokenizer)) if other else checkpoint.tokenizer_source
    tokenizer = Tokenizer.load(folder)
    template = args.template()
    if template is not None:
        tokenizer.template = template
        tokenizer.template_given = True
    if tokenizer.template is None:
        hint = chat_template.hint(checkpoint.tokenizer_source, checkpoint.provenance["model"])
        if hint:
            log.warning(hint)
    return tokenizer


def _require_memory(
    args: EngineArgs, checkpoint: Checkpoint, draft_config: SpeculativeConfig, longest: int
) -> tuple[SpeculativeConfig, int]:
    """Return what drafts, and the number of KV pages. A draft model or head that was chosen by
    default is dropped where memory is short.

    Raises CapacityError for a model that does not fit, before its weights are read."""
    device = device_of(args.device)
    dtype = dtype_of(args.dtype)
    on_cuda = device.type == "cuda"
    seqs = args.max_num_seqs
    rows = max(args.chunk(on_cuda), 8 * seqs)
    tokens = args.kv_tokens(longest)
    limits = memory.EngineLimits(tokens, pages_for(tokens, seqs), rows, longest, seqs)
    need = memory.need_of(
        checkpoint,
        dtype,
        device,
        limits,
        draft_config.draft,
        draft_config.files,
        draft_config.mtp_tokens,
    )
    if on_cuda and args.kv_cache_tokens is None:
        room = memory.tokens_beside(need, args.gpu_memory_utilization, device)
        tokens = max(longest, room - pages_for(0, seqs) * PAGE)
        limits = replace(limits, kv_tokens=tokens, pages=pages_for(tokens, seqs))
        need = replace(need, tokens=limits.pages * PAGE)
    try:
        memory.require_memory(checkpoint, need, limits, device)
    except CapacityError:
        if not draft_config.by_default:
            raise
        log.warning("there is no memory for the draft model or head, so n-grams draft")
        return _require_memory(args, checkpoint, draft_config.without_draft(), longest)
    return draft_config, limits.pages


def quantization_of(args: EngineArgs, device: torch.device) -> str | None:
    """Return how weights are loaded: quants as they are stored only where the CPU kernels multiply
    them."""
    return args.quantization if args.quantization or _holds_quants(args, device) else "off"


def _prompts(
    args: EngineArgs, checkpoint: Checkpoint, tokenizer: Tokenizer
) -> PromptBuilder | TextPrompts:
    if checkpoint.vision is None:
        return TextPrompts(tokenizer, checkpoint.provenance["model"])
    vision = checkpoint.vision
    reader = load_reader(vision.folder, vision.config, args.mm_processor_kwargs)
    return PromptBuilder(tokenizer, reader, args.media_limits(), bool(checkpoint.config.mrope))
