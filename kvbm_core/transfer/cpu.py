"""Transfer engine for memory that the CPU can address: copy threads.

Lives here: how an op is cut into copies. Does not live here: threads, the copy.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvbm_core.transfer.pages import BlockCopier
from kvbm_core.transfer.threads import Lane, Piece, ThreadEngine
from kvbm_core.types import TransferOp

PIECE_BYTES = 32 * 2**20


class CpuTransferEngine(ThreadEngine):
    """`num_threads` threads copy pieces of at most `piece_blocks` blocks.

    piece_blocks None: 32 MiB a piece, since a thread that comes back to Python may wait 5 ms for
    the GIL.
    """

    def __init__(
        self, copier: BlockCopier, *, num_threads: int, piece_blocks: int | None = None
    ) -> None:
        blocks = piece_blocks or max(1, PIECE_BYTES // copier.block_bytes)
        super().__init__(_Copies(copier), [Lane(num_threads)], piece_blocks=blocks, name="copy")


class _Copies:
    """PieceWork: a piece is one call of the copier."""

    def __init__(self, copier: BlockCopier) -> None:
        self.block_bytes = copier.block_bytes
        self._copier = copier

    def order(self, op: TransferOp) -> Sequence[int]:
        return range(len(op.src))

    def run(self, piece: Piece) -> dict[int, str]:
        if not piece.op.touches_device:
            raise ValueError(f"{piece.op.route} on a rank without a disk tier")
        if piece.op.is_onboard:
            self._copier.copy(piece.dst_ids, piece.src_ids, to_host=False)
        else:
            self._copier.copy(piece.src_ids, piece.dst_ids, to_host=True)
        return {}
