"""A run on this machine that is taken back in one region, and goes on in another."""

from __future__ import annotations

from decimal import Decimal

from spotfirst.checkpoints.chain import Commit
from spotfirst.state import Phase
from tests.endtoend.conftest import STEPS
from tests.endtoend.driving import Place, driving

USD_GB = Decimal(5000)
"""The checkpoints of a test are small."""


def test_a_run_goes_on_in_another_region_and_its_bill_has_the_way(place: Place) -> None:
    options = {
        "zones": ["east-1a", "west-2a"], "storage_region": "east-1", "egress_usd_gb": str(USD_GB),
        "notice_s": 5.0,
    }  # fmt: skip
    # The region that took the instance back is left alone for as long as the test takes.
    request = place.request(
        str(STEPS), fleet_options=options, checkpoint_period_s=0.3, policy_options={"retry_s": 3600}
    )
    with driving(place, request) as drive:
        drive.until(drive.has_checkpoint)
        drive.slow(True)
        drive.interrupt(1, notice=True)
        assert drive.until_training(2) > 0
        drive.slow(False)
        state = drive.until_over()
    assert state.phase is Phase.SUCCEEDED
    assert [a.pool.zone for a in state.attempts if a.launched] == ["east-1a", "west-2a"]
    commits = [entry for entry in drive.chain_entries() if isinstance(entry, Commit)]
    restored = [commit.size_bytes for commit in commits if commit.attempt == 1][-1]
    written = sum(commit.new_bytes for commit in commits if commit.attempt == 2)
    fetched = state.attempts[1].ended.moved_bytes if state.attempts[1].ended else 0
    assert min(restored, written) > 0
    near, far = drive.bill().charges
    assert near.egress_usd == 0
    exact = (restored + written + fetched) * USD_GB / 10**9
    assert far.egress_usd == round(exact, 4) > 0
    assert drive.bill().total_usd == near.cost_usd + far.cost_usd + far.egress_usd
