"""Log set-up of the suite's own loggers: level, and a handler where the process has none."""

from __future__ import annotations

import logging

_LOGGERS = ("kvbm_core", "kvbm_connectors")
_FORMAT = "%(levelname)s %(asctime)s [%(name)s] %(message)s"


def configure(level: str) -> None:
    """Set the level of the suite's loggers; may be called again. Leaves others alone."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level)
        if not logger.hasHandlers():
            handler = logging.StreamHandler()
            handler.setFormatter(logging.Formatter(_FORMAT))
            logger.addHandler(handler)
