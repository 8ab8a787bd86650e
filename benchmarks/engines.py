"""Offline vLLM engines in processes of their own, asked in turn: what one run compares.

Two engines can't share a process, and two runs can't be compared on a machine whose speed
drifts. Each engine sits in a child that answers one request at a time, so that the parent can
interleave them.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

KVBM_TRANSFER_CONFIG: dict[str, Any] = {
    "kv_connector": "DynamoConnector",
    "kv_role": "kv_both",
    "kv_connector_module_path": "kvbm_connectors.vllm",
    "kv_load_failure_policy": "recompute",
}


@dataclass(frozen=True)
class Answer:
    """One batch: seconds from submission to its end, and the tokens of each prompt."""

    seconds: float
    tokens: list[list[int]]
    num_cached_tokens: list[int]


class Engine:
    """An `LLM` in a child process; close it to end the child.

    options: arguments of `vllm.LLM`. environment: of the child only.
    """

    def __init__(self, model: Path, options: Mapping[str, Any], environment: Mapping[str, str]):
        context = multiprocessing.get_context("spawn")
        self._pipe, child = context.Pipe()
        defaults = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "HF_HUB_OFFLINE": "1",
        }
        arguments = (child, str(model), dict(options), {**defaults, **environment})
        self._process = context.Process(target=_serve, args=arguments)
        self._process.start()
        child.close()

    def wait_ready(self) -> None:
        self._receive()

    def generate(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answer:
        """Greedy generation of a batch, all submitted at once."""
        self._pipe.send(("generate", [list(prompt) for prompt in prompts], max_tokens))
        return Answer(*self._receive())

    def counters(self) -> str:
        """The connector's summary line; empty without a connector."""
        self._pipe.send(("counters",))
        return str(self._receive())

    def moved_blocks(self) -> dict[str, int]:
        """Blocks moved along each route of the connector's, such as ``disk_to_host``."""
        self._pipe.send(("moved blocks",))
        return dict(self._receive())

    def close(self) -> None:
        self._pipe.send(("close",))
        self._process.join(60)
        if self._process.is_alive():
            self._process.kill()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError("the engine's process died; its output says why") from None


def _serve(pipe: Connection, model: str, options: dict[str, Any], env: dict[str, str]) -> None:
    os.environ.update(env)
    from vllm import LLM

    llm = LLM(model=model, enforce_eager=True, dtype="bfloat16", seed=0, **options)
    pipe.send(None)
    while (message := pipe.recv())[0] != "close":
        if message[0] == "generate":
            pipe.send(_generate(llm, message[1], message[2]))
        elif message[0] == "moved blocks":
            pipe.send(_moved_blocks(llm))
        else:
            pipe.send(_counters(llm))


def _generate(llm: Any, prompts: list[list[int]], max_tokens: int) -> tuple[Any, ...]:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    batch = [{"prompt_token_ids": prompt} for prompt in prompts]
    start = time.perf_counter()
    outputs = llm.generate(batch, sampling, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    return seconds, tokens, [output.num_cached_tokens or 0 for output in outputs]


def _counters(llm: Any) -> str:
    connector = _connector(llm)
    return "" if connector is None else connector.scheduler_side.leader.counters.summary()


def _moved_blocks(llm: Any) -> dict[str, int]:
    routes = _connector(llm).scheduler_side.leader.counters.routes
    return {name: route.num_blocks for name, route in routes.items()}


def _connector(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.connector
