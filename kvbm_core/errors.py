"""Every error this suite raises on purpose.

    KvbmError
    ├── ConfigError         a setting is unknown, malformed or impossible here (start-up)
    ├── LayoutMismatch      tensors do not have the geometry that was declared
    ├── WireError           bytes from another process are not a valid message
    ├── IllegalTransition   misuse: a block or slot was asked for a move it can't make
    ├── BlocksUnavailable   a program asked the block manager for more blocks than there are
    ├── StorageError        memory or a storage backend could not be opened
    └── ChannelError        leader and workers did not find each other, or refuse each other

Expected outcomes (miss, full, failed transfer) are return values, never errors; but a program that
allocates blocks itself has nothing to go on with.
"""

from __future__ import annotations


class KvbmError(Exception):
    """Root of the tree."""


class ConfigError(KvbmError, ValueError):
    """A bad setting: says which, its value, the limit and the remedy."""

    def __init__(self, option: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(f"{option}={value!r}: {problem}. {remedy}")
        self.option = option


class LayoutMismatch(KvbmError, ValueError):
    """A tensor's shape, stride or size contradicts the declared layout."""


class WireError(KvbmError, ValueError):
    """A message is malformed, of another version, or breaks a bound."""


class IllegalTransition(KvbmError, RuntimeError):
    """A state machine was driven along an edge its table does not have."""


class BlocksUnavailable(KvbmError, RuntimeError):
    """Fewer blocks can be allocated than were asked for; none was."""


class StorageError(KvbmError, OSError):
    """An environment fault found when memory or storage was opened; names the remedy."""


class ChannelError(KvbmError, OSError):
    """Leader and workers could not get together: says who is missing or why, and the remedy."""
