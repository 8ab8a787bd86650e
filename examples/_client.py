"""A streaming client for an OpenAI-compatible completions server, and a reader of its metrics."""

import http.client
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

REQUEST_TIMEOUT_S = 120.0

_METRICS = {
    "device_queries": "vllm:prefix_cache_queries_total",
    "device_hits": "vllm:prefix_cache_hits_total",
    "host_queries": "vllm:external_prefix_cache_queries_total",
    "host_hits": "vllm:external_prefix_cache_hits_total",
}


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt."""

    ttft_s: float
    """Seconds from sending the request to its first token."""
    token_ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens that the engine didn't compute."""


@dataclass(frozen=True)
class CacheUse:
    """Prompt tokens looked up and found, in the device's cache and beyond it."""

    device_queries: int
    device_hits: int
    host_queries: int
    host_hits: int

    def since(self, before: "CacheUse") -> "CacheUse":
        """Return what was added after `before`."""
        return CacheUse(*(getattr(self, name) - getattr(before, name) for name in _METRICS))


def complete(port: int, model: str, prompt: str, max_tokens: int) -> Answer:
    """Send `prompt`, read the streamed answer, and time its first token."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    started = time.perf_counter()
    first: float | None = None
    token_ids: list[int] = []
    text = ""
    usage: Mapping[str, object] = {}
    for event in _stream(port, "/v1/completions", body):
        usage = event.get("usage") or usage
        for choice in event.get("choices", ()):
            token_ids += choice.get("token_ids") or ()
            text += choice["text"]
            if first is None and token_ids:
                first = time.perf_counter() - started
    if first is None:
        raise RuntimeError("the server streamed no token")
    return _answer(first, token_ids, text, usage)


def read_cache_use(port: int) -> CacheUse:
    """Read the prefix-cache counters from /metrics; a counter that isn't there is 0."""
    with _get(port, "/metrics") as response:
        lines = response.read().decode().splitlines()
    totals = dict.fromkeys(_METRICS.values(), 0.0)
    for line in lines:
        name = line.split("{")[0].split(" ")[0]
        if name in totals:
            totals[name] += float(line.rsplit(" ", 1)[1])
    return CacheUse(**{field: int(totals[metric]) for field, metric in _METRICS.items()})


def is_healthy(port: int) -> bool:
    """Say whether the server answers /health."""
    try:
        with _get(port, "/health") as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False


def _answer(ttft_s: float, token_ids: list[int], text: str, usage: Mapping[str, object]) -> Answer:
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    prompt_tokens = usage.get("prompt_tokens")
    return Answer(
        ttft_s=ttft_s,
        token_ids=tuple(token_ids),
        text=text,
        prompt_tokens=prompt_tokens if isinstance(prompt_tokens, int) else 0,
        cached_tokens=cached if isinstance(cached, int) else 0,
    )


def _get(port: int, path: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Connection": "close"})
    return connection.getresponse()


def _stream(port: int, path: str, body: Mapping[str, object]) -> Iterator[dict[str, Any]]:
    """Post `body`; yield the answer's server-sent events."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_TIMEOUT_S)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            message = response.read().decode()[:500]
            raise RuntimeError(f"the server answered {response.status}: {message}")
        for line in response:
            data = line.strip().removeprefix(b"data: ")
            if data and data != b"[DONE]":
                event = json.loads(data)
                if "error" in event:
                    raise RuntimeError(f"the server answered: {event['error']}")
                yield event
    finally:
        connection.close()
