"""How the levels of a head compute, as data."""

from __future__ import annotations

from dataclasses import dataclass

from smart_decoding.models.families.mtp import EMBEDDING_NORM, HIDDEN_NORM


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What becomes of pairs (embedding, features), and which norms lie on the way.

    fused: fc merges both at every step into the states that enter the first layer, and features are
    the target's states after its final norm. Else fc makes features of several layers' states,
    once, and the first layer's q, k and v read both side by side.
    embedding_norm, features_norm, last_norm: names of norms' weights in `HeadFiles.weights`, None:
    there is no norm. The last one lies before the output matrix.
    input_norm: the first layer has a norm at its input, as ordinary layers have.
    feeds_back_normed: the next step's features are what the output matrix reads; else what enters
    the last norm."""

    fused: bool
    embedding_norm: str | None = None
    features_norm: str | None = None
    last_norm: str | None = None
    input_norm: bool = False
    feeds_back_normed: bool = False


EAGLE2 = HeadForm(fused=True)  # and EAGLE-1
EAGLE3 = HeadForm(
    fused=False,
    embedding_norm="midlayer.input_layernorm.weight",
    features_norm="midlayer.hidden_norm.weight",
    last_norm="norm.weight",
)
# a layer for multi-token prediction: an ordinary one of its model
MTP_LAYER = HeadForm(
    fused=True,
    embedding_norm=f"{EMBEDDING_NORM}.weight",
    features_norm=f"{HIDDEN_NORM}.weight",
    last_norm="norm.weight",
    input_norm=True,
    feeds_back_normed=True,
)
