"""Documents that are generated from the code are what the code says."""

from __future__ import annotations

from scripts.slot_diagram import DOCUMENT, updated


def test_the_slot_diagram_of_the_architecture_is_the_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert updated(text) == text
