"""The boundary at which an unexpected exception of a scheduler hook becomes "no hit".

A scheduler hook that raises kills the engine, and a cache may only ever cost time. Worker hooks
are not guarded: a fence that failed in silence could yield a wrong token.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, TypeVar

logger = logging.getLogger(__name__)
_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def guarded(fallback: Callable[..., Any]) -> Callable[[_Hook], _Hook]:
    """Decorate a hook: what it raises is counted, logged once a hook, and answered by `fallback`.

    fallback: called with the hook's own arguments; must not raise.
    """

    def decorate(hook: _Hook) -> _Hook:
        @functools.wraps(hook)
        def call(connector: Any, *args: Any) -> Any:
            try:
                return hook(connector, *args)
            except Exception:  # boundary: see the module's docstring
                first = hook.__name__ not in connector.failed_hooks
                connector.failed_hooks[hook.__name__] += 1
                if first:
                    logger.exception(
                        "%s failed; serving goes on without the cache there", hook.__name__
                    )
                return fallback(connector, *args)

        return call  # type: ignore[return-value]

    return decorate
