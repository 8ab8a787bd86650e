"""One frozen configuration object, parsed once, unknown keys refused.

Lives here: every option, its default, its bounds, and where its value may come from.
Does not live here: what the machine has (see `kvbm_core.host_memory`), reading the environment
(the caller passes it in).
Invariant: a KvbmConfig that exists is within every bound that can be checked without the machine.

Precedence, highest first: the engine's connector options (vLLM: `kv_connector_extra_config`),
the `DYN_KVBM_*` environment, the default.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from kvbm_core.errors import ConfigError

ENV_PREFIX = "DYN_KVBM_"
BYTES_PER_GB = 10**9
LOG_LEVELS = {
    "trace": "DEBUG",
    "debug": "DEBUG",
    "info": "INFO",
    "warn": "WARNING",
    "warning": "WARNING",
    "error": "ERROR",
    "critical": "CRITICAL",
    "off": "CRITICAL",
}


@dataclass(frozen=True)
class KvbmConfig:
    """Options of one connector; names are those of the environment without the prefix.

    cpu_cache_gb: host tier in GB of 10**9 bytes, summed over ranks; None takes a share of
    free memory. cpu_cache_override_num_blocks: the same in blocks, and wins.
    max_concurrent_transfers: copy threads (CPU). max_transfer_batch_size: blocks a copy
    call; None sizes calls by bytes. offload_generated_blocks: keep blocks of generated tokens
    too. eviction_policy, transfer_engine: a built-in name or ``module:Name``.
    block_keys: ``engine`` (the engine's own hashes), ``chain`` (ours), or ``auto``.
    trtllm_load_mode: on TensorRT-LLM a request waits for its load outside the batch (``async``), or
    the next forward does (``sync``).

    disk_cache_gb, disk_cache_override_num_blocks: disk tier, as for host; without either there is
    none (0 says so too). disk_cache_dir: an existing directory; None: the system's temporary one.
    disk_cache_persist: a restart finds the blocks. disk_zerofill_fallback: write zeros where the
    filesystem can't reserve space. disk_disable_o_direct: go through the page cache. disk_engine:
    a built-in name, ``module:name``, or ``auto``. disk_offload_filter, host_offload_filter: what
    may go to disk, and what may leave the device; a built-in name or ``module:Name``.
    disable_disk_offload_filter: short for the filter ``all``. host_offload_prefix_min_priority: of
    the latter; None: no filter.

    Where the engine carries no messages: leader_zmq_host: the leader listens there by tcp; None: by
    ipc, on its machine only, or where etcd says. leader_zmq_pub_port, leader_zmq_ack_port: 0: any
    free one; None: KVBM's own with a host, else any. leader_worker_init_timeout_secs: for all
    ranks to be there. cluster_name: tells engines of one model apart in one etcd.
    """

    cpu_cache_gb: float | None = None
    cpu_cache_override_num_blocks: int | None = None
    max_concurrent_transfers: int = 4
    max_transfer_batch_size: int | None = None
    offload_generated_blocks: bool = True
    disk_cache_gb: float | None = None
    disk_cache_override_num_blocks: int | None = None
    disk_cache_dir: str | None = None
    disk_cache_persist: bool = True
    disk_zerofill_fallback: bool = False
    disk_disable_o_direct: bool = False
    disk_engine: str = "auto"
    disk_offload_filter: str = "frequency"
    disable_disk_offload_filter: bool = False
    host_offload_filter: str = "min_priority"
    host_offload_prefix_min_priority: int | None = None
    eviction_policy: str = "lru"
    transfer_engine: str = "auto"
    block_keys: str = "auto"
    trtllm_load_mode: str = "async"
    leader_zmq_host: str | None = None
    leader_zmq_pub_port: int | None = None
    leader_zmq_ack_port: int | None = None
    leader_worker_init_timeout_secs: float = 1800.0
    cluster_name: str = "default"
    log_level: str = "INFO"
    ignored: tuple[str, ...] = ()

    @property
    def has_disk(self) -> bool:
        return self.disk_cache_gb is not None or self.disk_cache_override_num_blocks is not None

    @property
    def is_disk_only(self) -> bool:
        """Disk without a host tier of its own: host memory is only passed through."""
        has_host = self.cpu_cache_gb is not None or self.cpu_cache_override_num_blocks is not None
        return self.has_disk and not has_host

    @classmethod
    def load(cls, *, env: Mapping[str, str], options: Mapping[str, Any]) -> KvbmConfig:
        """Parse environment and connector options. Raises ConfigError on any bad value."""
        values: dict[str, Any] = {}
        ignored: list[str] = []
        for name, text in env.items():
            if name.startswith(ENV_PREFIX) and text.strip():
                _take(values, ignored, name.removeprefix(ENV_PREFIX).lower(), text, name)
        for name, value in options.items():
            option = name.removeprefix(ENV_PREFIX).lower()
            _take(values, ignored, option, value, f"kv_connector_extra_config.{name}")
        values.setdefault("log_level", _level_of(env, ignored))
        return cls(**values, ignored=tuple(ignored))


def _level_of(env: Mapping[str, str], ignored: list[str]) -> str:
    """Dynamo's own variables may hold filters of its other parts: these stop nothing."""
    for name in ("DYN_LOG", "DYNAMO_LOG_LEVEL"):
        if text := env.get(name, "").strip():
            try:
                return _log_level(name, text)
            except ConfigError:
                ignored.append(f"{name}={text!r}")
    return "INFO"


def _take(values: dict[str, Any], ignored: list[str], option: str, raw: Any, source: str) -> None:
    if option in _LATER:
        ignored.append(f"{source}={raw!r}")
        return
    parse = _PARSERS.get(option)
    if parse is None:
        close = difflib.get_close_matches(option, [*_PARSERS, *_LATER], n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(_PARSERS)}."
        raise ConfigError(source, raw, "unknown option", hint)
    values[option] = parse(source, raw)


def _integer(source: str, raw: Any) -> int:
    value = _number(source, raw)
    if value != int(value):
        raise ConfigError(source, raw, "must be a whole number", "Give one, or leave it unset.")
    return int(value)


def _number(source: str, raw: Any) -> float:
    try:
        value = float(raw) if not isinstance(raw, bool) else math.nan
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(source, raw, "not a number", "Give a number such as 4 or 0.5.")
    return value


def _gigabytes(source: str, raw: Any) -> float:
    value = _number(source, raw)
    if value <= 0:
        raise ConfigError(source, raw, "must be above 0", "Give GB, or leave it unset.")
    return value


def _count(source: str, raw: Any) -> int:
    value = _number(source, raw)
    if value < 1 or value != int(value) or value >= 2**32:
        problem = "must be a whole number from 1 to 2**32 - 1"
        raise ConfigError(source, raw, problem, "Give a count, or leave it unset.")
    return int(value)


def _unless_zero(parse: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    """KVBM's way to say "none", its default."""
    return lambda source, raw: parse(source, raw) if str(raw).strip() not in ("0", "0.0") else None


def _boolean(source: str, raw: Any) -> bool:
    text = str(raw).strip().lower()
    if text in ("1", "true", "yes", "on"):
        return True
    if text in ("0", "false", "no", "off"):
        return False
    raise ConfigError(source, raw, "not a boolean", "Give true or false.")


def _text(source: str, raw: Any) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ConfigError(source, raw, "not a name", "Give a built-in name or module:Name.")
    return raw.strip()


def _port(source: str, raw: Any) -> int:
    value = _integer(source, raw)
    if not 0 <= value < 2**16:
        raise ConfigError(source, raw, "is no port", "Give 1 to 65535, or 0 for any free one.")
    return value


def _seconds(source: str, raw: Any) -> float:
    value = _number(source, raw)
    if value <= 0:
        raise ConfigError(source, raw, "must be above 0", "Give seconds, or leave it unset.")
    return value


def _host(source: str, raw: Any) -> str:
    host = raw.strip() if isinstance(raw, str) else ""
    if not host or "/" in host or any(char.isspace() for char in host):
        raise ConfigError(source, raw, "is no host", "Give a name or address, without a port.")
    return host


def _cluster_name(source: str, raw: Any) -> str:
    name = raw.strip() if isinstance(raw, str) else ""
    if not name or "/" in name:
        raise ConfigError(source, raw, "is no name", "Give a text without slashes.")
    return name


def _choice(*choices: str) -> Callable[[str, Any], str]:
    def parse(source: str, raw: Any) -> str:
        if raw not in choices:
            remedy = f"Give {', '.join(choices[:-1])} or {choices[-1]}."
            raise ConfigError(source, raw, "unknown choice", remedy)
        return str(raw)

    return parse


def _log_level(source: str, raw: Any) -> str:
    """Level of a plain name or of a filter list such as ``warn,kvbm=debug``."""
    chosen = None
    for part in str(raw).split(","):
        target, _, level = part.strip().rpartition("=")
        if not target or target.startswith("kvbm"):
            chosen = LOG_LEVELS.get(level.lower(), chosen)
            if level.lower() not in LOG_LEVELS:
                remedy = f"Give one of {', '.join(LOG_LEVELS)}."
                raise ConfigError(source, raw, f"unknown level {level!r}", remedy)
    return chosen or "INFO"


_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    "cpu_cache_gb": _gigabytes,
    "cpu_cache_override_num_blocks": _count,
    "max_concurrent_transfers": _count,
    "max_transfer_batch_size": _count,
    "offload_generated_blocks": _boolean,
    "disk_cache_gb": _unless_zero(_gigabytes),
    "disk_cache_override_num_blocks": _unless_zero(_count),
    "disk_cache_dir": _text,
    "disk_cache_persist": _boolean,
    "disk_zerofill_fallback": _boolean,
    "disk_disable_o_direct": _boolean,
    "disk_engine": _text,
    "disk_offload_filter": _text,
    "disable_disk_offload_filter": _boolean,
    "host_offload_filter": _text,
    "host_offload_prefix_min_priority": _integer,
    "eviction_policy": _text,
    "transfer_engine": _text,
    "block_keys": _choice("auto", "engine", "chain"),
    "trtllm_load_mode": _choice("async", "sync"),
    "leader_zmq_host": _host,
    "leader_zmq_pub_port": _port,
    "leader_zmq_ack_port": _port,
    "leader_worker_init_timeout_secs": _seconds,
    "cluster_name": _cluster_name,
    "log_level": _log_level,
}
assert set(_PARSERS) | {"ignored"} == {field.name for field in fields(KvbmConfig)}

# Options of NVIDIA Dynamo's KVBM 1.6.1 for parts this release does not have: a user who
# switches keeps his environment, and start-up names what had no effect.
_LATER = frozenset(
    """
    metrics metrics_port cache_stats_max_requests cache_stats_log_interval_secs enable_record
    kv_events_enable_consolidator kv_events_consolidator_mode trtllm_zmq_port nccl_mla_mode sleep
    """.split()
)
