"""Writes the state diagrams of ARCHITECTURE.md from the tables in the code."""

from __future__ import annotations

import re
from pathlib import Path

from kvbm_core import slot
from kvbm_core.blocks import state

DOCUMENT = Path(__file__).parent.parent / "ARCHITECTURE.md"


def updated(text: str) -> str:
    """The document with the diagrams as the tables have them, in the order of the document."""
    diagrams = iter((slot.diagram(), state.diagram()))
    return re.sub(
        r"```mermaid\n.*?\n```", lambda _: f"```mermaid\n{next(diagrams)}\n```", text, flags=re.S
    )


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
