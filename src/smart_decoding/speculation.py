"""From `speculative_config` to a drafter and a policy with measured costs."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.core.calibration import Calibration, Forecast
from smart_decoding.core.policies import (
    check_policy,
    is_policy,
    make_policy,
    policy_options,
    user_options,
)
from smart_decoding.drafters import METHODS, check_draft, check_plain
from smart_decoding.drafters.levels import LevelDrafter
from smart_decoding.drafters.ngram import NgramDrafter
from smart_decoding.drafters.union import UnionDrafter
from smart_decoding.errors import ConfigError, ModelError, SmartError
from smart_decoding.files import expanded, read_json, reading
from smart_decoding.models.checkpoints.hub_repository import PATIENT, config_file, listing
from smart_decoding.models.checkpoints.loading import Checkpoint, load_checkpoint
from smart_decoding.models.checkpoints.memory import parameters
from smart_decoding.models.checkpoints.registry import (
    Source,
    cached_siblings,
    copied_name,
    hub_id_of,
    is_gguf,
    known_names,
    shipped_head,
)
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.mtp import check_mtp
from smart_decoding.models.heads.files import (
    VISUAL_POSITIONS,
    HeadFiles,
    head_path,
    is_for,
    is_head,
    load_head,
)
from smart_decoding.models.heads.mtp import mtp_files
from smart_decoding.models.heads.vocabulary import USUAL_SIZE
from smart_decoding.models.text.tokenizer import Tokenizer

# Draft models are imported where they are built: most are never used.
if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.engine.protocols import Drafter
    from smart_decoding.models.draft_model import DraftModel
    from smart_decoding.models.heads.eagle_head import EagleHead
    from smart_decoding.models.target import TorchTarget
    from smart_decoding.profiling.profile import Profile

log = logging.getLogger("smart.speculation")

# vLLM's names of methods that are others here: files say what a head is, or an MTP layer.
SAME_METHOD = {"eagle3": "eagle", "qwen3_next_mtp": "mtp", "qwen3_5_mtp": "mtp"}
# vLLM's names, and ours. The method and the policy say what a number of tokens limits.
IN_VLLM = {"prompt_lookup_min": "min_n", "prompt_lookup_max": "max_n"}
DEEPEST = {
    "ngram": "max_depth",
    "smart": "max_levels",
    "paper": "max_levels",
    "eagle2": "depth",
    "chain": "length",
}
# Parameters of a target below which rounds are so short that n-grams in addition to a head take a
# visible part of them.
SMALL = 500_000_000
SCRATCH_PAGES = 256  # head keys of one round's tree nodes: 4096
DRAFT_SCRATCH_PAGES = 64  # a draft model's keys are larger: 1024 nodes


@dataclass(slots=True)
class Speculation:
    """A drafter and the policy that sizes its trees; without a drafter the engine decodes plainly.

    profile: the costs, or None if the policy needs none. model: the EAGLE head or draft model in
    use. description: for people. load: reads a draft model's weights now, instead of at the first
    draft."""

    policy: Policy
    drafter: Drafter | None
    profile: Profile | None = None
    model: EagleHead | DraftModel | None = None
    description: str = "none"
    load: Callable[[], None] = lambda: None

    @property
    def cost(self) -> CostModel | None:
        """The measured costs, or a guess until they are measured."""
        return None if self.profile is None else self.profile.cost


def level_drafter(drafter: Drafter | None) -> LevelDrafter[Any] | None:
    """Return the drafter itself if it drafts with a model, or the part of it that does."""
    model = drafter.model if isinstance(drafter, UnionDrafter) else drafter
    return model if isinstance(model, LevelDrafter) else None


def own_head(target: Checkpoint) -> Path | None:
    """Return the head that comes with this package for a built-in model, or for an apparent copy of
    one with the same sizes: called so, or a GGUF file that says so. The log says which, and why."""
    model = target.provenance["model"]
    known = {copied_name(model): "its name"}
    if target.named is not None:
        known.setdefault(target.named, "its file")
    for name, said_by in known.items():
        folder = shipped_head(name)
        if folder is None:
            continue
        fits = is_for(folder, target.config)
        if name != model:
            how = "and its sizes: its head may draft" if fits else "but not by its sizes: no head"
            log.info("%s is %s by %s, %s", model, name, said_by, how)
        if fits:
            return folder
    return None


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """A `speculative_config`, checked as far as possible before any weights are loaded.

    options: of the drafter and the policy; draft: the draft model; head: the folder or GGUF file of
    the draft head; files: what is in it; by_default: what drafts was not requested, but found in
    the cache, in this package or in the model's files; mtp_tokens: how many tokens the model's MTP
    layer proposes, 0: it does not draft."""

    method: str
    policy: str | Policy
    options: Mapping[str, Any]
    draft: Checkpoint | None = None
    head: Path | None = None
    files: HeadFiles | None = None
    by_default: bool = False
    mtp_tokens: int = 0

    def without_draft(self) -> SpeculativeConfig:
        """Return the same with n-grams instead of the draft model, head or MTP layer."""
        left = {name: each for name, each in self.options.items() if name != "visual_positions"}
        return SpeculativeConfig("ngram", self.policy, left)


def check_speculation(
    config: Mapping[str, Any] | bool | None,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    max_model_len: int,
    trust_pickle: bool = False,
) -> SpeculativeConfig:
    """Check a `speculative_config`. checkpoint, tokenizer: the target's; trust_pickle: a draft
    model or head may be a pickle.

    Raises ConfigError for another type and for an unknown method, policy or option. Raises
    ModelError for a head that is missing or does not fit, a missing MTP layer, and a draft model
    with another vocabulary or too short a context."""
    if config is False:
        return SpeculativeConfig("none", "off", {})
    options = _as_dict(config)
    shipped = own_head(checkpoint)
    if _means_own_head(options, shipped):
        options["model"] = shipped
    own_mtp = "model" not in options and _has_mtp(checkpoint, options)
    named = _is_model(options.get("model"), ask=options.get("method", "union") == "union")
    has_head = not named if "model" in options else shipped is not None or own_mtp
    draft = None
    chooses = _chooses(options)
    if not (shipped or own_mtp or chooses) and checkpoint.vision is None:
        draft = _sibling(checkpoint, tokenizer, max_model_len, trust_pickle)
    by_default = not chooses and (draft is not None or shipped is not None or own_mtp)
    alone = ("mtp" if own_mtp else "eagle") if has_head else None
    default = _default_method(options, checkpoint, alone, bool(draft or named))
    method = options.pop("method", default)
    policy = options.pop("policy", "off" if method == "none" else "smart")
    _name_depth(options, method, policy)
    _check_method(method, policy)
    theirs = _method_options(method, has_head, named or draft is not None, own_mtp)
    _check_known(method, policy, options, theirs)
    check_policy(
        policy, {option: value for option, value in options.items() if option not in theirs}
    )
    NgramDrafter(**{name: options[name] for name in _parameters(NgramDrafter) if name in options})
    if method == "draft_model" or (method == "union" and named):
        draft = _draft_checkpoint(
            options.pop("model", None), checkpoint, tokenizer, max_model_len, trust_pickle
        )
    head = None if draft else _head(method, options.pop("model", None) or shipped, trust_pickle)
    drafts = own_mtp and head is None and method in ("mtp", "union")
    tokens = _mtp_tokens(options, checkpoint.config) if drafts else 0
    files = None if head is None else load_head(head, checkpoint.config, trust_pickle)
    return SpeculativeConfig(method, policy, options, draft, head, files, by_default, tokens)


def _has_mtp(checkpoint: Checkpoint, options: Mapping[str, Any]) -> bool:
    """Return whether the model has an MTP layer that can draft. Raises ModelError if it has none
    and the options name the method."""
    shapes = {} if checkpoint.mtp is None else checkpoint.mtp.shapes
    try:
        check_mtp(checkpoint.config, shapes, checkpoint.provenance["model"])
    except ModelError as error:
        if options.get("method") == "mtp":
            raise
        if shapes and not _chooses(options):
            log.warning("%s", error)
        return False
    return True


def _mtp_tokens(options: dict[str, Any], model: ModelConfig) -> int:
    """Take the option `draft_vocab_size` out, and return how many tokens an MTP layer proposes.
    Raises ConfigError for a number that it cannot have."""
    count = options.pop("draft_vocab_size", min(model.vocab, USUAL_SIZE))
    if type(count) is not int or not 1 <= count <= model.vocab:
        raise ConfigError(
            f"draft_vocab_size={count!r} is not allowed: it must be 1 to {model.vocab}"
        )
    return count


def _default_method(
    options: Mapping[str, Any], target: Checkpoint, head: str | None, has_draft: bool
) -> str:
    """Return the method of a config without one: n-grams where only their options are present or
    nothing is to be drafted; else a head or draft model, with n-grams unless the target is small.
    head: the method of a head alone; None: there is no head."""
    of_heads = ("model", "visual_positions", "draft_vocab_size")
    if options.keys().isdisjoint(of_heads) and _chooses(options):
        return "ngram"
    if head and parameters(target.config) < SMALL:
        return head
    return "union" if head or has_draft else "ngram"


def _means_own_head(options: Mapping[str, Any], shipped: Path | None) -> bool:
    """Return whether the option `model` names the head that comes with the target."""
    name = str(options.get("model"))
    takes_head = options.get("method", "eagle") in ("eagle", "union")
    return takes_head and shipped is not None and shipped_head(name) == shipped


def _check_method(method: str, policy: str | Policy) -> None:
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    check_plain(method, policy)


def _name_depth(options: dict[str, Any], method: str, policy: str | Policy) -> None:
    """Put vLLM's number of tokens under the name that it has here."""
    of_policy = DEEPEST.get(policy) if isinstance(policy, str) else None
    deepest = DEEPEST.get(method, of_policy)
    if deepest is None or "num_speculative_tokens" not in options:
        return
    if deepest in options:
        raise ConfigError(f"num_speculative_tokens and {deepest} are the same: give one")
    options[deepest] = options.pop("num_speculative_tokens")


def _check_known(
    method: str, policy: str | Policy, options: Mapping[str, Any], theirs: Sequence[str]
) -> None:
    """Raise ConfigError for an unknown option. theirs: the method's options."""
    ours = user_options(policy) if method != "none" else []
    name = policy if isinstance(policy, str) else policy.name
    unknown = [option for option in options if option not in (*ours, *theirs)]
    called = ["'model' (--draft)" if option == "model" else repr(option) for option in unknown]
    if unknown and method == "none":
        raise ConfigError(f"method 'none' takes no options, but {called[0]} is given")
    if unknown:
        raise ConfigError(
            f"unknown option {called[0]}; "
            f"method {method!r} takes: {', '.join(theirs) or 'none'}; "
            f"policy {name!r}: {', '.join(ours) or 'none'}"
        )


def _head(method: str, name: str | Path | None, trust_pickle: bool) -> Path | None:
    if method == "eagle" and name is None:
        raise ConfigError(
            "method 'eagle' needs a head: give model=FOLDER, or --draft FOLDER "
            "(smart train makes one), or use ngram"
        )
    if name is None or method not in ("eagle", "union"):
        return None
    return head_path(name, trust_pickle)


def _is_model(name: Any, ask: bool) -> bool:
    """Return whether this is a draft model, and no head: a built-in one, a GGUF file that is none
    of a head, or a folder or hub id with a vocabulary of its own.

    ask: the hub, else a hub id is taken for a head's. Raises DownloadError."""
    if name is None:
        return False
    path = expanded(name)
    if path.is_dir():
        return _has_words([each.name for each in path.glob("*")]) and not is_head(path)
    if is_gguf(path):
        return not is_head(path)
    if str(name).partition("@")[0] in known_names():
        return True
    hub_id = hub_id_of(str(name))
    if hub_id is None:  # perhaps a file that is missing
        return path.suffix == ".gguf"
    return ask and _is_model_on_hub(hub_id[1], bool(hub_id[2]))


def _is_model_on_hub(repository: str, of_gguf: bool) -> bool:
    """Return the same of a repository; of_gguf: a GGUF file of it is named."""
    held = listing(repository, PATIENT)
    if of_gguf or held.has_only_ggufs:
        return not held.is_of_head
    here = held.nothing_to_fetch(["config.json"])
    folder = config_file(repository, local_only=here)
    return _has_words(held.files) and not is_head(folder)


def _has_words(files: Sequence[str]) -> bool:
    """Return whether the files include a vocabulary; a few heads have one, too."""
    return any(name.startswith("tokenizer") or name == "vocab.json" for name in files)


def _chooses(options: Mapping[str, Any]) -> bool:
    """Return whether the config itself chooses what drafts: by a name, by options of n-grams, or by
    the policy off."""
    chosen = options.keys() & {"model", "method", *_parameters(NgramDrafter)}
    return bool(chosen) or options.get("policy") == "off"


def _sibling(
    target: Checkpoint, tokenizer: Tokenizer, max_model_len: int, trust_pickle: bool
) -> Checkpoint | None:
    name = target.provenance["model"]
    try:
        siblings = cached_siblings(name, target.config.vocab, parameters(target.config))
    except (SmartError, OSError, TypeError, ValueError) as error:  # of damaged files of another
        log.info("the cache is not searched for a smaller model: %s", error)
        return None
    for found in siblings:
        sibling = found.name if isinstance(found, Source) else found
        try:
            draft = _draft_checkpoint(found, target, tokenizer, max_model_len, trust_pickle)
        except SmartError as error:
            log.info("%s cannot draft for %s: %s", sibling, name, error)
        else:
            log.info("%s drafts for %s: it is in the cache", sibling, name)
            return draft
    return None


def _as_dict(config: Mapping[str, Any] | bool | None) -> dict[str, Any]:
    if isinstance(config, Mapping):
        for name in ("method", "policy", "model"):
            value = config.get(name)
            fits = name == "policy" and is_policy(value)
            if not (fits or isinstance(value, str | Path | None)):
                what = "a policy or its name" if name == "policy" else "a name"
                raise ConfigError(f"{name} must be {what}, not {value!r}")
        options = {IN_VLLM.get(name, name): value for name, value in config.items()}
        if "method" in options:
            options["method"] = SAME_METHOD.get(options["method"], options["method"])
        return options
    if config is not None and not isinstance(config, bool):
        raise ConfigError(
            f"speculative_config={config!r} is not allowed: give a dict such as "
            "{'method': 'ngram', 'policy': 'smart'}, False (plain decoding) or None (the default)"
        )
    return {}


def _method_options(method: str, has_head: bool, has_draft: bool, own_mtp: bool) -> list[str]:
    head = ["model", "visual_positions"]
    mtp = ["draft_vocab_size"]
    ngram = _parameters(NgramDrafter)
    model = ["model"] if has_draft else mtp if own_mtp else head if has_head else []
    known = {
        "eagle": head,
        "mtp": mtp,
        "draft_model": ["model"],
        "ngram": ngram,
        "union": [*model, *ngram],
    }
    return known.get(method, [])


def _parameters(cls: Callable[..., Drafter]) -> list[str]:
    return list(inspect.signature(cls).parameters)


def build_speculation(
    config: SpeculativeConfig,
    checkpoint: Checkpoint,
    target: TorchTarget,
    pages: int,
    max_num_seqs: int,
) -> Speculation:
    """Build the drafter and the policy of a config. Costs without a stored profile are guessed.

    Raises ConfigError for bad values of a drafter's options, ModelError for a head that does not
    fit."""
    if config.method == "none":
        return Speculation(make_policy("off"), None)
    builder = _Builder(checkpoint, target, pages, max_num_seqs, config)
    drafter = builder.drafter()
    needs_costs = "cost" in policy_options(config.policy)
    profile = builder.profile(drafter) if needs_costs else None
    offered = {
        **stored_prior(config.head),
        "cost": profile and profile.cost,
        "eos_token_ids": target.eos_token_ids,
    }
    policy = make_policy(config.policy, offered, **builder.left)
    if profile is not None:
        profile.taken = partial(setattr, policy, "cost")
    return Speculation(
        policy,
        drafter,
        profile,
        builder.model,
        builder.description,
        builder.load,
    )


def _draft_checkpoint(
    name: Any, target: Checkpoint, tokenizer: Tokenizer, max_model_len: int, trust_pickle: bool
) -> Checkpoint:
    check_draft("draft_model", name, "model=NAME")
    draft = load_checkpoint(
        name,
        check=ModelConfig.check_draft,
        quantization=target.quantization,
        trust_pickle=trust_pickle,
    )
    called = draft.provenance["model"]
    if not tokenizer.is_that_of(draft.tokenizer_source):
        shared = min(draft.config.vocab, target.config.vocab)
        check_same_vocabulary(Tokenizer.load(draft.tokenizer_source), tokenizer, called, shared)
    try:
        draft.config.check_context(max_model_len)
    except ModelError as error:
        raise ModelError(
            f"the draft model {called} cannot follow the target: {error} (max_model_len)"
        ) from error
    return draft


def check_same_vocabulary(draft: Tokenizer, target: Tokenizer, name: str, shared: int) -> None:
    """Raise ModelError unless both know the same tokens under the same ids, as
    `vocabulary_difference` says."""
    ours, theirs = (each.backend.get_vocab(with_added_tokens=True) for each in (target, draft))
    require_same_vocabulary(name, vocabulary_difference(ours, theirs, shared))


def require_same_vocabulary(name: str, difference: str | None) -> None:
    """Raise ModelError for a draft model whose tokens differ from the target's."""
    if difference:
        raise ModelError(
            f"the draft model {name} has another vocabulary than the target ({difference}): "
            "take one of its family"
        )


def vocabulary_difference(
    ours: Mapping[str, int], theirs: Mapping[str, int], shared: int
) -> str | None:
    """Return how a draft model's tokens differ from the target's, each as text to id; None if they
    are the same. shared: how many ids both models have; ids beyond are never proposed."""
    ours, theirs = (
        {text: id_ for text, id_ in each.items() if id_ < shared} for each in (ours, theirs)
    )
    if ours == theirs:
        return None
    if len(ours) != len(theirs):
        return f"{len(theirs)} tokens instead of {len(ours)}"
    token = min((t for t in ours if theirs.get(t) != ours[t]), key=lambda t: ours[t])
    return f"token {token!r} is {theirs.get(token, 'missing')} instead of {ours[token]}"


def stored_prior(folder: Path | None) -> dict[str, Any]:
    """Policy options from the prior that came with a head in `folder`, if any."""
    path = folder / "prior.json" if folder else None
    if path is None or not path.is_file():
        return {}
    with reading(path):
        state = read_json(path)
        calibration = Calibration.from_state(state["calibration"])
        return {
            "calibration": calibration,
            "forecast": Forecast.from_state(state["forecast"], calibration),
        }


@dataclass
class _Builder:
    """Makes the parts of one Speculation. Each takes its options out of `left`; the policy gets the
    others."""

    checkpoint: Checkpoint
    target: TorchTarget
    pages: int
    seqs: int
    config: SpeculativeConfig
    model: EagleHead | DraftModel | None = None
    load: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.left = dict(self.config.options)
        self.description = self.config.method

    def drafter(self) -> Drafter:
        parts: list[Drafter] = []
        if self.config.draft is not None:
            parts.append(self._draft_model())
        elif self.config.head is not None and self.config.files is not None:
            parts.append(self._eagle(self.config.head, self.config.files))
        elif self.config.mtp_tokens:
            parts.append(self._mtp())
        if self.config.method in ("ngram", "union"):
            parts.append(ngram_drafter(self.left))
        if len(parts) == 1:
            return parts[0]
        self.description = f"union of {self.description} + {parts[1].name}"
        return UnionDrafter(parts)

    def profile(self, drafter: Drafter) -> Profile:
        """Return the costs of forwards of the target and of the drafter's model on this machine."""
        from smart_decoding.profiling.profile import Profile

        levels = level_drafter(drafter)
        head = str(self.model and self.model.shape)
        weights = self.checkpoint.provenance
        return Profile(self.target, levels, self.pages, self.seqs, head, weights)

    def _eagle(self, path: Path, files: HeadFiles) -> Drafter:
        self.description = f"eagle head {path.name}"
        return self._head(self._with_images(files, path))

    def _mtp(self) -> Drafter:
        tensors = self.checkpoint.mtp
        assert tensors is not None
        self.description = "the model's MTP layer"
        return self._head(mtp_files(self.checkpoint.config, tensors, self.config.mtp_tokens))

    def _head(self, files: HeadFiles) -> Drafter:
        from smart_decoding.drafters.eagle import EagleDrafter
        from smart_decoding.models.heads.eagle_head import EagleHead
        from smart_decoding.models.target import fitting_memory

        positions = self.target.max_positions + 64
        with fitting_memory("draft head", self.pages):
            self.model = EagleHead(files, self.target.decoder, self.pages, SCRATCH_PAGES, positions)
        return EagleDrafter(self.model, self.pages, SCRATCH_PAGES)

    def _with_images(self, files: HeadFiles, path: Path) -> HeadFiles:
        """Apply the option `visual_positions`, for heads whose files do not say it: MSD's are laid
        out as EAGLE-1's."""
        how = self.left.pop("visual_positions", None)
        if how not in (None, *VISUAL_POSITIONS):
            raise ConfigError(
                f"visual_positions={how!r} is not supported: use {' or '.join(VISUAL_POSITIONS)}"
            )
        if how is not None:
            files = replace(files, supports_images=how == "decoupled")
        known = how or files.config.get("visual_positions")
        if self.checkpoint.vision is not None and known is None:
            log.warning("the head %s reads no images: it drafts from the text behind them", path)
        return files

    def _draft_model(self) -> Drafter:
        from smart_decoding.drafters.draft_model import DraftModelDrafter
        from smart_decoding.models.draft_model import DraftModel

        draft = self.config.draft
        assert draft is not None
        if self.checkpoint.vision is not None:
            log.warning("the draft model reads no images: it drafts from the text behind them")
        model = DraftModel(draft, self.target, self.pages, DRAFT_SCRATCH_PAGES)
        self.model = model
        self.load = model.load
        self.description = f"draft model {draft.provenance['model']}"
        return DraftModelDrafter(model, self.pages, DRAFT_SCRATCH_PAGES)


def ngram_drafter(options: dict[str, Any], **fixed: Any) -> NgramDrafter:
    """Make the drafter from `fixed` and its own options, which are taken out of `options`."""
    names = [name for name in _parameters(NgramDrafter) if name in options and name not in fixed]
    return NgramDrafter(**fixed, **{name: options.pop(name) for name in names})
