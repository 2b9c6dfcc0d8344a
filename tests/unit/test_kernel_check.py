"""Where activations cannot be rounded to 8 bits."""

import pytest

from smart_decoding import LLM
from smart_decoding.errors import ConfigError
from smart_decoding.models.cpu import kernel_check
from smart_decoding.models.cpu.kernel_check import check_activations


def test_int8_is_an_error_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_check, "multiplies_bytes", lambda: False)
    with pytest.raises(ConfigError, match="needs a CPU with AVX2 or Arm's i8mm"):
        check_activations("int8", holds_quants=True)
    with pytest.raises(ConfigError, match="needs quantised weights"):
        check_activations("int8", holds_quants=False)


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_int8_does_not_pass_unseen_in_fp32(quantization: str | None) -> None:
    """Weights are expanded there."""
    with pytest.raises(ConfigError, match="needs quantised weights on the CPU kernels in bfloat16"):
        LLM("smollm2-135m", dtype="float32", quantization=quantization, activations="int8")


def test_int8_does_not_pass_unseen_on_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smart_decoding.llm.why_slow", lambda config, device: "an odd shape")
    with pytest.raises(ConfigError, match="needs quantised weights on the CPU kernels"):
        LLM("smollm2-135m", activations="int8", allow_slow=True)


def test_an_unknown_way_is_told() -> None:
    with pytest.raises(ConfigError, match="'int4' is not supported: use auto, exact, int8"):
        LLM("smollm2-135m", activations="int4")
