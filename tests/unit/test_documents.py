"""What documents say of the code is true: diagrams are its tables, snippets run."""

from __future__ import annotations

import re
from typing import Any

from scripts.slot_diagram import DOCUMENT, updated


def test_the_diagrams_of_the_architecture_are_the_tables() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert updated(text) == text


def test_the_library_snippet_of_the_readme_runs() -> None:
    readme = DOCUMENT.with_name("README.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    names: dict[str, Any] = {}
    exec(compile(snippet, "README.md", "exec"), names)
    assert len(names["found"]) == 2
    assert names["tensor"].shape == (1, 4, 2, 16, 128)
    assert names["layer"].shape == (1, 1, 2, 16, 128)
