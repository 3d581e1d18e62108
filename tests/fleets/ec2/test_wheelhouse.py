"""The wheelhouse: the same version on both sides, whole or not there."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from spotfirst.errors import InvalidSpec, LaunchRejected, StorageUnavailable
from spotfirst.storage import Storage, open_storage
from spotfirst.wire import decode, encode
from spotfirst_airflow.fleets.ec2 import wheelhouse
from spotfirst_airflow.fleets.ec2.wheelhouse import Manifest, Wheel, own_wheel, publish

ROOT = Path(__file__).parents[3]


class Index:
    """In place of the package index."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, folder: Path, python_tag: str, platform: str) -> None:
        self.asked.append((python_tag, platform))
        for name in ("attrs-1-py3-none-any.whl", "pip-1-py3-none-any.whl"):
            (folder / name).write_bytes(name.encode())


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "storage"))


@pytest.fixture
def index() -> Index:
    return Index()


def manifest(storage: Storage, key: str) -> Manifest:
    path = f"wheelhouse/{key}.json"
    return decode(storage.read(path), Manifest, path=path)


# -- our own wheel --------------------------------------------------------------------------


def test_our_wheel_holds_the_package_of_the_instance_and_nothing_else() -> None:
    name, data = own_wheel()
    names = zipfile.ZipFile(BytesIO(data)).namelist()
    tops = {entry.partition("/")[0] for entry in names}
    assert tops == {"spotfirst", name.removesuffix("-py3-none-any.whl") + ".dist-info"}
    assert {"spotfirst/agent/__main__.py", "spotfirst/py.typed"} <= set(names)
    assert not [entry for entry in names if entry.endswith(".pyc")]


def test_the_same_files_give_the_same_wheel() -> None:
    assert own_wheel() == own_wheel()


def test_pip_installs_our_wheel(tmp_path: Path) -> None:
    name, data = own_wheel()
    (tmp_path / name).write_bytes(data)
    pip = [sys.executable, "-m", "pip", "--isolated", "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--target", str(tmp_path / "x"), str(tmp_path / name)], check=True)
    say = "import spotfirst, spotfirst.agent; print(spotfirst.__file__)"
    command = [sys.executable, "-S", "-c", say]
    found = subprocess.check_output(command, env={"PYTHONPATH": str(tmp_path / "x")}, text=True)
    assert found.startswith(str(tmp_path / "x"))


def test_it_needs_what_the_project_does_without_the_shells_packages() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index("dependencies = [") + 1
    declared = [
        line.strip().rstrip(",").strip('"') for line in lines[start : lines.index("]", start)]
    ]
    wanted = [d for d in declared if not d.startswith(("#", "rich", "typer"))]
    assert sorted(wanted) == sorted(wheelhouse.NEEDS)


# -- publishing -----------------------------------------------------------------------------


def test_the_manifest_names_our_wheel_and_the_others(storage: Storage, index: Index) -> None:
    key = publish(storage, python_tag="cp312", fetch=index)
    found = manifest(storage, key)
    names = [Path(file.path).name for file in found.files]
    assert names == [own_wheel()[0], "attrs-1-py3-none-any.whl", "pip-1-py3-none-any.whl"]
    assert index.asked == [("cp312", "manylinux_2_28_x86_64")]
    assert key.endswith("-cp312")
    for file in found.files:
        assert storage.size_bytes(f"wheelhouse/{file.path}") == file.size_bytes


def test_what_is_there_costs_one_read(
    storage: Storage, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(storage, python_tag="cp312", fetch=index)
    calls: list[str] = []

    def counting(self: Storage, verb: str, *rest: Any, **more: Any) -> Any:
        calls.append(verb)
        return original(self, verb, *rest, **more)

    original: Callable[..., Any] = Storage._call
    monkeypatch.setattr(Storage, "_call", counting)
    publish(storage, python_tag="cp312", fetch=index)
    assert calls == ["read"]


def test_another_spotfirst_fetches_only_itself(
    storage: Storage, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = publish(storage, python_tag="cp312", fetch=index)
    monkeypatch.setattr(wheelhouse, "own_wheel", lambda: ("spotfirst-2-py3-none-any.whl", b"new"))
    after = publish(storage, python_tag="cp312", fetch=index)
    assert before != after
    assert len(index.asked) == 1
    assert manifest(storage, after).files[1:] == manifest(storage, before).files[1:]


def test_each_python_has_its_own(storage: Storage, index: Index) -> None:
    keys = wheelhouse.publish_all(storage, ["3.12", "3.13"], fetch=index).split(",")
    assert [re.sub(".*-|@.*", "", key) for key in keys] == ["cp312", "cp313"]
    assert [tag for tag, _ in index.asked] == ["cp312", "cp313"]


@pytest.mark.parametrize("after", range(5))
def test_whoever_dies_on_the_way_leaves_no_half_wheelhouse(
    storage: Storage, index: Index, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    left = after

    def dying(self: Storage, verb: str, *rest: Any, **more: Any) -> Any:
        nonlocal left
        if verb in {"write", "create"}:
            left -= 1
            if left < 0:
                raise StorageUnavailable("the storage is away")
        return original(self, verb, *rest, **more)

    original: Callable[..., Any] = Storage._call
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "_call", dying)
        with pytest.raises(StorageUnavailable):
            publish(storage, python_tag="cp312", fetch=index)
    for name in storage.list("wheelhouse"):
        if name.endswith(".json"):
            for file in manifest(storage, name.removesuffix(".json")).files:
                assert storage.exists(f"wheelhouse/{file.path}")
    assert len(manifest(storage, publish(storage, python_tag="cp312", fetch=index)).files) == 3


def test_of_two_who_fetch_other_versions_the_first_counts(storage: Storage, index: Index) -> None:
    def late(folder: Path, python_tag: str, platform: str) -> None:
        publish_lock.release()  # the other one comes in between
        try:
            publish(storage, python_tag=python_tag, fetch=index)
        finally:
            publish_lock.acquire()
        (folder / "attrs-2-py3-none-any.whl").write_bytes(b"newer")

    publish_lock = wheelhouse._lock
    key = publish(storage, python_tag="cp312", fetch=late)
    names = [Path(file.path).name for file in manifest(storage, key).files]
    assert "attrs-2-py3-none-any.whl" not in names
    assert "attrs-1-py3-none-any.whl" in names


@pytest.mark.parametrize("tag", ["cp39", "cp27", "py3", "pp310", "cp312; rm", ""])
def test_a_tag_of_no_python_of_ours_is_refused(storage: Storage, tag: str) -> None:
    with pytest.raises(InvalidSpec, match="must be one of cp310"):
        publish(storage, python_tag=tag)


# -- pip ------------------------------------------------------------------------------------


def test_pip_is_asked_for_what_every_machine_of_the_platform_takes() -> None:
    names = list(wheelhouse.platforms("manylinux_2_28_x86_64"))
    assert names[0] == "manylinux_2_28_x86_64"
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64"} <= set(names)
    assert list(wheelhouse.platforms("linux_x86_64")) == ["linux_x86_64"]


def test_conditions_are_judged_for_the_instances_python() -> None:
    assert any(need.startswith("obstore") for need in wheelhouse.needs_of(11))
    assert not any(need.startswith("obstore") for need in wheelhouse.needs_of(10))
    assert not any(";" in need for need in wheelhouse.needs_of(13))


def test_without_an_index_the_error_says_what_is_missing(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(LaunchRejected, match=r"(?s)Python 3\.12.* cannot be had: .*No matching"):
        publish(storage, python_tag="cp312")
    assert storage.list("wheelhouse") == []


def _forged(storage: Storage, key: str) -> bytes:
    """A manifest that names a wheel of somebody else's."""
    evil = Wheel(path=f"{key}/evil.whl", size_bytes=1, sha256=hashlib.sha256(b"x").hexdigest())
    storage.write(f"wheelhouse/{evil.path}", b"x")
    return encode(Manifest(python_tag="cp312", platform="p", files=(evil,)))


@pytest.mark.parametrize("before", [True, False], ids=["made up", "replaced"])
def test_a_manifest_that_no_controller_signed_is_never_installed(
    storage: Storage, index: Index, before: bool
) -> None:
    """Whoever writes to the storage would else choose what every instance runs."""
    key = publish(open_storage(f"memory://elsewhere-{before}"), python_tag="cp312", fetch=index)
    if before:
        storage.write(f"wheelhouse/{key}.json", _forged(storage, key))
    [entry] = wheelhouse.publish_all(storage, ["3.12"], fetch=index).split(",")
    if not before:
        storage.write(f"wheelhouse/{key}.json", _forged(storage, key))
        assert wheelhouse.publish_all(storage, ["3.12"], fetch=index) == entry
    data = storage.read(f"wheelhouse/{key}.json")
    assert entry == f"{key}@{hashlib.sha256(data).hexdigest()}"
    assert b"evil" not in data
