from __future__ import annotations

from itertools import product

import pytest

from kvbm_core.blocks.state import TRANSITIONS, BlockEvent, BlockState, moved
from kvbm_core.errors import IllegalTransition

_S, _E = BlockState, BlockEvent


def test_a_block_goes_round() -> None:
    state = _S.RESET
    for event in (_E.SEQUENCE_BEGUN, _E.TOKENS_ADDED, _E.COMMITTED, _E.REGISTERED, _E.DROPPED):
        state = moved(state, event)
    assert state is _S.RESET


@pytest.mark.parametrize("state", BlockState)
def test_every_block_can_be_dropped(state: BlockState) -> None:
    assert moved(state, _E.DROPPED) is _S.RESET


@pytest.mark.parametrize(
    ("state", "event"), [edge for edge in product(_S, _E) if edge not in TRANSITIONS]
)
def test_there_is_no_other_way_and_the_error_says_what_to_do(
    state: BlockState, event: BlockEvent
) -> None:
    with pytest.raises(IllegalTransition, match=rf"a {state.value} block can't {event.value}\. \w"):
        moved(state, event)
