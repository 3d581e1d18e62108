"""Instances of the local fleet: real processes, launched once, and gone when they are gone."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from spotfirst.errors import FleetUnavailable, LaunchRejected, NoCapacity
from spotfirst.market import Market, Pool
from spotfirst.run import Run
from spotfirst.storage import open_storage
from spotfirst.wire import utc_now
from spotfirst_airflow.fleets import InstanceState
from spotfirst_airflow.fleets.base import ATTEMPT_TAG, RUN_TAG, STORAGE_TAG
from spotfirst_airflow.fleets.local import LocalFleet
from spotfirst_airflow.fleets.local.fleet import _BOOT_PATIENCE_S
from spotfirst_airflow.fleets.local.registry import Boot, Registry, Running
from tests.fleets.worlds import World, ask, ended, one, request, running
from tests.waiting import PATIENCE_S, wait_until

DODGER = """
import os, subprocess, sys, time
# A grandchild in a session of its own, an orphan, without the instance's environment.
subprocess.Popen(["/bin/sh", "-c", f"setsid env -i {sys.executable} -S -c 'import time; "
    "time.sleep(300)' " + os.environ["SPOTFIRST_WORKDIR"] + " & exit 0"]).wait()
open(os.environ["SPOTFIRST_WORKDIR"] + "/ready", "w").close()
time.sleep(300)
"""


def agent(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def scripted(*segments: dict[str, Any], zone: str = "local-a") -> dict[str, Any]:
    return {"kind": "scripted", "zones": {zone: list(segments)}}


def pid(world: World, kind: str, token: str) -> int:
    """The process id of a token's supervisor or agent."""
    folder = Registry(world.root).folder(token)
    if kind == "supervisor":
        boot = folder.read(Boot)
        assert boot is not None
        assert boot.process is not None
        return boot.process.pid
    found = wait_until(lambda: folder.read(Running))
    return int(found.agent.pid)


# -- life -----------------------------------------------------------------------------------------


def test_an_instance_runs_its_agent_with_what_it_must_know(world: World) -> None:
    code = "import json, os; json.dump(dict(os.environ), open('env', 'w')); input_ = 0"
    fleet = world.fleet({"AWS_SECRET_ACCESS_KEY": "hush"}, agent_command=agent(code))
    token = world.token()
    started = fleet.launch(request(token))
    end = ended(fleet, token)
    told = json.loads((world.folder(token) / "env").read_text())
    assert told["SPOTFIRST_STORAGE"] == "file:///nowhere"
    assert (told["SPOTFIRST_RUN"], told["SPOTFIRST_ATTEMPT"]) == ("run-1", "1")
    assert told["SPOTFIRST_MAX_LIFE_S"] == "600"
    assert Path(told["SPOTFIRST_CACHE"]).is_dir()
    assert Path(told["SPOTFIRST_WORKDIR"]).is_dir()
    assert told["SPOTFIRST_INSTANCE"] == token
    assert told["AWS_EC2_METADATA_SERVICE_ENDPOINT"].startswith("http://127.0.0.1:")
    assert told["AWS_SECRET_ACCESS_KEY"] == "hush"
    assert (end.instance_id, end.started_at) == (started.instance_id, started.started_at)
    assert end.ended_by == "itself"
    assert end.ended_at is not None
    assert end.started_at < end.ended_at <= utc_now()


@pytest.mark.parametrize(("purchase", "told"), [(Market.SPOT, "5"), (Market.ON_DEMAND, None)])
def test_a_spot_instance_knows_how_often_its_pool_is_interrupted(
    world: World, purchase: Market, told: str | None
) -> None:
    code = "import json, os; json.dump(dict(os.environ), open('env', 'w'))"
    market = {"kind": "synthetic", "mean_up_s": 300.0}
    fleet = world.fleet(agent_command=agent(code), market=market, time_scale=60)
    fleet.launch(request("t", market=purchase))
    ended(fleet, "t")
    environment = json.loads((world.folder("t") / "env").read_text())
    assert environment.get("SPOTFIRST_INTERRUPTION_MEAN_S") == told


def test_airflows_own_secrets_do_not_reach_the_instance(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "secret")
    fleet = world.fleet(agent_command=agent("import os; print(sorted(os.environ))"))
    fleet.launch(request("t"))
    ended(fleet, "t")
    log = (world.folder("t") / "instance.log").read_text()
    assert "SPOTFIRST_RUN" in log
    assert "FERNET" not in log


def test_credentials_are_never_written_to_disk(world: World) -> None:
    fleet = world.fleet({"AWS_SECRET_ACCESS_KEY": "hush-hush"})
    fleet.launch(request("t"))
    running(fleet, "t")
    for path in world.root.rglob("*"):
        assert not path.is_file() or b"hush-hush" not in path.read_bytes()


def test_an_agent_that_fails_ends_the_instance_for_an_unknown_reason(world: World) -> None:
    fleet = world.fleet(agent_command=agent("raise SystemExit(3)"))
    fleet.launch(request("t"))
    assert ended(fleet, "t").ended_by == "unknown"


def test_an_agent_that_cannot_work_is_reported_for_with_its_reason(
    world: World, tmp_path: Path
) -> None:
    code = (
        "import os, pathlib;"
        "pathlib.Path(os.environ['SPOTFIRST_WORKDIR'], 'unfit.txt').write_text('too old');"
        "raise SystemExit(78)"
    )
    fleet = world.fleet(agent_command=agent(code))
    storage = open_storage(str(tmp_path / "storage"))
    fleet.launch(request("t", storage_url=storage.url))
    assert ended(fleet, "t").ended_why == "too old"
    report = Run(storage, "run-1").exit_report(1)
    assert report is not None
    assert (report.cause, report.message) == ("unfit", "too old")


def test_an_instance_boots_for_as_long_as_it_was_told(world: World) -> None:
    fleet = world.fleet(boot_s=3)
    launched = fleet.launch(request("t"))
    assert launched.state is InstanceState.PENDING
    running(fleet, "t")
    assert utc_now() - launched.started_at >= timedelta(seconds=3)


def test_an_instance_ends_itself_soon_after_its_maximum_life(world: World) -> None:
    fleet = world.fleet()
    launched = fleet.launch(request("t", max_life_s=1.0))
    end = ended(fleet, "t")
    assert end.ended_by == "itself"
    assert end.ended_at is not None
    assert 1.0 <= (end.ended_at - launched.started_at).total_seconds() < 5


def test_owned_are_the_living_with_tags_that_lead_to_their_owner(world: World) -> None:
    fleet = world.fleet()
    for token in ("a", "b"):
        fleet.launch(request(token, attempt=7))
    fleet.terminate(["a"])
    [left] = world.fleet().owned()
    assert left.token == "b"
    assert left.tags == {
        "team": "search", RUN_TAG: "run-1", ATTEMPT_TAG: "7", STORAGE_TAG: "file:///nowhere",
    }  # fmt: skip


def test_a_clock_that_runs_faster_is_told_as_billed_seconds_per_second(world: World) -> None:
    fleet = world.fleet(time_scale=60)
    assert fleet.launch(request("t")).clock_rate == 60


# -- once -----------------------------------------------------------------------------------------


def test_the_same_token_is_the_same_instance(world: World) -> None:
    first = world.fleet().launch(request("t"))
    again = world.fleet().launch(request("t"))
    assert again.instance_id == first.instance_id
    assert len(world.fleet().owned()) == 1


def _launch(options: dict[str, Any], token: str, gate: Any, found: Any) -> None:
    gate.wait()
    found.put(LocalFleet(options, environment={}).launch(request(token)).instance_id)


def test_processes_that_race_for_a_token_get_one_instance(world: World) -> None:
    count = "import os, time; open(f'started-{os.getpid()}', 'w').close(); time.sleep(300)"
    options = {"root": str(world.root), "agent_command": agent(count)}
    options = LocalFleet.settle(options, now=utc_now())
    context = multiprocessing.get_context("spawn")
    gate, found = context.Barrier(4), context.Queue()
    racers = [context.Process(target=_launch, args=(options, "t", gate, found)) for _ in range(4)]
    for racer in racers:
        racer.start()
    assert len({found.get(timeout=PATIENCE_S) for _ in racers}) == 1
    for racer in racers:
        racer.join()
    running(world.fleet(), "t")
    time.sleep(0.3)  # a second agent would have started by now
    assert len(list(world.folder("t").glob("started-*"))) == 1


def test_a_launcher_that_died_after_its_claim_is_stood_in_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = world.fleet()
    with monkeypatch.context() as patch:
        patch.setattr(fleet, "_start", lambda folder: None)
        dead = fleet.launch(request("t"))
    assert dead.state is InstanceState.PENDING
    again = world.fleet().launch(request("t"))
    assert again.instance_id == dead.instance_id
    assert running(fleet, "t").state is InstanceState.RUNNING


def test_an_instance_that_nobody_started_is_given_up_and_lasted_no_time(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = world.fleet()
    with monkeypatch.context() as patch:
        patch.setattr(fleet, "_start", lambda folder: None)
        fleet.launch(request("t"))
    later = LocalFleet(
        LocalFleet.settle({"root": str(world.root)}, now=utc_now()),
        environment={},
        clock=lambda: utc_now() + timedelta(seconds=_BOOT_PATIENCE_S + 1),
    )
    given_up = one(later, "t")
    assert given_up.state is InstanceState.TERMINATED
    assert given_up.ended_at == given_up.started_at
    # Should the launcher only have been slow, its supervisor finds that it is too late.
    fleet._start(fleet._registry.folder("t"))
    assert world.processes() == {}
    assert one(fleet, "t") == given_up


def test_a_supervisor_that_is_late_does_not_boot_what_was_given_up(world: World) -> None:
    fleet = world.fleet()
    folder = fleet._registry.folder("t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet, "_start", lambda folder: None)
        fleet.launch(request("t"))
    assert folder.create(Boot(at=utc_now()))  # whoever declares it dead, before its last word
    launched = world.fleet().launch(request("t"))
    assert launched.state is InstanceState.TERMINATED
    assert world.processes() == {}


def test_a_terminated_token_gives_its_terminated_instance_again(world: World) -> None:
    fleet = world.fleet()
    first = fleet.launch(request("t"))
    fleet.terminate(["t"])
    again = fleet.launch(request("t"))
    assert (again.instance_id, again.state) == (first.instance_id, InstanceState.TERMINATED)


def test_a_token_that_was_terminated_before_its_launch_cannot_be_launched(world: World) -> None:
    world.fleet().terminate(["t", "../t", ""])
    with pytest.raises(LaunchRejected, match="withdrawn"):
        world.fleet().launch(request("t"))
    assert world.fleet().describe(["t", "never", "../t"]) == {}


@pytest.mark.parametrize("token", ["", "../t", "a/b", ".hidden", "x" * 129])
def test_a_token_that_is_no_file_name_is_rejected(world: World, token: str) -> None:
    with pytest.raises(LaunchRejected, match="token"):
        world.fleet().launch(request(token))


def test_of_a_launch_and_a_termination_at_once_nothing_is_left(world: World) -> None:
    fleet = world.fleet()

    def launch(token: str) -> None:
        try:
            fleet.launch(request(token))
        except LaunchRejected:
            return

    for delay_s in (0.0, 0.002, 0.01, 0.05, 0.15, 0.3):
        token = world.token()
        launcher = threading.Thread(target=launch, args=(token,))
        launcher.start()
        time.sleep(delay_s)
        fleet.terminate([token])
        launcher.join()
        assert fleet.owned() == []
    wait_until(lambda: not world.processes(), patience_s=PATIENCE_S)


def test_a_supervisor_that_cannot_start_is_a_rejected_launch_that_says_why(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "broken" / "msgspec"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('msgspec is broken')")
    monkeypatch.setenv("PYTHONPATH", str(broken.parent))
    with pytest.raises(LaunchRejected, match="msgspec is broken"):
        world.fleet().launch(request("t"))
    assert world.fleet().describe(["t"]) == {}


def test_files_that_cannot_be_used_say_nothing_about_instances(world: World) -> None:
    world.root.parent.mkdir(exist_ok=True)
    world.root.write_text("a file where the registry should be")
    with pytest.raises(FleetUnavailable, match="root"):
        world.fleet().launch(request("t"))
    world.root.unlink()


# -- the market -----------------------------------------------------------------------------------


def test_a_zone_gives_as_many_spot_instances_as_it_has(world: World) -> None:
    fleet = world.fleet(market=scripted({"from_s": 0, "capacity": 1}))
    fleet.launch(request("t1"))
    with pytest.raises(NoCapacity, match="room for 1"):
        fleet.launch(request("t2"))
    assert fleet.describe(["t2"]) == {}
    fleet.launch(request("t3", market=Market.ON_DEMAND))
    fleet.terminate(["t1"])
    fleet.launch(request("t2"))


def test_threads_that_race_for_the_last_instance_get_one(world: World) -> None:
    fleet = world.fleet(market=scripted({"from_s": 0, "capacity": 1}))

    def launch(token: str) -> bool:
        try:
            fleet.launch(request(token))
        except NoCapacity:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(launch, ["t1", "t2", "t3", "t4"])) == 1
    assert len(fleet.owned()) == 1


def test_runs_with_markets_of_their_own_do_not_compete(world: World) -> None:
    market = scripted({"from_s": 0, "capacity": 1})
    world.fleet(market=market).launch(request("t1"))
    world.fleet(market=market).launch(request("t2"))  # created later: another epoch
    assert len(world.fleet().owned()) == 2


def test_the_newest_spot_instance_goes_after_its_notice(world: World) -> None:
    market = scripted({"from_s": 0, "capacity": 2}, {"from_s": 400, "capacity": 1})
    fleet = world.fleet(market=market, time_scale=100, notice_s=100)
    for token in ("old", "new"):
        fleet.launch(request(token))
    fleet.launch(request("paid", market=Market.ON_DEMAND))
    notice = wait_until(lambda: one(fleet, "new").notice)
    assert notice.kind == "interruption"
    began = fleet._options.epoch
    assert began is not None
    assert timedelta(seconds=4) <= notice.seen_at - began < timedelta(seconds=5)
    assert notice.time - notice.seen_at == timedelta(seconds=1)
    end = ended(fleet, "new")
    assert end.ended_by == "fleet"
    assert end.ended_at is not None
    assert 0 <= (end.ended_at - notice.time).total_seconds() < 1
    for token in ("old", "paid"):
        assert one(fleet, token).notice is None
        assert one(fleet, token).state is InstanceState.RUNNING


def test_the_agent_can_read_its_notice_from_the_metadata_service(world: World) -> None:
    market = scripted({"from_s": 0, "capacity": 1}, {"from_s": 300, "capacity": 0})
    fleet = world.fleet(market=market, time_scale=100, notice_s=300)
    fleet.launch(request("t"))
    running(fleet, "t")
    endpoint = json.loads((world.folder("t") / "running.json").read_text())["endpoint"]
    ttl = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    _, token = ask(endpoint + "/latest/api/token", method="PUT", headers=ttl)
    headers = {"X-aws-ec2-metadata-token": token}
    url = endpoint + "/latest/meta-data/spot/instance-action"
    assert ask(url, headers=headers)[0] == 404
    notice = wait_until(lambda: one(fleet, "t").notice)
    status, action = ask(url, headers=headers)
    assert status == 200
    assert json.loads(action)["time"] == notice.time.strftime("%Y-%m-%dT%H:%M:%SZ")


def test_an_interruption_without_notice_comes_at_once(world: World) -> None:
    market = scripted({"from_s": 0, "capacity": 1}, {"from_s": 2, "capacity": 0, "notice": False})
    fleet = world.fleet(market=market)
    fleet.launch(request("t"))
    end = ended(fleet, "t")
    assert (end.ended_by, end.notice) == ("fleet", None)


@pytest.mark.parametrize("notice", [True, False])
def test_an_interruption_can_be_asked_for_and_is_the_fleets(world: World, notice: bool) -> None:
    fleet = world.fleet(notice_s=0.5)
    fleet.launch(request("t"))
    fleet.launch(request("paid", market=Market.ON_DEMAND))
    assert fleet.interrupt("t", notice=notice)
    end = ended(fleet, "t")
    assert (end.ended_by, end.notice is not None) == ("fleet", notice)
    assert [fleet.interrupt(token) for token in ("t", "paid", "never", "../t")] == [False] * 4


def test_an_interruption_leaves_no_process_whatever_it_did_to_hide(world: World) -> None:
    market = scripted({"from_s": 0, "capacity": 1}, {"from_s": 400, "capacity": 0, "notice": False})
    fleet = world.fleet(market=market, time_scale=100, agent_command=agent(DODGER))
    fleet.launch(request("t"))
    wait_until((world.folder("t") / "work" / "ready").exists)
    assert len(world.processes()) == 3
    ended(fleet, "t")
    wait_until(lambda: not world.processes(), patience_s=PATIENCE_S)


# -- violence -------------------------------------------------------------------------------------


def test_termination_is_at_once_and_leaves_no_process(world: World) -> None:
    fleet = world.fleet(agent_command=agent(DODGER))
    fleet.launch(request("t"))
    wait_until((world.folder("t") / "work" / "ready").exists)
    fleet.terminate(["t"])
    assert one(fleet, "t").ended_by == "request"
    wait_until(lambda: not world.processes(), patience_s=PATIENCE_S)


def test_killing_the_agent_ends_the_instance(world: World) -> None:
    fleet = world.fleet(agent_command=agent(DODGER))
    fleet.launch(request("t"))
    wait_until((world.folder("t") / "work" / "ready").exists)
    os.kill(pid(world, "agent", "t"), signal.SIGKILL)
    assert ended(fleet, "t").ended_by == "unknown"
    wait_until(lambda: not world.processes(), patience_s=PATIENCE_S)


def test_killing_the_supervisor_ends_the_instance(world: World) -> None:
    spawn = "import subprocess; subprocess.run(['sleep', '300'], start_new_session=True)"
    fleet = world.fleet(agent_command=agent(spawn))
    fleet.launch(request("t"))
    wait_until(lambda: len(world.processes()) == 3)
    agent_pid = pid(world, "agent", "t")
    os.kill(pid(world, "supervisor", "t"), signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(agent_pid), patience_s=PATIENCE_S)  # nobody looked yet
    end = one(fleet, "t")
    assert (end.state, end.ended_by) == (InstanceState.TERMINATED, "unknown")
    assert end.ended_at is not None
    assert timedelta(0) <= utc_now() - end.ended_at < timedelta(seconds=3)
    assert world.processes() == {}


def test_a_supervisor_that_hangs_does_not_keep_its_instance(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spotfirst_airflow.fleets.local.fleet._TERMINATE_PATIENCE_S", 0.3)
    fleet = world.fleet()
    fleet.launch(request("t"))
    running(fleet, "t")
    os.kill(pid(world, "supervisor", "t"), signal.SIGSTOP)
    fleet.terminate(["t"])
    assert one(fleet, "t").ended_by == "request"


def test_the_process_id_of_a_dead_supervisor_may_be_anyones(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request("t"))
    running(fleet, "t")
    os.kill(pid(world, "supervisor", "t"), signal.SIGKILL)
    wait_until(lambda: not world.processes())
    # As after a reboot: the file names a process that lives, and that is not ours.
    path = world.folder("t") / "boot.json"
    record = json.loads(path.read_text())
    record["process"]["pid"] = os.getpid()
    path.write_text(json.dumps(record))
    # Soon rather than at once: the kernel may still be clearing away what the dead one held.
    wait_until(lambda: one(fleet, "t").state is InstanceState.TERMINATED)
    fleet.terminate(["t"])


def test_a_deleted_registry_ends_its_instances(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request("t"))
    running(fleet, "t")
    shutil.rmtree(world.root)
    wait_until(lambda: not world.processes(), patience_s=PATIENCE_S)


# -- housekeeping ---------------------------------------------------------------------------------


def test_disks_go_after_a_day_and_tokens_after_a_month(world: World) -> None:
    fleet = world.fleet(agent_command=agent("print('hello')"))
    fleet.launch(request("t"))
    ended(fleet, "t")
    wait_until(lambda: not world.processes())
    registry = Registry(world.root)
    folder = registry.folder("t")
    registry.prune(utc_now() + timedelta(hours=23))
    assert folder.log.exists()
    registry.prune(utc_now() + timedelta(hours=25))
    assert not folder.log.exists()
    assert not folder.work.exists()
    assert fleet.launch(request("t")).state is InstanceState.TERMINATED
    registry.prune(utc_now() + timedelta(days=31))
    assert fleet.describe(["t"]) == {}


def test_pruning_spares_the_living(world: World) -> None:
    fleet = world.fleet()
    fleet.launch(request("t"))
    running(fleet, "t")
    Registry(world.root).prune(utc_now() + timedelta(days=365))
    assert one(fleet, "t").state is InstanceState.RUNNING


def test_another_pool_is_another_price(world: World) -> None:
    fleet = world.fleet()
    cheap = fleet.launch(request("t", pool=Pool(instance_type="g4dn.xlarge", zone="local-b")))
    assert (str(cheap.price_usd_h), str(cheap.on_demand_usd_h)) == ("0.2100", "0.526")
    assert "AWS" not in cheap.price_source
