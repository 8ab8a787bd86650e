"""Which way of finding the leader a configuration asks for.

ZMQ host given ─▶ that host   etcd endpoints given ─▶ etcd   neither ─▶ by hand, on this machine
"""

from __future__ import annotations

from collections.abc import Mapping

from kvbm_core.channel.rendezvous import (
    DEFAULT_BEAT_PORT,
    DEFAULT_PORT,
    DirectRendezvous,
    FixedRendezvous,
    Rendezvous,
)
from kvbm_core.config import KvbmConfig


def rendezvous_for(config: KvbmConfig, identity: str, env: Mapping[str, str]) -> Rendezvous:
    """The rendezvous of one engine; `identity` as for KvbmLeader. Raises ConfigError."""
    if config.leader_zmq_host is None:
        return DirectRendezvous()
    beat_port, port = config.leader_zmq_pub_port, config.leader_zmq_ack_port
    return FixedRendezvous(
        config.leader_zmq_host,
        identity,
        DEFAULT_BEAT_PORT if beat_port is None else beat_port,
        DEFAULT_PORT if port is None else port,
    )
