"""The options of a server with their defaults, and who may be served without an API key."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import MISSING, dataclass

from smart_decoding.errors import ConfigError
from smart_decoding.options import option

KEY_VARIABLE = "SMART_API_KEY"

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s\"',]+")
_LOWEST = {
    "max_queue": 0,
    "max_body": 1,
    "max_n": 1,
    "shutdown_timeout": 0,
    "max_connections": 1,
}


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and addresses. Seconds and bytes; the model's own options are `LLM`'s."""

    model_name: str = option(
        MISSING, "the name that clients ask for", usual="MODEL", name="served-model-name"
    )
    host: str = option("127.0.0.1", "address to listen on; any but loopback needs an API key")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    api_keys: tuple[str, ...] = option(
        (), "key that clients must send", usual=f"${KEY_VARIABLE}, else none", name="api-key"
    )
    no_api_key: bool = option(False, "serve without a key beyond loopback too, under any host name")
    allowed_origins: tuple[str, ...] = option(
        (), "origin of web pages whose scripts may ask, '*' for all"
    )
    max_queue: int = option(256, "most answers that wait; status 429 beyond")
    queue_timeout: float = option(60.0, "longest wait of an answer, in seconds; status 503 beyond")
    max_body: int = option(4 * 2**20, "largest body of a request, in bytes; status 413 beyond")
    body_timeout: float = option(
        30.0, "longest time for a body to arrive, in seconds; status 408 beyond"
    )
    max_n: int = option(8, "most answers to one prompt")
    head_timeout: float = option(
        10.0, "longest time for a request's head to arrive, in seconds; status 408 beyond"
    )
    max_connections: int = option(512, "most connections; beyond, the oldest idle one is closed")
    shutdown_timeout: float = option(30.0, "seconds for running answers to end after SIGTERM")
    log_level: str = option(
        "info",
        "least severe messages to log",
        choices=("debug", "info", "warning", "error"),
    )

    def __post_init__(self) -> None:
        for name, low in _LOWEST.items():
            self._require(name, getattr(self, name) >= low, f"at least {low}")
        for name in ("queue_timeout", "body_timeout", "head_timeout"):
            self._require(name, getattr(self, name) > 0, "more than 0 seconds")
        self._require("port", 0 <= self.port <= 65535, "in [0, 65535]")
        if any(not key.strip() or key != key.strip() or not key.isascii() for key in self.api_keys):
            raise ConfigError(
                "an API key must be non-empty ASCII text without blanks or line ends around it"
            )
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(str(origin)):
                raise ConfigError(
                    f"allowed-origins: {origin!r} is no origin such as https://example.org, "
                    "nor '*' for all"
                )
        if self.api_keys and self.no_api_key:
            raise ConfigError("an API key and --no-api-key contradict each other: give one of them")
        if not (is_loopback(self.host) or self.api_keys or self.no_api_key):
            raise ConfigError(
                f"host {self.host} can be reached from other machines: give --api-key "
                "(or SMART_API_KEY), or --no-api-key to serve anyone"
            )

    def _require(self, name: str, good: bool, condition: str) -> None:
        if not good:
            value = getattr(self, name)
            raise ConfigError(f"{name}={value} is not allowed: it must be {condition}")

    @property
    def local_names_only(self) -> bool:
        """Whether to refuse foreign Host headers, as web pages could send by DNS rebinding."""
        return not self.api_keys and not self.no_api_key

    def cache_salt(self, client: str, own: str | None) -> str:
        """Return the salt that keeps cached prefixes apart: the request's own, and the client
        unless there is only one user. Shared prefixes would show what others have sent."""
        one_user = len(self.api_keys) == 1 or self.local_names_only
        parts = ["" if one_user else client, own or ""]
        return json.dumps(parts) if any(parts) else ""


def network_of(address: str) -> str:
    """Return the network of an IP address: of IPv6 the /64, which may be one machine's."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    if found.ipv4_mapped is not None:  # as a socket for both kinds spells it
        return str(found.ipv4_mapped)
    network = ipaddress.IPv6Address(int(found) >> 64 << 64)
    return f"{network}/64"


def is_loopback(host: str) -> bool:
    """Return whether only this machine can connect to `host`, or a Host header names this
    machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
