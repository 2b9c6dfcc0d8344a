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
from smart_decoding.models.heads.files import (
    VISUAL_POSITIONS,
    HeadFiles,
    check_folder,
    head_folder,
    is_for,
    is_head,
    load_head,
)
from smart_decoding.models.text.tokenizer import Tokenizer

# The models that draft are imported by what builds them: most of them are not wanted.
if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.engine.protocols import Drafter
    from smart_decoding.models.draft_model import DraftModel
    from smart_decoding.models.heads.eagle_head import EagleHead
    from smart_decoding.models.target import TorchTarget
    from smart_decoding.profiling.profile import Profile

log = logging.getLogger("smart.speculation")

# vLLM's names, and ours. What a number of tokens limits depends on the method and the policy.
IN_VLLM = {"prompt_lookup_min": "min_n", "prompt_lookup_max": "max_n"}
DEEPEST = {
    "ngram": "max_depth",
    "smart": "max_levels",
    "paper": "max_levels",
    "eagle2": "depth",
    "chain": "length",
}
# Parameters of a target below which a round takes so few milliseconds that n-grams beside a head
# are a visible part of it.
SMALL = 500_000_000
SCRATCH_PAGES = 256  # head keys of one round's tree nodes: 4096
DRAFT_SCRATCH_PAGES = 64  # a draft model's keys are larger: 1024 nodes


@dataclass(slots=True)
class Speculation:
    """What drafts, and what decides about it; without a drafter the engine decodes plainly.

    profile: the costs, or None where nothing needs them. model: the EAGLE head or draft model in
    use. description: in words. load: reads a draft model's weights, if they are not here yet; else
    drafting does."""

    policy: Policy
    drafter: Drafter | None
    profile: Profile | None = None
    model: EagleHead | DraftModel | None = None
    description: str = "none"
    load: Callable[[], None] = lambda: None

    @property
    def cost(self) -> CostModel | None:
        """As they were measured, or are guessed until then."""
        return None if self.profile is None else self.profile.cost


def level_drafter(drafter: Drafter | None) -> LevelDrafter[Any] | None:
    """Return the drafter with a model that this one is, or has."""
    model = drafter.model if isinstance(drafter, UnionDrafter) else drafter
    return model if isinstance(model, LevelDrafter) else None


def own_head(target: Checkpoint) -> Path | None:
    """Return the head that comes with this package for a built-in model, or for what seems to be a
    copy of it and has its sizes."""
    model = target.provenance["model"]
    name = copied_name(model)
    folder = shipped_head(name)
    if folder is None or not is_for(folder, target.config):
        return None
    if name != model:
        log.info("%s seems to be a copy of %s, so its head may draft", model, name)
    return folder


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """What a `speculative_config` asks for, as far as it can be checked before any weights are
    loaded.

    options: of the drafter and the policy; draft: the draft model, head: the folder of the draft
    head, if there is one; trust_pickle: whether that may be a pickle; by_default: neither was asked
    for, but found in the cache or this package."""

    method: str
    policy: str | Policy
    options: Mapping[str, Any]
    draft: Checkpoint | None = None
    head: Path | None = None
    trust_pickle: bool = False
    by_default: bool = False

    def without_draft(self) -> SpeculativeConfig:
        """N-grams draft instead of a model or head that nobody asked for."""
        left = {name: each for name, each in self.options.items() if name != "visual_positions"}
        return replace(self, method="ngram", options=left, draft=None, head=None, by_default=False)


def check_speculation(
    config: Mapping[str, Any] | bool | None,
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    max_model_len: int,
    trust_pickle: bool = False,
) -> SpeculativeConfig:
    """checkpoint, tokenizer: the target's; trust_pickle: a draft model or head may be a pickle.

    Raises ConfigError for what is no config and for an unknown method, policy or option, ModelError
    for a head that is missing and a draft model with another vocabulary or too short a context."""
    if config is False:
        return SpeculativeConfig("none", "off", {})
    given = _as_dict(config)
    shipped = own_head(checkpoint)
    if _means_own_head(given, shipped):
        given["model"] = shipped
    named = _is_model(given.get("model"), ask=given.get("method", "union") == "union")
    has_head = not named if "model" in given else shipped is not None
    draft = None
    chooses = _chooses(given)
    if not (shipped or chooses) and checkpoint.vision is None:
        draft = _sibling(checkpoint, tokenizer, max_model_len, trust_pickle)
    by_default = not chooses and (draft is not None or shipped is not None)
    default = _default_method(given, checkpoint, has_head, bool(draft or named))
    method = given.pop("method", default)
    policy = given.pop("policy", "off" if method == "none" else "smart")
    method = "eagle" if method == "eagle3" else method  # vLLM's: here files say what a head is
    _name_depth(given, method, policy)
    _check_method(method, policy)
    theirs = _method_options(method, has_head, named or draft is not None)
    _check_known(method, policy, given, theirs)
    check_policy(policy, {option: value for option, value in given.items() if option not in theirs})
    NgramDrafter(**{name: given[name] for name in _parameters(NgramDrafter) if name in given})
    if method == "draft_model" or (method == "union" and named):
        draft = _draft_checkpoint(
            given.pop("model", None), checkpoint, tokenizer, max_model_len, trust_pickle
        )
    head = None if draft else _head(method, given.pop("model", None) or shipped, trust_pickle)
    return SpeculativeConfig(method, policy, given, draft, head, trust_pickle, by_default)


def _default_method(
    given: Mapping[str, Any], target: Checkpoint, has_head: bool, has_draft: bool
) -> str:
    """Return what drafts where no method is given: n-grams alone where only their options are, or
    where nothing is to be drafted; else beside what has a model."""
    if given.keys().isdisjoint(("model", "visual_positions")) and _chooses(given):
        return "ngram"
    if has_head and parameters(target.config) < SMALL:
        return "eagle"
    return "union" if has_head or has_draft else "ngram"


def _means_own_head(given: Mapping[str, Any], shipped: Path | None) -> bool:
    """Return whether the model's own built-in name says what drafts, and no draft model is asked
    for."""
    name = str(given.get("model"))
    asked = given.get("method", "eagle") in ("eagle", "eagle3", "union")
    return asked and shipped is not None and shipped_head(name) == shipped


def _check_method(method: str, policy: str | Policy) -> None:
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; choose one of: {', '.join(METHODS)}")
    check_plain(method, policy)


def _name_depth(given: dict[str, Any], method: str, policy: str | Policy) -> None:
    """Put vLLM's number of tokens under the name that it has here."""
    of_policy = DEEPEST.get(policy) if isinstance(policy, str) else None
    deepest = DEEPEST.get(method, of_policy)
    if deepest is None or "num_speculative_tokens" not in given:
        return
    if deepest in given:
        raise ConfigError(f"num_speculative_tokens and {deepest} are the same: give one")
    given[deepest] = given.pop("num_speculative_tokens")


def _check_known(
    method: str, policy: str | Policy, given: Mapping[str, Any], theirs: Sequence[str]
) -> None:
    """theirs: the method's options."""
    ours = user_options(policy) if method != "none" else []
    name = policy if isinstance(policy, str) else policy.name
    unknown = [option for option in given if option not in (*ours, *theirs)]
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
    folder = head_folder(name, trust_pickle)
    check_folder(folder)
    return folder


def _is_model(name: Any, ask: bool) -> bool:
    """Return whether this is a draft model, and no head: a built-in one, a GGUF file, or a folder
    or hub id with a vocabulary of its own.

    ask: the hub, else a hub id is taken for a head's. Raises DownloadError."""
    if name is None:
        return False
    path = expanded(name)
    if path.is_dir():
        return _has_words([each.name for each in path.glob("*")]) and not is_head(path)
    if path.suffix == ".gguf" or is_gguf(path) or str(name).partition("@")[0] in known_names():
        return True
    hub_id = hub_id_of(str(name))
    return ask and hub_id is not None and (bool(hub_id[2]) or _is_model_on_hub(hub_id[1]))


def _is_model_on_hub(repository: str) -> bool:
    held = listing(repository, PATIENT)
    if held.has_only_ggufs:
        return True
    here = held.nothing_to_fetch(["config.json"])
    folder = config_file(repository, local_only=here)
    return _has_words(held.files) and not is_head(folder)


def _has_words(files: Sequence[str]) -> bool:
    """Return whether a vocabulary is among them; a few heads have one, too."""
    return any(name.startswith("tokenizer") or name == "vocab.json" for name in files)


def _chooses(given: Mapping[str, Any]) -> bool:
    """Return whether no other model is to draft by default: something drafts by name, n-grams'
    options are given, or policy off."""
    chosen = given.keys() & {"model", "method", *_parameters(NgramDrafter)}
    return bool(chosen) or given.get("policy") == "off"


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
        return {IN_VLLM.get(name, name): value for name, value in config.items()}
    if config is not None and not isinstance(config, bool):
        raise ConfigError(
            f"speculative_config={config!r} is not allowed: give a dict such as "
            "{'method': 'ngram', 'policy': 'smart'}, False (plain decoding) or None (the default)"
        )
    return {}


def _method_options(method: str, has_head: bool, has_draft: bool) -> list[str]:
    head = ["model", "visual_positions"]
    ngram = _parameters(NgramDrafter)
    model = ["model"] if has_draft else head if has_head else []
    known = {
        "eagle": head,
        "draft_model": ["model"],
        "ngram": ngram,
        "union": [*model, *ngram],
    }
    return known.get(method, [])


def _parameters(cls: Callable[..., Drafter]) -> list[str]:
    return list(inspect.signature(cls).parameters)


def build_speculation(
    asked: SpeculativeConfig,
    checkpoint: Checkpoint,
    target: TorchTarget,
    pages: int,
    max_num_seqs: int,
) -> Speculation:
    """Build what was asked for. Costs that no stored profile knows are guessed.

    Raises ConfigError for bad values of a drafter's options, ModelError for a head that does not
    fit."""
    if asked.method == "none":
        return Speculation(make_policy("off"), None)
    builder = _Builder(checkpoint, target, pages, max_num_seqs, asked)
    drafter = builder.drafter()
    needs_costs = "cost" in policy_options(asked.policy)
    profile = builder.profile(drafter) if needs_costs else None
    offered = {
        **stored_prior(asked.head),
        "cost": profile and profile.cost,
        "eos_token_ids": target.eos_token_ids,
    }
    policy = make_policy(asked.policy, offered, **builder.left)
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
    draft = load_checkpoint(name, quantization=target.quantization, trust_pickle=trust_pickle)
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
    """In what a draft model's tokens differ from the target's, each as text to id; None if in
    nothing. shared: how many ids both models have; what lies beyond is never proposed."""
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
    """Makes the parts of one Speculation, taking their options out of `left`: the rest belongs to
    the policy."""

    checkpoint: Checkpoint
    target: TorchTarget
    pages: int
    seqs: int
    asked: SpeculativeConfig
    model: EagleHead | DraftModel | None = None
    load: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.left = dict(self.asked.options)
        self.description = self.asked.method

    def drafter(self) -> Drafter:
        parts: list[Drafter] = []
        if self.asked.draft is not None:
            parts.append(self._draft_model())
        elif self.asked.head is not None:
            parts.append(self._eagle(self.asked.head))
        if self.asked.method in ("ngram", "union"):
            parts.append(ngram_drafter(self.left))
        if len(parts) == 1:
            return parts[0]
        self.description = f"union of {self.description} + {parts[1].name}"
        return UnionDrafter(parts)

    def profile(self, drafter: Drafter) -> Profile:
        """Return what forwards of the target and of the drafter's model cost here."""
        from smart_decoding.profiling.profile import Profile

        levels = level_drafter(drafter)
        head = str(self.model and self.model.shape)
        weights = self.checkpoint.provenance
        return Profile(self.target, levels, self.pages, self.seqs, head, weights)

    def _eagle(self, folder: Path) -> Drafter:
        from smart_decoding.drafters.eagle import EagleDrafter
        from smart_decoding.models.heads.eagle_head import EagleHead
        from smart_decoding.models.target import fitting_memory

        files = load_head(folder, self.checkpoint.config, self.asked.trust_pickle)
        files = self._with_images(files, folder)
        positions = self.target.max_positions + 64
        with fitting_memory("draft head", self.pages):
            self.model = EagleHead(files, self.target.decoder, self.pages, SCRATCH_PAGES, positions)
        self.description = f"eagle head {folder.name}"
        return EagleDrafter(self.model, self.pages, SCRATCH_PAGES)

    def _with_images(self, files: HeadFiles, folder: Path) -> HeadFiles:
        """As the option `visual_positions` says, for heads whose files do not: MSD's are laid out
        as EAGLE-1's."""
        how = self.left.pop("visual_positions", None)
        if how not in (None, *VISUAL_POSITIONS):
            raise ConfigError(
                f"visual_positions={how!r} is not supported: use {' or '.join(VISUAL_POSITIONS)}"
            )
        if how is not None:
            files = replace(files, supports_images=how == "decoupled")
        known = how or files.config.get("visual_positions")  # it was trained so, or is wanted so
        if self.checkpoint.vision is not None and known is None:
            log.warning("the head %s reads no images: it drafts from the text behind them", folder)
        return files

    def _draft_model(self) -> Drafter:
        from smart_decoding.drafters.draft_model import DraftModelDrafter
        from smart_decoding.models.draft_model import DraftModel

        draft = self.asked.draft
        assert draft is not None
        if self.checkpoint.vision is not None:
            log.warning("the draft model reads no images: it drafts from the text behind them")
        model = DraftModel(draft, self.target, self.pages, DRAFT_SCRATCH_PAGES)
        self.model = model
        self.load = model.load
        self.description = f"draft model {draft.provenance['model']}"
        return DraftModelDrafter(model, self.pages, DRAFT_SCRATCH_PAGES)


def ngram_drafter(options: dict[str, Any], **fixed: Any) -> NgramDrafter:
    """Make the drafter with those of `options` that it has, which are taken out, and `fixed`."""
    names = [name for name in _parameters(NgramDrafter) if name in options and name not in fixed]
    return NgramDrafter(**fixed, **{name: options.pop(name) for name in names})
