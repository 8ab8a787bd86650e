"""The leader's address in etcd, under a lease: workers on other nodes find it there.

    /kvbm/leaders/v1/<cluster name>/<digest of the identity> → LeaderAddress

Lives here: registering, staying registered, finding. Does not live here: etcd's protocol (see
`etcd_client`). Invariant: a key belongs to one living leader; nothing here is needed any more
once every worker has joined, so that etcd may come and go.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time

from kvbm_core.channel.messages import LeaderAddress
from kvbm_core.channel.rendezvous import await_beat
from kvbm_core.errors import ChannelError, ConfigError, WireError
from kvbm_core.registry.etcd_client import EtcdClient, Unreachable
from kvbm_core.registry.settings import EtcdSettings, host_and_port

logger = logging.getLogger(__name__)

PREFIX = "/kvbm/leaders/v1"
BEAT_SECONDS = 3.0
LOOK_SECONDS = 0.5
PROGRESS_SECONDS = 10.0


class EtcdRendezvous:
    """A Rendezvous for one engine. cluster_name: tells engines of one identity apart."""

    def __init__(
        self,
        settings: EtcdSettings,
        cluster_name: str,
        identity: str,
        *,
        beat_port: int = 0,
        port: int = 0,
    ) -> None:
        self.beat_port = beat_port
        self.port = port
        digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        self.key = f"{PREFIX}/{cluster_name}/{digest}"
        self._settings = settings
        self._cluster_name = cluster_name
        self._registration: _Registration | None = None

    @property
    def host(self) -> str | None:
        """This machine's address on the way to etcd: others that reach etcd likely reach it."""
        problems = []
        for endpoint in self._settings.endpoints:
            host, port = host_and_port(endpoint)
            try:
                return _own_address(host, port)
            except OSError as error:
                problems.append(f"{endpoint}: {error}")
        raise ConfigError(
            "ETCD_ENDPOINTS",
            ",".join(self._settings.endpoints),
            f"no way from this machine to any of them ({'; '.join(problems)})",
            "Correct it, or say with DYN_KVBM_LEADER_ZMQ_HOST where the leader listens.",
        )

    def announce(self, address: LeaderAddress) -> None:
        """Register, and stay registered. Where etcd does not answer now, that goes on behind.

        Waits for the lease of a leader that has died here before. Raises ConfigError where etcd
        refuses us, ChannelError where another leader has our place.
        """
        registration = _Registration(self._settings, self.key, address)
        deadline_seconds = time.monotonic() + 2 * self._settings.lease_seconds
        try:
            while (holder := registration.try_once()) is not None:
                if time.monotonic() > deadline_seconds:
                    raise ChannelError(
                        f"another leader, at {holder}, is registered in etcd as {self.key}: give "
                        "each engine its own DYN_KVBM_CLUSTER_NAME (now "
                        f"{self._cluster_name!r}), the same on all its ranks"
                    )
                logger.info("kvbm: waiting for the lease of the leader at %s to end", holder)
                time.sleep(min(1.0, self._settings.lease_seconds / 4))
        except BaseException:
            registration.client.close()
            raise
        registration.start()
        self._registration = registration

    def find(self, timeout_seconds: float) -> LeaderAddress:
        """Wait for a leader that is registered and speaks. Raises ChannelError, ConfigError."""
        client = EtcdClient(self._settings)
        began_seconds = time.monotonic()
        next_log_seconds = began_seconds + PROGRESS_SECONDS
        try:
            while True:
                address, problem = self._look(client)
                if address is not None:
                    return address
                now_seconds = time.monotonic()
                if now_seconds >= began_seconds + timeout_seconds:
                    raise ChannelError(
                        f"found no leader in etcd within {timeout_seconds:g} s: {problem}. Check "
                        "that the leader runs with the same ETCD_ENDPOINTS, model and "
                        f"DYN_KVBM_CLUSTER_NAME (here {self._cluster_name!r})"
                    )
                if now_seconds >= next_log_seconds:
                    next_log_seconds = now_seconds + PROGRESS_SECONDS
                    logger.info("kvbm: still looking for the leader in etcd: %s", problem)
                time.sleep(min(LOOK_SECONDS, timeout_seconds))
        finally:
            client.close()

    def withdraw(self) -> None:
        """End the registration; where etcd does not answer, its lease does so."""
        if self._registration is not None:
            self._registration.stop()
            self._registration = None

    def _look(self, client: EtcdClient) -> tuple[LeaderAddress | None, str]:
        """A leader that speaks, or why there is none yet."""
        try:
            value = client.get(self.key)
        except Unreachable as error:
            return None, str(error)
        if value is None:
            return None, f"nobody is registered as {self.key}"
        try:
            address = LeaderAddress.decode(value)
        except WireError as error:
            return None, str(error)
        if await_beat(address.beat_endpoint, BEAT_SECONDS, address.session) is None:
            return None, f"the leader that is registered does not speak at {address.beat_endpoint}"
        return address, ""


class _Registration:
    """Keeps a key alive, from a thread of its own once it was started."""

    def __init__(self, settings: EtcdSettings, key: str, address: LeaderAddress) -> None:
        self.client = EtcdClient(settings)
        self._lease_seconds = settings.lease_seconds
        self._key = key
        self._value = address.encode()
        self._lease_id: int | None = None
        self._last_problem = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvbm-etcd", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def try_once(self) -> str | None:
        """Register, or keep alive what is registered; the endpoint of a leader that has the key
        instead. Raises ConfigError where etcd refuses us; where it does not answer, that is
        logged."""
        try:
            holder = self._renew()
        except Unreachable as error:
            self._note(str(error))
            return None
        if holder is None:
            self._note("")
        return holder

    def _renew(self) -> str | None:
        if self._is_kept_alive():
            return None
        client, key, value = self.client, self._key, self._value
        lease_id = client.grant(self._lease_seconds)
        if not client.create(key, value, lease_id):
            found = client.get(key)
            if found != value:
                client.revoke(lease_id)
                return "an unknown place" if found is None else _endpoint_in(found)
            client.put(key, value, lease_id)  # ours, under a lease that is ending
        self._lease_id = lease_id
        return None

    def _is_kept_alive(self) -> bool:
        """Whether lease and key are still there; a restarted etcd may have lost both."""
        if self._lease_id is None:
            return False
        return self.client.keep_alive(self._lease_id) and self.client.get(self._key) == self._value

    def _run(self) -> None:
        while not self._stopping.wait(self._lease_seconds / 3):
            try:
                if holder := self.try_once():
                    self._note(f"the leader at {holder} is registered in our place")
            except ConfigError as error:
                self._note(str(error))
        try:
            if self._lease_id is not None:
                self.client.revoke(self._lease_id)
        except (Unreachable, ConfigError) as error:
            logger.info("kvbm: etcd was not told that this leader ends: %s", error)
        self.client.close()

    def _note(self, problem: str) -> None:
        """Log a change; serving does not depend on etcd."""
        if problem and not self._last_problem:
            logger.warning("kvbm: not registered in etcd, serving goes on: %s", problem)
        elif self._last_problem and not problem:
            logger.info("kvbm: registered in etcd again")
        self._last_problem = problem


def _endpoint_in(value: str) -> str:
    try:
        return LeaderAddress.decode(value).endpoint
    except WireError:
        return "an address that can't be read"


def _own_address(host: str, port: int) -> str:
    """Of the interface that packets to a host leave by; sends none."""
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
