from __future__ import annotations

from itertools import product

import pytest

from kvbm_core.errors import IllegalTransition
from kvbm_core.slot import TRANSITIONS, Slot, SlotEvent, SlotState, diagram


@pytest.mark.parametrize(("state", "event"), list(product(SlotState, SlotEvent)))
def test_a_slot_moves_along_the_table_or_not_at_all(state: SlotState, event: SlotEvent) -> None:
    slot = Slot("r", [], 0, state)
    if (state, event) in TRANSITIONS:
        slot.move(event)
        assert slot.state is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition, match=f"request r is {state.value}"):
            slot.move(event)
        assert slot.state is state


def test_finished_has_no_way_out() -> None:
    assert not [state for state, _ in TRANSITIONS if state is SlotState.FINISHED]


def test_every_state_leads_to_finished() -> None:
    leading = {SlotState.FINISHED}
    for _ in SlotState:
        leading |= {source for (source, _), target in TRANSITIONS.items() if target in leading}
    assert leading == set(SlotState)


def test_every_state_is_reached_from_waiting() -> None:
    reached = {SlotState.WAITING}
    for _ in SlotState:
        reached |= {target for (source, _), target in TRANSITIONS.items() if source in reached}
    assert reached == set(SlotState)


def test_a_load_in_flight_can_only_end_or_be_left_behind() -> None:
    events = {event for state, event in TRANSITIONS if state is SlotState.LOADING}
    assert events == {SlotEvent.LOAD_ENDED, SlotEvent.FINISHED_BUSY}


def test_the_diagram_has_every_edge() -> None:
    lines = diagram().splitlines()
    assert lines[0] == "stateDiagram-v2"
    assert len(lines) == len(TRANSITIONS) + 3
    assert "    LOADING --> RUNNING: load ended" in lines
