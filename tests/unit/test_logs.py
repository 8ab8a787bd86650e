from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from kvbm_core import logs


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("kvbm_core", "kvbm_connectors")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers = handlers


def without_root_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])


def test_the_level_is_set_on_our_loggers_only() -> None:
    before = logging.getLogger().level
    logs.configure("DEBUG")
    assert logging.getLogger("kvbm_core").level == logging.DEBUG
    assert logging.getLogger("kvbm_connectors.vllm").getEffectiveLevel() == logging.DEBUG
    assert logging.getLogger().level == before


def test_a_process_without_handlers_gets_one_and_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    without_root_handlers(monkeypatch)
    logging.getLogger("kvbm_core").handlers = []
    logs.configure("INFO")
    logs.configure("DEBUG")
    assert len(logging.getLogger("kvbm_core").handlers) == 1


def test_a_process_with_handlers_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [logging.NullHandler()])
    logging.getLogger("kvbm_core").handlers = []
    logs.configure("INFO")
    assert logging.getLogger("kvbm_core").handlers == []
