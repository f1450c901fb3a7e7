"""The crash benches in small: kills and faults as bench/ deals them out, and that they can fail."""

import pytest

from bench import kills


@pytest.mark.parametrize("stage", kills.STAGES)
def test_nothing_is_lost_by_kills(stage, tmp_path):
    count = kills.kill_stage(stage, 2, 0, tmp_path)
    assert count.faults == []
    assert count.kills == 2
    assert count.rounds >= 1
    assert count.most_in_flight <= kills.IN_FLIGHT
