"""Training code, packed once, named by its content, and fetched by every attempt of a run.

A folder (or a single file) becomes ``{storage}/code/{digest}.tar.gz``. The digest is BLAKE3 over
the *uncompressed* archive, whose bytes depend on names, contents and executable bits only: not on
owners, times, or the zlib that happens to be installed. So the same code has the same name from
every machine, and is uploaded and downloaded once.

What is left out: version control, caches and virtual environments (:data:`ALWAYS_IGNORED`), and
what a ``.spotfirstignore`` at the top of the folder names. It has one pattern per line, with
``*``, ``?`` and ``[…]``: without a slash it matches a name anywhere, with one it matches the path
from the top, and with a trailing slash only folders. ``#`` starts a comment.
"""

from __future__ import annotations

import contextlib
import fnmatch
import gzip
import io
import logging
import os
import posixpath
import re
import secrets
import shutil
import stat
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import blake3

from spotfirst.errors import CorruptObject, InvalidSpec
from spotfirst.spec import CodeRef
from spotfirst.storage import Storage, safe_path

__all__ = ["ALWAYS_IGNORED", "IGNORE_FILE", "LIMIT_BYTES", "code_path", "fetch", "pack", "publish"]

IGNORE_FILE = ".spotfirstignore"
ALWAYS_IGNORED = (
    ".git", ".hg", ".svn", ".venv", "__pycache__", "*.pyc", ".mypy_cache", ".pytest_cache",
    ".ruff_cache", ".tox", ".ipynb_checkpoints", ".DS_Store",
)  # fmt: skip
LIMIT_BYTES = 100_000_000
"""Of file contents. Code is read at every start of an instance; data belongs into a dataset."""

_log = logging.getLogger(__name__)

_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20


def code_path(ref: CodeRef) -> str:
    """Where the archive lies below the storage's root. Raises :class:`InvalidSpec`."""
    if not _DIGEST.fullmatch(ref.digest):
        msg = f"code digest {ref.digest!r} is not 64 hexadecimal digits; publish the code again"
        raise InvalidSpec(msg)
    return f"code/{ref.digest}.tar.gz"


def pack(
    source: Path, *, limit_bytes: int = LIMIT_BYTES, left_out: Path | None = None
) -> tuple[bytes, CodeRef]:
    """The uncompressed archive of ``source`` and its reference.

    ``left_out`` is a folder that is no part of it, such as a storage that lies in the source.
    ``ref.size_bytes`` is the archive's uncompressed size. Raises :class:`InvalidSpec` when the
    source is missing, empty, larger than ``limit_bytes``, or holds a link that leads out of it.
    """
    source = source.expanduser()
    files = list(_files(source, left_out))
    if not files:
        msg = (
            f"code folder {source} has no files to pack; is everything in {IGNORE_FILE}? "
            "Point `code` at the folder that holds the training script"
        )
        raise InvalidSpec(msg)
    _check_size(source, files, limit_bytes)
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, path in files:
            _add(tar, name, path)
    data = archive.getvalue()
    digest = blake3.blake3(data).hexdigest()
    return data, CodeRef(digest=digest, size_bytes=len(data), source=source.resolve().name)


def publish(storage: Storage, source: Path, *, limit_bytes: int = LIMIT_BYTES) -> CodeRef:
    """Put the packed code where attempts fetch it; nothing is sent when it is there already.

    What is there is read and verified: an archive that is damaged is replaced by a good one.

    Raises :class:`InvalidSpec` (see :func:`pack`) or a :class:`~spotfirst.errors.StorageError`.
    """
    data, ref = pack(source, limit_bytes=limit_bytes, left_out=Path(storage.url))
    path = code_path(ref)
    if not storage.exists(path):
        # Losing the race is as good: the winner wrote an archive of the same content.
        storage.create(path, gzip.compress(data, mtime=0))
    elif not _is_intact(storage, path, ref):
        _log.warning("%s/%s is damaged: it is uploaded again", storage.url, path)
        storage.write(path, gzip.compress(data, mtime=0))
    return ref


def _is_intact(storage: Storage, path: str, ref: CodeRef) -> bool:
    try:
        _verified(io.BytesIO(storage.read_range(path, 0, _most_bytes(ref))), ref)
    except CorruptObject:
        return False
    return True


def _most_bytes(ref: CodeRef) -> int:
    """The size of the archive at most: compression adds next to nothing to the worst input."""
    return ref.size_bytes + ref.size_bytes // 100 + 4096


def fetch(storage: Storage, ref: CodeRef, destination: Path, *, cache: Path) -> int:
    """Unpack the code into ``destination`` (replaced when it exists); the bytes downloaded.

    The archive is kept below ``cache`` and verified at every use. Raises :class:`CorruptObject`
    when its content is not what its name promises, or when it would write outside of
    ``destination``; a :class:`~spotfirst.errors.StorageError` when it cannot be had.
    """
    name = code_path(ref)
    kept = cache / name
    moved_bytes = 0
    archive = _from_cache(kept, ref)
    if archive is None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            moved_bytes = _download(storage, ref, kept)
            archive = _from_file(kept, ref)
        except CorruptObject as error:
            kept.unlink(missing_ok=True)
            msg = (
                f"{storage.url}/{name} is damaged: {error}. Submit the same code again, which "
                "uploads it again"
            )
            raise CorruptObject(msg) from error
    _unpack(archive, destination, origin=f"{storage.url}/{name}")
    return moved_bytes


# -- packing --------------------------------------------------------------------------------


def _files(source: Path, left_out: Path | None) -> Iterator[tuple[str, Path]]:
    """(name in the archive, path) of what is packed, sorted by name."""
    if source.is_file():
        yield source.name, source
        return
    if not source.is_dir():
        msg = (
            f"there is no code at {source}; `code` is a folder (or one file), as seen from "
            f"{Path.cwd()}"
        )
        raise InvalidSpec(msg)
    patterns = _read_patterns(source / IGNORE_FILE)
    found: list[tuple[str, Path]] = []
    for parent, folders, names in os.walk(source):
        base = Path(parent).relative_to(source).as_posix()
        folders[:] = [f for f in folders if not _is_ignored(_join(base, f), patterns, folder=True)]
        if left_out is not None and left_out.is_dir():
            folders[:] = [f for f in folders if not left_out.samefile(Path(parent) / f)]
        linked = [f for f in folders if (Path(parent) / f).is_symlink()]
        folders[:] = [f for f in folders if f not in linked]
        for name in (*names, *linked):
            path = Path(parent) / name
            inside = _join(base, name)
            if not _is_ignored(inside, patterns, folder=False) and _is_packable(path):
                found.append((inside, path))
    yield from sorted(found)


def _join(base: str, name: str) -> str:
    return name if base == "." else f"{base}/{name}"


def _is_packable(path: Path) -> bool:
    mode = path.lstat().st_mode
    return stat.S_ISREG(mode) or stat.S_ISLNK(mode)


def _read_patterns(path: Path) -> list[str]:
    patterns = list(ALWAYS_IGNORED)
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text("utf-8").splitlines():
            pattern = line.strip()
            if pattern.startswith("!"):
                msg = f"{path}: {pattern!r} takes something back in, which is not supported"
                raise InvalidSpec(msg)
            if pattern and not pattern.startswith("#"):
                patterns.append(pattern)
    return patterns


def _is_ignored(inside: str, patterns: list[str], *, folder: bool) -> bool:
    name = inside.rpartition("/")[2]
    for written in patterns:
        if written.endswith("/") and not folder:
            continue
        pattern = written.rstrip("/")
        subject = inside if "/" in pattern else name
        if fnmatch.fnmatchcase(subject, pattern.removeprefix("/")):
            return True
    return False


def _check_size(source: Path, files: list[tuple[str, Path]], limit_bytes: int) -> None:
    sizes = sorted(((path.lstat().st_size, name) for name, path in files), reverse=True)
    total = sum(size for size, _ in sizes)
    if total > limit_bytes:
        largest = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for size, name in sizes[:3])
        msg = (
            f"code folder {source} holds {total / 1e6:.1f} MB, more than {limit_bytes / 1e6:.0f} "
            f"MB; the largest are {largest}. List what training does not need in {IGNORE_FILE}, "
            "and put data into a dataset"
        )
        raise InvalidSpec(msg)


def _add(tar: tarfile.TarFile, name: str, path: Path) -> None:
    member = tarfile.TarInfo(name)
    if path.is_symlink():
        target = path.readlink().as_posix()
        if not _stays_inside(name, target):
            msg = f"{path} links to {target}, outside of the code folder: copy it in, or ignore it"
            raise InvalidSpec(msg)
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, target, 0o777
        tar.addfile(member)
        return
    data = path.read_bytes()
    member.size = len(data)
    member.mode = 0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644
    tar.addfile(member, io.BytesIO(data))


def _stays_inside(name: str, target: str) -> bool:
    """Whether a link at ``name`` leads to a place below the archive's top.

    Only plain targets count: in ``a/../b`` the ``..`` would be taken from wherever ``a`` leads.
    """
    if target.startswith("/") or posixpath.normpath(target) != target:
        return False
    resolved = posixpath.normpath(posixpath.join(posixpath.dirname(name), target))
    return not (resolved == ".." or resolved.startswith("../"))


# -- unpacking ------------------------------------------------------------------------------


def _from_cache(kept: Path, ref: CodeRef) -> bytes | None:
    try:
        return _from_file(kept, ref)
    except (FileNotFoundError, CorruptObject):
        # A disk that filled up, or a hand that slipped: the storage has the truth.
        return None


def _download(storage: Storage, ref: CodeRef, kept: Path) -> int:
    if storage.size_bytes(code_path(ref)) > _most_bytes(ref):
        raise CorruptObject("it is larger than its content can be")
    storage.download(code_path(ref), kept)
    return kept.stat().st_size


def _from_file(kept: Path, ref: CodeRef) -> bytes:
    with kept.open("rb") as file:
        return _verified(file, ref)


def _verified(compressed: BinaryIO, ref: CodeRef) -> bytes:
    """The uncompressed archive, proven to be the one that ``ref`` names."""
    hasher = blake3.blake3()
    archive = io.BytesIO()
    try:
        with gzip.GzipFile(fileobj=compressed) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                hasher.update(chunk)
                archive.write(chunk)
                if archive.tell() > ref.size_bytes:
                    break  # A bomb, or simply not ours: the digest cannot fit any more.
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        msg = f"it cannot be decompressed: {error}"
        raise CorruptObject(msg) from error
    if hasher.hexdigest() != ref.digest:
        msg = "it has other content than its name promises"
        raise CorruptObject(msg)
    return archive.getvalue()


def _unpack(archive: bytes, destination: Path, *, origin: str) -> None:
    """All of it or nothing: a half folder never appears under the final name."""
    partial = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    try:
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            members = tar.getmembers()
            _check_members(members, origin)
            for member in members:
                _extract(tar, member, partial / member.name)
        if destination.exists():
            shutil.rmtree(destination)
        partial.rename(destination)
    except (tarfile.TarError, FileExistsError, NotADirectoryError) as error:
        msg = f"{origin} cannot be unpacked: {error}"
        raise CorruptObject(msg) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    """Write one checked member, with no more than the executable bit of its mode.

    Not ``extractall``: its filters are missing from Pythons that distributions still ship, such as
    3.10.11 and 3.11.3. Raises :class:`FileExistsError` when an earlier member has the name.
    """
    if member.isdir():
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if member.issym():
        path.symlink_to(member.linkname)
        return
    content = tar.extractfile(member)
    assert content is not None  # it is a regular file
    with content, path.open("xb") as file:
        shutil.copyfileobj(content, file)
    path.chmod(0o755 if member.mode & stat.S_IXUSR else 0o644)


def _check_members(members: list[tarfile.TarInfo], origin: str) -> None:
    """Refuse what :func:`pack` never writes."""
    links = {member.name for member in members if member.issym()}
    for member in members:
        problem = _problem(member, links)
        if problem:
            msg = f"{origin} holds {member.name!r}, {problem}; nothing was unpacked"
            raise CorruptObject(msg)


def _problem(member: tarfile.TarInfo, links: set[str]) -> str:
    try:
        name = safe_path(member.name)
    except InvalidSpec:
        return "which leaves the folder it is unpacked into"
    if links.intersection(str(parent) for parent in PurePosixPath(name).parents):
        return "which lies behind a link"
    if member.issym():
        return "" if _stays_inside(name, member.linkname) else "a link that leads out"
    return "" if member.isreg() or member.isdir() else "which is neither a file nor a folder"
