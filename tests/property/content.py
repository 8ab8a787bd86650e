"""What a block holds in the model of memory, instead of bytes."""

from __future__ import annotations

Content = tuple[int, tuple[int, ...]]
"""(epoch, all tokens up to and including the block's); complete where it ends at a block's end."""
