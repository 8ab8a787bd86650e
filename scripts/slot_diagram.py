"""Writes the slot diagram of ARCHITECTURE.md from the table in `kvbm_core.slot`."""

from __future__ import annotations

import re
from pathlib import Path

from kvbm_core.slot import diagram

DOCUMENT = Path(__file__).parent.parent / "ARCHITECTURE.md"


def updated(text: str) -> str:
    """The document with the diagram as the table has it."""
    block = f"```mermaid\n{diagram()}\n```"
    return re.sub(r"```mermaid\n.*?\n```", lambda _: block, text, count=1, flags=re.S)


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
