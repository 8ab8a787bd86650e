"""What the prefix-reuse demo asks: long prefixes in rotation, each time with another question."""

import random
from dataclasses import dataclass
from enum import Enum

BLOCK_TOKENS = 128
"""Tokens in a KV block: vLLM's default on a CPU."""

QUESTION_TOKENS = 64
"""The demo model's tokens are bytes: a length in tokens is one in ASCII characters."""

OUTPUT_TOKENS = 16

_WORDS = (
    "amber basin cedar delta ember fjord grove harbor inlet jetty kelp lagoon meadow nectar "
    "orchard prairie quarry river stone tundra upland valley willow yarrow zephyr"
).split()


class Kind(str, Enum):
    """How a request's prefix stands in the device cache."""

    FIRST = "first"
    """Never seen: computed."""
    REPEAT = "repeat"
    """The previous request's prompt again: still on the device."""
    RETURN = "return"
    """Seen before, and evicted from the device since."""


@dataclass(frozen=True)
class Request:
    """One prompt to send; `prefix` and `round` count from 0."""

    kind: Kind
    prefix: int
    round: int
    prompt: str


@dataclass(frozen=True)
class Workload:
    """The sizes of the demo."""

    prefixes: int
    prefix_tokens: int
    return_rounds: int
    """How often each prefix comes back after its first round; the last time, the server with a disk
    tier was restarted before it."""
    prompts_on_device: int
    """How many prompts the device cache holds: fewer than prefixes."""

    @property
    def blocks_per_request(self) -> int:
        """Device blocks that one request takes at its end."""
        return -(-(self.prefix_tokens + QUESTION_TOKENS + OUTPUT_TOKENS) // BLOCK_TOKENS)

    @property
    def device_blocks(self) -> int:
        """Blocks of the device cache: for the prompts it is to hold, and half a prompt of slack."""
        return self.blocks_per_request * self.prompts_on_device + self.blocks_per_request // 2

    @property
    def distinct_blocks(self) -> int:
        """Blocks of all prefixes together."""
        return self.prefixes * self.prefix_tokens // BLOCK_TOKENS

    @property
    def max_model_len(self) -> int:
        """Longest sequence in tokens."""
        return self.blocks_per_request * BLOCK_TOKENS

    def requests(self) -> list[Request]:
        """Return the requests in order: each prefix twice in a row, then rounds of returns."""
        sequence = []
        for prefix in range(self.prefixes):
            sequence += [self._request(kind, prefix, 0) for kind in (Kind.FIRST, Kind.REPEAT)]
        for number in range(1, self.return_rounds + 1):
            for prefix in range(self.prefixes):
                sequence.append(self._request(Kind.RETURN, prefix, number))
        return sequence

    def _request(self, kind: Kind, prefix: int, number: int) -> Request:
        text = _words(f"prefix {prefix}", self.prefix_tokens)
        question = _words(f"question {prefix} {number}", QUESTION_TOKENS)
        return Request(kind, prefix, number, text + question)


def _words(seed: str, length: int) -> str:
    """Return `length` characters of words drawn by `seed`."""
    generator = random.Random(seed)
    words = generator.choices(_WORDS, k=length)
    return " ".join(words)[:length]
