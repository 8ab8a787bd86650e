"""Where etcd is and how to log in: the variables that NVIDIA Dynamo's own etcd client reads.

Lives here: their parsing. Does not live here: any connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kvbm_core.errors import ConfigError

DEFAULT_LEASE_SECONDS = 10


@dataclass(frozen=True)
class EtcdSettings:
    """endpoints: http or https URLs, tried in turn. ca, client_cert, client_key: PEM files, or
    their text (Dynamo's documents say the one, its client reads the other). lease_seconds: how long
    a dead leader stays registered."""

    endpoints: tuple[str, ...]
    username: str = ""
    password: str = field(default="", repr=False)
    ca: str = ""
    client_cert: str = ""
    client_key: str = field(default="", repr=False)
    lease_seconds: int = DEFAULT_LEASE_SECONDS

    @classmethod
    def load(cls, env: Mapping[str, str]) -> EtcdSettings | None:
        """From the environment; None where no etcd is named. Raises ConfigError."""
        endpoints = tuple(filter(None, (text.strip() for text in _of(env, "ENDPOINTS").split(","))))
        if not endpoints:
            return None
        settings = cls(
            tuple(_endpoint(text) for text in endpoints),
            _of(env, "AUTH_USERNAME"),
            _of(env, "AUTH_PASSWORD"),
            _of(env, "AUTH_CA"),
            _of(env, "AUTH_CLIENT_CERT"),
            _of(env, "AUTH_CLIENT_KEY"),
            _lease_seconds(_of(env, "LEASE_TTL")),
        )
        _check_pair("AUTH_USERNAME", settings.username, "AUTH_PASSWORD", settings.password)
        _check_pair(
            "AUTH_CLIENT_CERT", settings.client_cert, "AUTH_CLIENT_KEY", settings.client_key
        )
        return settings


def host_and_port(endpoint: str) -> tuple[str, int]:
    parts = urlsplit(endpoint)
    return parts.hostname or "", parts.port or 2379


def _of(env: Mapping[str, str], name: str) -> str:
    return env.get(f"ETCD_{name}", "").strip()


def _endpoint(text: str) -> str:
    url = text if "://" in text else f"http://{text}"
    remedy = "Give URLs such as http://etcd:2379, separated by commas."
    try:
        parts = urlsplit(url)
        is_good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        is_good = False
    if not is_good or parts.username or parts.path.strip("/"):
        raise ConfigError("ETCD_ENDPOINTS", text, "is no endpoint of etcd", remedy)
    return url.rstrip("/")


def _lease_seconds(text: str) -> int:
    if not text:
        return DEFAULT_LEASE_SECONDS
    if not text.isdigit() or not 1 <= int(text) <= 3600:
        raise ConfigError("ETCD_LEASE_TTL", text, "is no number of seconds", "Give 1 to 3600.")
    return int(text)


def _check_pair(first: str, its: str, second: str, others: str) -> None:
    if bool(its) != bool(others):
        given, missing = (first, second) if its else (second, first)
        problem, remedy = "is set alone", f"Set ETCD_{missing} too, or neither."
        raise ConfigError(f"ETCD_{given}", "…", problem, remedy)
