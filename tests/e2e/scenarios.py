"""Functions that run inside an engine's process: what a test does to the engine, and sees of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests import disk_faults
from tests.faults import CONTROL

Prompt = Sequence[int]
MAX_STEPS = 20_000


@dataclass(frozen=True)
class Seen:
    """Tokens of each request, and what moved meanwhile."""

    tokens: list[list[int]]
    num_cached_tokens: list[int]
    num_matched_blocks: int = 0
    num_onboarded_blocks: int = 0
    num_offloaded_blocks: int = 0
    num_dropped_blocks: int = 0
    num_refused_blocks: int = 0
    num_failed_ops: int = 0
    num_fences: int = 0
    num_onboard_ops: int = 0
    num_promoted_blocks: int = 0
    num_written_blocks: int = 0
    num_bad_blocks: int = 0
    num_late_promotions: int = 0
    num_filtered_blocks: int = 0
    num_preemptions: int = 0


def prompt(seed: int, num_tokens: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(256) for _ in range(num_tokens)]


def generate(
    llm: Any,
    prompts: Sequence[Prompt],
    max_tokens: int = 8,
    salts: Sequence[str] = (),
    adapter: str = "",
    *,
    drained: bool = True,
) -> Seen:
    """Greedy generation, all prompts submitted at once.

    drained: step on, as a server does, until offloads have ended.
    """
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    batch: list[dict[str, Any]] = [{"prompt_token_ids": list(tokens)} for tokens in prompts]
    for item, salt in zip(batch, salts, strict=False):
        item["cache_salt"] = salt
    before = _counts(llm)
    with _CountedPreemptions(llm) as preemptions:
        outputs = llm.generate(batch, sampling, use_tqdm=False, lora_request=lora)
        if drained:
            drain(llm)
    moved = {name: count - before[name] for name, count in _counts(llm).items()}
    return Seen(
        tokens=[list(output.outputs[0].token_ids) for output in outputs],
        num_cached_tokens=[output.num_cached_tokens or 0 for output in outputs],
        num_preemptions=preemptions.count,
        **moved,
    )


def one_by_one(llm: Any, prompts: Sequence[Prompt], max_tokens: int = 8) -> list[Seen]:
    return [generate(llm, [tokens], max_tokens) for tokens in prompts]


def drain(llm: Any) -> None:
    """Step the idle engine as a server does, until nothing is left to do."""
    core = engine_core(llm)
    for _ in range(MAX_STEPS):
        if not core.scheduler.has_requests():
            return
        core.step_fn()
    raise AssertionError("the engine never becomes idle")


def idle_state(llm: Any) -> dict[str, int]:
    """What must all be 0 when nothing runs."""
    leader, pool = leader_of(llm), leader_of(llm).pool
    disk = leader.cascade.disk if leader.cascade is not None else pool
    block_pool = engine_core(llm).scheduler.kv_cache_manager.block_pool
    return {
        "slots": leader.num_slots,
        "ops": leader.num_ops_in_flight,
        "pinned": pool.num_pinned + disk.num_pinned,
        "reserved": pool.num_reserved + disk.num_reserved,
        "requests": len(engine_core(llm).scheduler.requests),
        "device blocks in use": block_pool.num_gpu_blocks - 1 - block_pool.get_num_free_blocks(),
        "host blocks lost": pool.num_blocks - pool.num_free - pool.num_ready,
    }


def control(llm: Any, **settings: Any) -> None:
    """Reset the faulty transfer engine, then set these attributes of its control."""
    CONTROL.reset()
    for name, value in settings.items():
        assert hasattr(CONTROL, name)
        setattr(CONTROL, name, value)


def poison(llm: Any) -> None:
    CONTROL.poison()


def reset_device_cache(llm: Any) -> bool:
    return bool(llm.reset_prefix_cache())


def reset_all_caches(llm: Any) -> bool:
    return bool(llm.reset_prefix_cache(reset_connector=True))


def num_ready(llm: Any) -> int:
    return int(leader_of(llm).pool.num_ready)


def num_on_disk(llm: Any) -> int:
    return int(leader_of(llm).cascade.disk.num_ready)


def engine_core(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def connector_of(llm: Any) -> Any:
    return engine_core(llm).scheduler.connector


def leader_of(llm: Any) -> Any:
    return connector_of(llm).scheduler_side.leader


class _CountedPreemptions:
    """Counts the scheduler's preemptions while it is entered."""

    def __init__(self, llm: Any) -> None:
        self._scheduler = engine_core(llm).scheduler
        self.count = 0

    def __enter__(self) -> _CountedPreemptions:
        original = self._scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> None:
            self.count += 1
            original(*args, **kwargs)

        self._scheduler._preempt_request = counted
        return self

    def __exit__(self, *_: object) -> None:
        del self._scheduler._preempt_request


def _counts(llm: Any) -> dict[str, int]:
    if connector_of(llm) is None:
        return {}
    counters = leader_of(llm).counters
    return {
        "num_matched_blocks": counters.num_matched_blocks,
        "num_onboarded_blocks": counters.num_onboarded_blocks,
        "num_offloaded_blocks": counters.num_offloaded_blocks,
        "num_dropped_blocks": counters.num_dropped_blocks,
        "num_refused_blocks": counters.num_refused_blocks,
        "num_failed_ops": counters.num_failed_ops,
        "num_fences": counters.num_fences,
        "num_onboard_ops": counters.routes["host_to_device"].num_ops,
        "num_promoted_blocks": counters.routes["disk_to_host"].num_blocks,
        "num_written_blocks": counters.routes["host_to_disk"].num_blocks,
        "num_bad_blocks": counters.num_bad_blocks,
        "num_late_promotions": counters.num_late_promotions,
        "num_filtered_blocks": counters.num_filtered_blocks,
    }


# Step by step


def submit(llm: Any, request_id: str, tokens: Prompt, max_tokens: int = 8) -> None:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    llm.llm_engine.add_request(request_id, {"prompt_token_ids": list(tokens)}, sampling)


def step_until(llm: Any, is_reached: Callable[[Any], bool]) -> None:
    for _ in range(MAX_STEPS):
        if is_reached(llm):
            return
        llm.llm_engine.step()
    raise AssertionError(f"{is_reached.__name__} is never reached")


def abort_in(llm: Any, phase: str, tokens: Prompt) -> dict[str, int]:
    """Submit, abort in the phase, let everything end; what is left."""
    request_id = f"abort-{phase}"
    submit(llm, request_id, tokens, max_tokens=32)
    if phase != "waiting":
        step_until(llm, PHASES[phase])
    llm.llm_engine.abort_request([request_id])
    llm.llm_engine.step()
    CONTROL.hold_onboards = CONTROL.hold_offloads = False
    drain(llm)
    return idle_state(llm)


def _is_loading(llm: Any) -> bool:
    return any(op.is_onboard for op in CONTROL.submitted)


def _is_prefilling(llm: Any) -> bool:
    return any(0 < r.num_computed_tokens < r.num_prompt_tokens for r in _requests(llm))


def _is_decoding(llm: Any) -> bool:
    return any(r.num_output_tokens > 2 for r in _requests(llm))


def _is_offloading(llm: Any) -> bool:
    return any(not op.is_onboard for op in CONTROL.submitted)


PHASES = {
    "loading": _is_loading,
    "prefilling": _is_prefilling,
    "decoding": _is_decoding,
    "offloading": _is_offloading,
}


def reuse_under_an_offload(llm: Any, first: Prompt, second: Prompt) -> Seen:
    """Finish a request whose offloads have not ended for the leader; run another that takes all
    device blocks."""
    CONTROL.reset()
    CONTROL.hold_offloads = True
    submit(llm, "first", first)
    step_until(llm, lambda llm: not llm.llm_engine.has_unfinished_requests())
    seen = generate(llm, [second], 1, drained=False)
    CONTROL.hold_offloads = False
    drain(llm)
    return seen


def reset_right_after_generate(llm: Any, tokens: Prompt) -> list[bool]:
    """What an offline user does between two rounds, with offloads still in flight."""
    answers = []
    for options in ({}, {"reset_running_requests": True}, {"reset_connector": True}):
        generate(llm, [tokens], 1, drained=False)
        answers.append(bool(llm.reset_prefix_cache(**options)))
    drain(llm)
    return answers


def generate_with_broken_hook(llm: Any, name: str, tokens: Prompt) -> list[Seen]:
    """Generate twice while a method of the leader raises; then give the engine a new leader."""

    from vllm.distributed.kv_transfer import get_kv_transfer_group

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"planted fault in {name}")

    setattr(leader_of(llm), name, broken)
    seen = [generate(llm, [tokens]), generate(llm, [tokens])]
    side = connector_of(llm).scheduler_side
    assert side.failed_hooks
    assert side.is_off == (name != "match")
    side._is_off = False
    side.open([get_kv_transfer_group().worker_side.handshake])
    return seen


def _requests(llm: Any) -> list[Any]:
    return list(engine_core(llm).scheduler.requests.values())


def set_up(llm: Any) -> dict[str, Any]:
    """How the engine runs, for tests that depend on it."""
    core = engine_core(llm)
    return {
        "num_ranks": core.vllm_config.parallel_config.world_size,
        "async_scheduling": core.async_scheduling,
    }


def num_host_blocks(llm: Any) -> int:
    return int(leader_of(llm).pool.num_blocks)


def forget_host(llm: Any) -> None:
    """Have neither device nor host know what is on disk."""
    assert reset_device_cache(llm)
    pool = leader_of(llm).pool
    pool.drop(pool.ready_keys())


def shut_down(llm: Any) -> None:
    engine_core(llm).shutdown()


def control_disk(llm: Any, **settings: int) -> None:
    """Have the faulty disk work again, then set these attributes of its control."""
    disk_faults.CONTROL.reset()
    for name, value in settings.items():
        assert hasattr(disk_faults.CONTROL, name)
        setattr(disk_faults.CONTROL, name, value)


def close_gate(llm: Any) -> None:
    """From here on every call to the disk hangs."""
    disk_faults.CONTROL.gate.clear()


def open_gate(llm: Any) -> None:
    """Let what hangs end, and the leader hear of it."""
    disk_faults.CONTROL.gate.set()
    drain(llm)


def end_pause(llm: Any) -> None:
    """Let the time pass for which a disk that failed or was slow is left alone."""
    cascade = leader_of(llm).cascade
    cascade._paused_until_seconds = cascade._slow_until_seconds = 0.0
