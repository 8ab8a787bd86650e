from __future__ import annotations

import msgspec
import pytest

from kvbm_core.channel import messages
from kvbm_core.channel.messages import (
    Ack,
    Alive,
    Beat,
    Data,
    Dropped,
    Goodbye,
    LeaderAddress,
    Message,
    OtherVersion,
    Refusal,
    Welcome,
    check_payload,
    decode,
    encode,
)
from kvbm_core.errors import WireError
from kvbm_core.types import BlockHash
from kvbm_core.wire import MAX_INVENTORY_BLOCKS, DiskInventory
from tests.unit.channels import HANDSHAKE, hello

INVENTORY = DiskInventory.of(4, bytes(16), [(BlockHash(bytes(32)), 3)])
MESSAGES: list[Message] = [
    Beat("s", "é", 7),
    hello(disk=INVENTORY),
    Alive(0, "i"),
    Data(1, "i", 2, b"payload"),
    Ack(0, "i", 3),
    Goodbye(0, "i"),
    Welcome("i"),
    Refusal("i", "why"),
    Dropped("i"),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_survives(message: Message) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("data", [b"", b"k", b"kvbm", b"GET / HTTP/1.1", bytes(100), b"\xff" * 9])
def test_bytes_that_are_no_message_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(data)


def test_a_message_of_another_release_says_so_whatever_is_in_it() -> None:
    with pytest.raises(OtherVersion, match="wire version 9"):
        decode(b"kvbm\x09 whatever")


def test_the_largest_inventory_fits_into_a_hello() -> None:
    count = MAX_INVENTORY_BLOCKS + 1
    whole = DiskInventory(count, bytes(16), bytes(32 * count), bytes(4 * count))
    told = whole.newest(MAX_INVENTORY_BLOCKS)
    assert len(told.ids()) == MAX_INVENTORY_BLOCKS
    decode(encode(hello(disk=told)))
    with pytest.raises(WireError, match="exceeds"):
        encode(hello(disk=whole, identity="x" * 2**17))


def test_what_was_written_last_is_told() -> None:
    entries = [(BlockHash(bytes([i]) * 32), i) for i in range(4)]
    inventory = DiskInventory.of(8, bytes(16), entries)
    assert inventory.newest(2) == DiskInventory.of(8, bytes(16), entries[2:])
    assert inventory.newest(4) is inventory


def test_what_answers_repeat_is_bounded() -> None:
    with pytest.raises(WireError, match="malformed"):
        decode(encode(Alive(0, "i" * 1000)))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_that_was_cut_is_refused(message: Message) -> None:
    with pytest.raises(WireError):
        decode(encode(message)[:-1])


def test_a_message_above_the_limit_is_neither_sent_nor_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encode(Data(0, "i", 1, bytes(5000)))
    monkeypatch.setattr(messages, "MAX_MESSAGE_BYTES", 10)
    for refused in (lambda: decode(data), lambda: encode(Data(0, "i", 1, bytes(5000)))):
        with pytest.raises(WireError, match="exceeds the limit"):
            refused()
    with pytest.raises(WireError, match="exceeds the limit of 10"):
        check_payload(bytes(11))


@pytest.mark.parametrize("rank", [-1])
def test_a_negative_rank_is_refused(rank: int) -> None:
    with pytest.raises(WireError, match="rank -1"):
        decode(encode(Alive(rank, "i")))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_host_blocks": 0},
        {"num_device_blocks": -1},
        {"block_bytes": 0},
        {"block_size": 0},
        {"disk": DiskInventory(0)},
        {"disk": DiskInventory(4, b"short")},
        {"disk": DiskInventory(4, bytes(16), bytes(32), b"")},
        {"disk": DiskInventory(4, bytes(16), bytes(32), b"abc")},
    ],
)
def test_a_handshake_that_breaks_a_bound_is_refused(changes: dict[str, object]) -> None:
    bad = msgspec.structs.replace(hello(), handshake=msgspec.structs.replace(HANDSHAKE, **changes))
    with pytest.raises(WireError):
        decode(encode(bad))


def test_an_address_is_one_line_of_ascii_and_survives() -> None:
    address = LeaderAddress("5e55", "ipc:///tmp/a/beat", "tcp://[::1]:9")
    text = address.encode()
    assert text.isascii()
    assert "\n" not in text
    assert LeaderAddress.decode(text) == LeaderAddress.decode(text.encode()) == address


@pytest.mark.parametrize("text", ["", "nonsense", "{}", b"\xff"])
def test_what_is_no_address_is_refused(text: str | bytes) -> None:
    with pytest.raises(WireError, match="no leader's address"):
        LeaderAddress.decode(text)
