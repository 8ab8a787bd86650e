"""ZMQ sockets as the channel uses them: bounded, never waiting, files only for their owner.

Lives here: options, addresses, errors with remedies. Does not live here: what is said.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
from pathlib import Path

from kvbm_core.errors import ChannelError, ConfigError
from kvbm_core.wire import MAX_MESSAGE_BYTES

try:
    import zmq as zmq  # for the other modules of the channel too
except ImportError as error:
    raise ChannelError(
        "the channel between leader and workers needs pyzmq: pip install 'kvbm-connectors[zmq]'"
    ) from error

MAX_FRAME_BYTES = 2 * MAX_MESSAGE_BYTES
LINGER_MS = 500
_MAX_IPC_PATH = 100
ANY_HOST = ("0.0.0.0", "::", "*")


def new_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    made = context.socket(kind)
    made.setsockopt(zmq.LINGER, LINGER_MS)
    made.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    made.setsockopt(zmq.IPV6, 1)
    # A connection that died without a word is made anew.
    made.setsockopt(zmq.HEARTBEAT_IVL, 5_000)
    made.setsockopt(zmq.HEARTBEAT_TIMEOUT, 15_000)
    return made


def bind_tcp(made: zmq.Socket[bytes], host: str, port: int, option: str) -> int:
    """Bind to one host, port 0: any free one. Returns the port; raises ConfigError."""
    address = numeric_host(host)
    try:
        made.bind(f"tcp://{_bracketed(address)}:{port or '*'}")
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            problem = f"another process on {host} listens there"
            remedy = f"Give another port with DYN_KVBM_{option.upper()}, or 0 for any free one."
            raise ConfigError(option, port, problem, remedy) from error
        problem = f"can't be listened on: {error}"
        remedy = "Give the name or address of an interface of the leader's own machine."
        raise ConfigError("leader_zmq_host", host, problem, remedy) from error
    bound = made.getsockopt_string(zmq.LAST_ENDPOINT)
    return int(bound.rpartition(":")[2])


def tcp_endpoint(host: str, port: int) -> str:
    """To be connected to."""
    return f"tcp://{_bracketed(host)}:{port}"


def connect(made: zmq.Socket[bytes], endpoint: str) -> None:
    """Connect, in the background. Raises ChannelError where that is no endpoint.

    A name becomes the address to which a leader of that name binds: left to itself, ZMQ knows names
    with an IPv6 address by that one only, and ``localhost`` has one where nobody listens on it.
    """
    scheme, _, place = endpoint.partition("://")
    host, _, port = place.rpartition(":")
    if scheme == "tcp" and host and port.isdigit() and not host.startswith("["):
        with contextlib.suppress(ConfigError):  # not known yet: ZMQ goes on asking
            endpoint = tcp_endpoint(numeric_host(host), int(port))
    try:
        made.connect(endpoint)
    except zmq.ZMQError as error:
        raise ChannelError(f"{endpoint!r} is no place of a leader: {error}") from error


def numeric_host(host: str) -> str:
    """ZMQ binds to addresses, not names. IPv4 where a name has both: what is bound to all addresses
    by 0.0.0.0 has no other. Raises ConfigError."""
    if host in ANY_HOST:
        return host
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return str(min(found, key=lambda info: info[0] is not socket.AF_INET)[4][0])
    except OSError as error:
        problem, remedy = f"is no host that this machine knows: {error}", "Give its address."
        raise ConfigError("leader_zmq_host", host, problem, remedy) from error


def reachable_host(host: str) -> str:
    """What others connect to where the leader listens on `host`."""
    return socket.gethostname() if host in ANY_HOST else host


def new_ipc_directory() -> Path:
    """A directory for sockets that nobody else may enter; the caller removes it."""
    directory = Path(tempfile.mkdtemp(prefix="dynamo-kvbm-"))
    if len(str(directory)) > _MAX_IPC_PATH:  # the kernel's limit for a socket's path is 107
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="dynamo-kvbm-", dir="/tmp"))
    return directory


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
