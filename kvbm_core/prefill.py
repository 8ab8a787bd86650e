"""How fast the engine computes prompts, learnt from the steps it takes.

Lives here: one estimate. Does not live here: clocks (the caller says what time it is).
Invariant: the newest step never counts, since an engine that schedules ahead plans a step before
the one it planned last has run: the estimate may be too low, not too high.
"""

from __future__ import annotations

PREFILL_TOKENS = 64
_WINDOW_SECONDS = 0.5
_WEIGHT = 0.3


class PrefillRate:
    """Tokens a second; None until a prompt was computed."""

    def __init__(self) -> None:
        self.tokens_per_second: float | None = None
        self._began_seconds: float | None = None
        self._num_tokens = 0
        self._num_newest_tokens = 0
        self._num_light_steps = 0

    def step(self, num_tokens: int, now_seconds: float) -> None:
        """A step of that many tokens is planned now."""
        is_heavy = num_tokens >= PREFILL_TOKENS
        if self._began_seconds is None and not is_heavy:
            return
        self._num_light_steps = 0 if is_heavy else self._num_light_steps + 1
        if self._began_seconds is not None:
            seconds = now_seconds - self._began_seconds
            is_over = self._num_light_steps > 1 or seconds >= _WINDOW_SECONDS
            if is_over and self._num_tokens and seconds > 0:
                self._sample(self._num_tokens / seconds)
        if is_heavy and self._began_seconds is None:
            self._began_seconds = now_seconds
        if self._began_seconds is not None:
            self._num_tokens += self._num_newest_tokens
            self._num_newest_tokens = num_tokens

    def rest(self) -> None:
        """The engine may stand still until the next step: what was not measured yet never is."""
        self._began_seconds, self._num_tokens, self._num_newest_tokens = None, 0, 0

    def _sample(self, rate: float) -> None:
        before = self.tokens_per_second
        self.tokens_per_second = rate if before is None else before + _WEIGHT * (rate - before)
        self.rest()
