"""Running figures about a policy's rounds, for metrics. They decide nothing."""

from __future__ import annotations

KEEP = 1.0 - 1.0 / 256.0  # decay per round


class Statistics:
    """Exponentially decayed sums over rounds."""

    def __init__(self) -> None:
        self.rounds = 0.0
        self.off = 0.0
        self.tokens = 0.0
        self.seconds = 0.0
        self.plain_tokens = 0.0
        self.plain_seconds = 0.0
        self.accepted = 0.0
        self.expected = 0.0

    def record(
        self,
        batch: int,
        accepted: int,
        expected: float,
        seconds: float,
        plain_seconds: float,
        drafted: bool,
    ) -> None:
        """After a round: tokens come from `batch` requests and `accepted` nodes; `plain_seconds` is
        what a plain round is predicted to take, `expected` the sum of accept_prob over the verified
        nodes."""
        self.rounds = self.rounds * KEEP + 1.0
        self.off = self.off * KEEP + (not drafted)
        self.tokens = self.tokens * KEEP + batch + accepted
        self.seconds = self.seconds * KEEP + seconds
        self.plain_tokens = self.plain_tokens * KEEP + batch
        self.plain_seconds = self.plain_seconds * KEEP + plain_seconds
        self.accepted = self.accepted * KEEP + accepted
        self.expected = self.expected * KEEP + expected

    def summary(self) -> dict[str, float]:
        """Estimated speedup over plain decoding, share of rounds without drafting, accepted over
        expected nodes - 1."""
        speedup = 1.0
        if self.seconds > 0 and self.plain_seconds > 0:
            speedup = self.tokens / self.seconds / (self.plain_tokens / self.plain_seconds)
        return {
            "estimated_speedup": speedup,
            "share_off": self.off / self.rounds if self.rounds else 0.0,
            "calibration_error": self.accepted / self.expected - 1.0 if self.expected > 0 else 0.0,
        }
