"""etcd over its JSON gateway: several endpoints, a login, errors with remedies.

Lives here: the only import of etcd3gw. Does not live here: what is registered.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from kvbm_core.errors import ChannelError, ConfigError
from kvbm_core.registry.settings import EtcdSettings, host_and_port

try:
    import etcd3gw
    from etcd3gw.exceptions import (
        ApiVersionDiscoveryFailedError,
        ConnectionFailedError,
        ConnectionTimeoutError,
        Etcd3Exception,
    )
except ImportError as error:
    raise ChannelError(
        "ETCD_ENDPOINTS is set and etcd's client is missing: pip install 'kvbm-connectors[etcd]'"
    ) from error

logger = logging.getLogger(__name__)

REQUEST_SECONDS = 3.0
_API_PATH = "/v3/"  # of etcd 3.4 and later
_UNREACHABLE = (ConnectionFailedError, ConnectionTimeoutError, ApiVersionDiscoveryFailedError)
_UNINTELLIGIBLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
_STALE_LOGIN = ("invalid auth token", "user name is empty", "revision of auth store is old")
_T = TypeVar("_T")


class Unreachable(ChannelError):
    """No endpoint answers; a later call may succeed."""


class EtcdClient:
    """Used by one thread at a time. Opens a connection when it is first needed.

    All calls raise Unreachable, or ConfigError where etcd refuses us.
    """

    def __init__(self, settings: EtcdSettings) -> None:
        self._settings = settings
        self._clients: list[Any] = []
        self._current = 0
        self._is_logged_in = False
        self._pem_directory: tempfile.TemporaryDirectory[str] | None = None

    def get(self, key: str) -> str | None:
        values = self._call(lambda etcd: etcd.get(key))
        return values[0].decode("utf-8", "replace") if values else None

    def put(self, key: str, value: str, lease_id: int) -> None:
        self._call(lambda etcd: etcd.put(key, value, lease=_lease(lease_id, etcd)))

    def create(self, key: str, value: str, lease_id: int) -> bool:
        """Put a key that is not there yet; False where it is."""
        create = self._call(lambda etcd: etcd.create(key, value, lease=_lease(lease_id, etcd)))
        return bool(create)

    def grant(self, seconds: int) -> int:
        """A new lease."""
        return self._call(lambda etcd: int(etcd.lease(ttl=seconds).id))

    def keep_alive(self, lease_id: int) -> bool:
        """Whether the lease has not ended, and begins anew."""
        return self._call(lambda etcd: bool(_lease(lease_id, etcd).refresh() > 0))

    def revoke(self, lease_id: int) -> None:
        """End a lease and the keys under it."""
        self._call(lambda etcd: _lease(lease_id, etcd).revoke())

    def _call(self, action: Callable[[Any], _T]) -> _T:
        """Do something with whichever endpoint answers."""
        problems = []
        for _ in range(len(self._settings.endpoints)):
            try:
                return self._call_current(action)
            except _UNREACHABLE as error:
                endpoint = self._settings.endpoints[self._current]
                problems.append(f"{endpoint}: {_first_line(error)}")
                self._current = (self._current + 1) % len(self._settings.endpoints)
                self._is_logged_in = False
        raise Unreachable(
            f"etcd does not answer ({'; '.join(problems)}): check ETCD_ENDPOINTS, and for https "
            "ETCD_AUTH_CA"
        )

    def close(self) -> None:
        for client in self._clients:
            client.session.close()
        self._clients.clear()
        if self._pem_directory is not None:
            self._pem_directory.cleanup()
            self._pem_directory = None

    def _call_current(self, action: Callable[[Any], _T]) -> _T:
        if not self._clients:
            self._open()
        client = self._clients[self._current]
        try:
            return self._ask(client, action)
        except _UNREACHABLE:
            raise
        except Etcd3Exception as error:
            if not any(text in _text(error) for text in _STALE_LOGIN):
                raise self._refusal(error) from error
        # A token lives minutes, and none outlives a restart of etcd.
        self._is_logged_in = False
        try:
            return self._ask(client, action)
        except _UNREACHABLE:
            raise
        except Etcd3Exception as error:
            raise self._refusal(error) from error

    def _ask(self, client: Any, action: Callable[[Any], _T]) -> _T:
        try:
            if not self._is_logged_in:
                self._log_in(client)
            return action(client)
        except _UNINTELLIGIBLE as error:
            text = f"its answer is not etcd's: {type(error).__name__}: {error}"
            raise ConnectionFailedError(text) from error

    def _open(self) -> None:
        settings = self._settings
        ca = self._pem_file("ETCD_AUTH_CA", settings.ca)
        cert = self._pem_file("ETCD_AUTH_CLIENT_CERT", settings.client_cert)
        key = self._pem_file("ETCD_AUTH_CLIENT_KEY", settings.client_key)
        for endpoint in settings.endpoints:
            host, port = host_and_port(endpoint)
            client = etcd3gw.Etcd3Client(
                host,
                port,
                protocol=endpoint.split(":")[0],
                ca_cert=ca,
                cert_key=key,
                cert_cert=cert,
                timeout=REQUEST_SECONDS,
                api_path=_API_PATH,
            )
            # Neither a proxy nor a .netrc of the environment is meant for etcd.
            client.session.trust_env = False
            self._clients.append(client)

    def _log_in(self, client: Any) -> None:
        self._is_logged_in = True
        if not self._settings.username:
            return
        client.session.headers.pop("Authorization", None)
        names = {"name": self._settings.username, "password": self._settings.password}
        answer = client.post(client.get_url("/auth/authenticate"), json=names)
        client.session.headers["Authorization"] = answer["token"]

    def _refusal(self, error: Etcd3Exception) -> Exception:
        text = _text(error)
        self._is_logged_in = False
        if "authentication is not enabled" in text:
            remedy = "Unset ETCD_AUTH_USERNAME, or enable authentication in etcd."
            return ConfigError("ETCD_AUTH_USERNAME", self._settings.username, text, remedy)
        refusals = ("authentication failed", "permission denied", *_STALE_LOGIN)
        if any(refusal in text for refusal in refusals):
            remedy = (
                "Check ETCD_AUTH_USERNAME and ETCD_AUTH_PASSWORD, and that this user may read and "
                "write keys below /kvbm/."
            )
            return ConfigError("ETCD_AUTH_USERNAME", self._settings.username, text, remedy)
        return Unreachable(f"etcd can't serve us now: {text}")

    def _pem_file(self, option: str, value: str) -> str | None:
        """A path is checked; text becomes a file that only this user may read."""
        if not value:
            return None
        if not value.startswith("-----BEGIN"):
            if not Path(value).is_file():
                remedy = "Give the path of a PEM file, or its text."
                raise ConfigError(option, value, "is no file", remedy)
            return value
        if self._pem_directory is None:
            self._pem_directory = tempfile.TemporaryDirectory(prefix="dynamo-kvbm-")
        path = Path(self._pem_directory.name) / option
        path.write_text(value + "\n", encoding="ascii")
        return str(path)


def _lease(lease_id: int, client: Any) -> Any:
    """Of whichever endpoint granted it."""
    return etcd3gw.Lease(lease_id, client=client)


def _text(error: Etcd3Exception) -> str:
    """What etcd says is wrong, without the JSON around it."""
    text = error.detail_text or str(error)
    try:
        return str(json.loads(text)["error"])
    except (ValueError, KeyError, TypeError):
        return text


def _first_line(error: Etcd3Exception) -> str:
    return (_text(error).splitlines() or [type(error).__name__])[0][:300]
