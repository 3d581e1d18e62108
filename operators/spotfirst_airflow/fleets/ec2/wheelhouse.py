"""What an instance installs, in the run's own storage: Spotfirst's wheel and what it needs.

So both sides are of the same version, and an instance that reaches nothing but S3 can train.
Torch is not in it, as it comes with the image.

============================== ================================================================
below ``{storage}/wheelhouse`` what it is
============================== ================================================================
``{key}.json``                 manifest: where the wheels are, with their SHA-256; written last
``{key}/spotfirst-….whl``      the package ``spotfirst`` as it is installed here
``{needs}.json``, ``{needs}/`` the same for other people's wheels, which the manifest names too
============================== ================================================================

``key`` follows from this installation's files, so a manifest that is there needs no second look. It
is signed by the controller that wrote it (:mod:`spotfirst.signing`): one that somebody else put there
is replaced. The user data has its digest, and it has the digests of the wheels.
The other wheels stay as they are until what Spotfirst needs changes: attempts of one run are
equal. Remove ``wheelhouse/`` to have them fetched anew, when no run is active.
"""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Collection, Iterator
from importlib.util import find_spec
from pathlib import Path

import spotfirst
from spotfirst.errors import FormatError, InvalidSpec, LaunchRejected
from spotfirst.signing import Seal, default_keys
from spotfirst.storage import Storage
from spotfirst.wire import LIMIT_BYTES, Record, decode, encode

__all__ = [
    "NEEDS",
    "Download",
    "Manifest",
    "Wheel",
    "download",
    "own_wheel",
    "publish",
    "publish_all",
]

NEEDS = (
    "blake3>=1.0",
    "fsspec>=2026.1",
    "msgspec>=0.19",
    "obstore>=0.12; python_version >= '3.11'",
    "psutil>=6.0",
    "pyarrow>=18",
    "s3fs>=2026.1",
    "tenacity>=9.0",
    "xxhash>=4.1",
)
"""What the package ``spotfirst`` imports on an instance: pyproject.toml's, without its shell's."""

_log = logging.getLogger(__name__)

_FORMAT = 1
_TAG = re.compile(r"cp3(\d\d)")
_OLDEST_GLIBC = 17  # manylinux2014
_DIRECTORY = "wheelhouse"
PLATFORM = "manylinux_2_28_x86_64"
_PATIENCE_S = 600.0
_lock = threading.Lock()


class Wheel(Record):
    """One wheel: its path below ``wheelhouse/``."""

    path: str
    size_bytes: int
    sha256: str


class Manifest(Record):
    """What one kind of Python installs."""

    python_tag: str
    platform: str
    files: tuple[Wheel, ...]


Download = Callable[[Path, str, str], None]
"""Puts wheels into a folder, for a python tag and a platform."""


def publish(
    storage: Storage,
    *,
    python_tag: str,
    platform: str = PLATFORM,
    fetch: Download | None = None,
) -> str:
    """The key of the wheelhouse for such a Python, after putting there what is missing.

    One small read when nothing is; about 80 MB from the package index, once, when all is. Safe to
    repeat, to interrupt, and to race.

    Raises :class:`InvalidSpec` for a tag like no CPython's, :class:`LaunchRejected` when the
    wheels cannot be had, and a :class:`~spotfirst.errors.StorageError`.
    """
    return _publish(storage, python_tag, platform, fetch or download)[0]


def _publish(
    storage: Storage, python_tag: str, platform: str, fetch: Download
) -> tuple[str, bytes]:
    """The key, and its manifest as it is stored."""
    check_tag(python_tag)
    name, wheel = own_wheel()
    needs = _key(f"{platform}\n{NEEDS}".encode(), python_tag)
    key = _key(f"{needs}\n{hashlib.sha256(wheel).hexdigest()}".encode(), python_tag)
    if known := _signed(storage, key):
        return key, known
    with _lock:  # one download for all runs of this process
        if known := _signed(storage, key):
            return key, known
        others = _publish_needs(storage, needs, python_tag, platform, fetch)
        own = _put(storage, f"{key}/{name}", wheel)
        manifest = Manifest(python_tag=python_tag, platform=platform, files=(own, *others.files))
        return key, _put_manifest(storage, key, manifest)


def publish_all(
    storage: Storage, python_versions: Collection[str], *, fetch: Download | None = None
) -> str:
    """The keys for several Pythons (``3.12``, …) with digests, as the user data takes them."""
    tags = [f"cp{version.replace('.', '')}" for version in python_versions]
    found = [_publish(storage, tag, PLATFORM, fetch or download) for tag in tags]
    return ",".join(f"{key}@{hashlib.sha256(data).hexdigest()}" for key, data in found)


def check_tag(python_tag: str) -> None:
    """Raises :class:`InvalidSpec` for what is no CPython that Spotfirst runs on."""
    found = _TAG.fullmatch(python_tag)
    if found is None or int(found[1]) < 10:
        msg = f"python tag {python_tag!r} must be one of cp310, cp311 and so on"
        raise InvalidSpec(msg)


def _publish_needs(
    storage: Storage, needs: str, python_tag: str, platform: str, fetch: Download
) -> Manifest:
    known = _signed(storage, needs)
    if not known:
        with tempfile.TemporaryDirectory(prefix="spotfirst-wheels-") as folder:
            fetch(Path(folder), python_tag, platform)
            files = [
                _put(storage, f"{needs}/{file.name}", file.read_bytes())
                for file in sorted(Path(folder).glob("*.whl"))
            ]
        manifest = Manifest(python_tag=python_tag, platform=platform, files=tuple(files))
        known = _put_manifest(storage, needs, manifest)
    return decode(known, Manifest, path=f"{storage.url}/{_path(needs)}")


def _signed(storage: Storage, key: str) -> bytes:
    """The manifest as a controller of ours wrote it; empty without such a one."""
    data = storage.read_or_none(_path(key), limit_bytes=LIMIT_BYTES)
    if data is None:
        return b""
    try:
        _seal(storage).open(data, path=_path(key))
    except FormatError as error:
        _log.warning("the wheels are published again: %s", error)
        return b""
    return data


def _put_manifest(storage: Storage, key: str, manifest: Manifest) -> bytes:
    """Write it, unless somebody else was first; the one that counts: all it names is there."""
    data, _ = _seal(storage).close(encode(manifest), path=_path(key))
    if storage.create(_path(key), data):
        return data
    if known := _signed(storage, key):
        return known
    storage.write(_path(key), data)
    return data


def _path(key: str) -> str:
    return f"{_DIRECTORY}/{key}.json"


def _seal(storage: Storage) -> Seal:
    return Seal(storage.keys or default_keys(), "", storage.url)


def _put(storage: Storage, path: str, data: bytes) -> Wheel:
    # An index never changes a file of a name, so whoever writes it last writes the same.
    storage.write(f"{_DIRECTORY}/{path}", data)
    return Wheel(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _key(content: bytes, python_tag: str) -> str:
    digest = hashlib.sha256(b"%d\n%s\n%s" % (_FORMAT, python_tag.encode(), content)).hexdigest()
    return f"{digest[:20]}-{python_tag}"


# -- other people's wheels -------------------------------------------------------------------


def download(folder: Path, python_tag: str, platform: str) -> None:
    """Let pip put what an instance needs into ``folder``, from the index that pip here uses.

    Raises :class:`LaunchRejected` with what pip said.
    """
    minor = int(python_tag.removeprefix("cp3"))
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-cache-dir", "--dest", str(folder), "--only-binary=:all:",
        "--implementation", "cp", "--python-version", f"3.{minor}",
        *(word for name in platforms(platform) for word in ("--platform", name)),
        "pip>=24",  # for the fleet option pip_install; the image may have none
        *needs_of(minor),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False,
            timeout=_PATIENCE_S,
        )  # fmt: skip
        problem = done.stderr.strip()[-1000:] or f"pip ended with {done.returncode}"
    except subprocess.TimeoutExpired:
        done, problem = None, f"pip did not end within {_PATIENCE_S:g} s"
    if done is None or done.returncode:
        msg = (
            f"the wheels for the instances (Python 3.{minor}, {platform}) cannot be had: "
            f"{problem}. They are fetched once, with the pip of this Python ({sys.executable}): it "
            "must be there, and reach an index"
        )
        raise LaunchRejected(msg)


def needs_of(minor: int) -> list[str]:
    """:data:`NEEDS` for Python 3.``minor``.

    pip judges conditions by the Python that it runs in, so none is left for it here; and some
    that other packages have for an older Python are added.
    """
    kept = [line for line in NEEDS if ";" not in line or minor >= 11]
    return [line.partition(";")[0] for line in kept] + (
        ["async-timeout", "typing-extensions"] if minor <= 12 else []
    )


def platforms(newest: str) -> Iterator[str]:
    """The platform tags that a machine of this one can use, its own first."""
    found = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", newest)
    if found is None:
        yield newest
        return
    for glibc in range(int(found[1]), _OLDEST_GLIBC - 1, -1):
        yield f"manylinux_2_{glibc}_{found[2]}"
    yield f"manylinux2014_{found[2]}"


# -- our own ---------------------------------------------------------------------------------


def own_wheel() -> tuple[str, bytes]:
    """Name and bytes of a wheel of the installed package ``spotfirst``, also an editable one.

    The version carries a digest of the files, so that an image's own spotfirst never stands in
    for it. The same files give the same bytes.
    """
    spec = find_spec("spotfirst")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin).parent
    contents = {
        f"spotfirst/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and path.suffix not in {".pyc", ".pyo"} and not _is_hidden(path, package)
    }
    digest = hashlib.sha256()
    for name, data in contents.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    version = f"{spotfirst.__version__}+f{digest.hexdigest()[:12]}"
    info = f"spotfirst-{version}.dist-info"
    contents[f"{info}/METADATA"] = "".join(
        [
            f"Metadata-Version: 2.1\nName: spotfirst\nVersion: {version}\n",
            "Requires-Python: >=3.10\n",
            *(f"Requires-Dist: {line}\n" for line in NEEDS),
        ]
    ).encode()
    contents[f"{info}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: spotfirst\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    contents[f"{info}/RECORD"] = _record(contents, f"{info}/RECORD")
    return f"spotfirst-{version}-py3-none-any.whl", _archive(contents)


def _is_hidden(path: Path, package: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in path.relative_to(package).parts)


def _record(contents: dict[str, bytes], own: str) -> bytes:
    """Every file with its hash ("Recording installed projects", packaging.python.org)."""
    lines = []
    for name, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{name},sha256={digest},{len(data)}\n")
    return "".join([*lines, f"{own},,\n"]).encode()


def _archive(contents: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    # Stored, not deflated: another zlib would make other bytes of the same files.
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name)  # of 1980, which is the oldest that a zip knows
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    return packed.getvalue()
