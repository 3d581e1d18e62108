"""What was trained, put where others read it: one file of weights, or a folder of files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from spotfirst.checkpoints.exporting import export_safetensors, state_of
from spotfirst.checkpoints.manifest import read_manifest
from spotfirst.checkpoints.mirroring import mirror
from spotfirst.errors import InvalidSpec, StorageError
from spotfirst.run import Run
from spotfirst.storage import Storage, open_storage

__all__ = ["check_target", "export_result"]

OpenStorage = Callable[[str], Storage]


def check_target(target: str, open_url: OpenStorage = open_storage) -> None:
    """Raise :class:`InvalidSpec` for a place that nothing can be exported to."""
    _split(target, open_url)


def export_result(run: Run, target: str, *, open_url: OpenStorage = open_storage) -> str:
    """Write the newest checkpoint of a run to ``target``; returns the target's URL or path.

    The object ``model`` of a trainer becomes one safetensors file, which needs no torch here. It
    appears whole or not at all, and replaces one of that name. The files of a script are written
    below the folder ``target``; other files there stay. Takes as much room in the temporary folder
    as the export has bytes. Raises :class:`InvalidSpec` for a run without a checkpoint,
    :class:`UnsupportedState` for a model that is not only arrays, and what the storage raises.
    """
    newest = run.chain().refresh().newest()
    if newest is None:
        msg = f"run {run.run_id} has no checkpoint to export to {target}"
        raise InvalidSpec(msg)
    storage, name = _split(target, open_url)
    commit = newest[1]
    try:
        with tempfile.TemporaryDirectory(prefix="spotfirst-export-") as folder:
            if commit.content == "files":
                mirror(run.packs(), commit, Path(folder) / "files")
                return _upload_folder(storage, name, Path(folder) / "files")
            manifest = state_of(read_manifest(run.packs(), commit.manifest, commit.digest))
            file = Path(folder) / name
            words = {"run": run.run_id, "step": str(commit.step), "object": "model"}
            export_safetensors(run.packs(), manifest, file, metadata=words)
            storage.upload(file, name)
    except OSError as error:
        msg = f"run {run.run_id} cannot be exported to {target}: {error.strerror or error}"
        raise StorageError(msg, path=target) from error
    return f"{storage.url}/{name}"


def _split(target: str, open_url: OpenStorage) -> tuple[Storage, str]:
    """The storage of the folder above ``target``, and the target's name in it."""
    above, slash, name = target.rstrip("/").rpartition("/")
    if not slash or not name or above.endswith(":/"):
        msg = f"export {target!r} names no file or folder in a bucket or folder"
        raise InvalidSpec(msg)
    return open_url(above or "/"), name


def _upload_folder(storage: Storage, name: str, folder: Path) -> str:
    place = f"{storage.url}/{name}"
    if storage.on_disk:
        # With its links, times and modes, which objects do not have.
        shutil.copytree(folder, place.removeprefix("file://"), symlinks=True, dirs_exist_ok=True)
        return place
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            storage.upload(file, f"{name}/{file.relative_to(folder).as_posix()}")
    return place
