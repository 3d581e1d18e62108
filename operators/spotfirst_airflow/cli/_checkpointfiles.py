"""``spotfirst checkpoint export`` and ``import``: to and from files that other tools read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spotfirst import events as e
from spotfirst.checkpoints.exporting import export_safetensors, export_torch, state_of
from spotfirst.checkpoints.importing import commit_weights, read_weights
from spotfirst.checkpoints.manifest import read_manifest
from spotfirst.checkpoints.mirroring import export_files
from spotfirst.errors import InvalidSpec
from spotfirst.run import create_run
from spotfirst.spec import RunSpec
from spotfirst.state import RunState
from spotfirst.wire import utc_now
from spotfirst_airflow.cli._common import (
    JsonOption,
    StorageOption,
    find_storage,
    moment,
    print_json,
    progress,
    run_with_checkpoints,
    size,
    stdout,
)
from spotfirst_airflow.controller import controller_name
from spotfirst_airflow.selection import Selected, select, split

__all__ = ["export", "import_"]

_FORMATS = {
    ".safetensors": "safetensors",
    ".pt": "torch",
    ".pth": "torch",
    ".ckpt": "torch",
    ".bin": "torch",
}


def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="RUN[@STEP]", help="RUN is its newest one; also RUN@best and RUN@seq:NUMBER."
        ),
    ],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE|FOLDER",
            help="Where to: .safetensors or .pt; in files mode, a folder.",
        ),
    ],
    *,
    storage: StorageOption = "",
    object_: Annotated[
        list[str] | None,
        typer.Option(
            "--object",
            help="What to export, as it was given to the Checkpointer: model, when left out. "
            "Repeat it, for .pt, to get a dict of several.",
        ),
    ] = None,
    format_: Annotated[
        str, typer.Option("--format", help="`safetensors` or `torch`; by default, by the suffix.")
    ] = "",
    rank: Annotated[
        int, typer.Option(help="Of what each rank has of its own, that of this one.", min=0)
    ] = 0,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace a file that is there; write into a folder that is not empty."
        ),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Write the weights of a checkpoint to a file that other tools read, or its files to a folder.

    A `.safetensors` file is written without torch and in little memory. A `.pt` file needs torch,
    keeps nested states such as an optimizer's, and is read by `torch.load(FILE,
    weights_only=True)`.

    A checkpoint of a run in files mode is written to a folder, with the times and modes that its
    files had. With --force, other files in the folder stay, and those of the same names are
    replaced.

    Examples:

        spotfirst checkpoint export night-1@best model.safetensors

        spotfirst checkpoint export night-1@1200 all.pt --object model --object optimizer

        spotfirst checkpoint export study-7 ./study
    """
    run_with_checkpoints(storage, split(checkpoint)[0])
    chosen = select(find_storage(storage), checkpoint, pinned=True)
    if chosen.commit.content == "files":
        if object_ or format_ or rank:
            msg = f"{checkpoint} holds files of the script; leave out --object, --format and --rank"
            raise InvalidSpec(msg)
        if file.suffix.lower() in _FORMATS:
            msg = f"{checkpoint} holds files of the script; {file} is no name for their folder"
            raise InvalidSpec(msg)
        _export_folder(chosen, file, force=force, json=json)
        return
    kind = format_ or _FORMATS.get(file.suffix.lower(), "")
    names = object_ or ["model"]
    if kind not in {"safetensors", "torch"}:
        what = f"--format {format_}" if format_ else f"the suffix of {file}"
        msg = f"{what} is none of .safetensors and .pt; give --format safetensors or torch"
        raise InvalidSpec(msg)
    if kind == "safetensors" and len(names) > 1:
        msg = "safetensors holds one object; export each to a file of its own, or all to one .pt"
        raise InvalidSpec(msg)
    if file.is_dir() or (file.exists() and not force):
        msg = f"{file} exists; choose another name, or replace a file with --force"
        raise InvalidSpec(msg)
    run, seq, commit = chosen
    packs = run.packs()
    manifest = state_of(read_manifest(packs, commit.manifest, commit.digest))
    with progress("writing", total=commit.size_bytes) as (on_total, on_bytes):
        if kind == "torch":
            size_bytes = export_torch(packs, manifest, file, names=names, rank=rank)
        else:
            size_bytes = export_safetensors(
                packs, manifest, file, name=names[0], rank=rank, on_total=on_total,
                on_bytes=on_bytes,
                metadata={"run": run.run_id, "step": str(commit.step), "object": names[0]},
            )  # fmt: skip
    if json:
        print_json(
            {
                "run_id": run.run_id, "step": commit.step, "seq": seq, "objects": names,
                "file": str(file.absolute()), "size_bytes": size_bytes,
            }
        )  # fmt: skip
        return
    stdout().print(
        f"{file}: {', '.join(names)} of {run.run_id} at step {commit.step}, {size(size_bytes)}",
        markup=False,
        soft_wrap=True,
    )


def _export_folder(chosen: Selected, folder: Path, *, force: bool, json: bool) -> None:
    run, seq, commit = chosen
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        msg = f"{folder} is no folder, and {run.run_id} holds files; choose another name"
        raise InvalidSpec(msg)
    if folder.is_dir() and any(folder.iterdir()) and not force:
        msg = f"{folder} is not empty; choose another folder, or write into it with --force"
        raise InvalidSpec(msg)
    if not folder.absolute().parent.is_dir():
        msg = f"there is no folder {folder.absolute().parent}; make it first"
        raise InvalidSpec(msg)
    with progress("writing", total=commit.size_bytes) as (_, on_bytes):
        manifest = export_files(run.packs(), commit, folder.absolute(), on_bytes=on_bytes)
    if json:
        print_json(
            {
                "run_id": run.run_id, "step": commit.step, "seq": seq,
                "folder": str(folder.absolute()), "files": [f.path for f in manifest.files],
                "size_bytes": manifest.size_bytes,
            }
        )  # fmt: skip
        return
    stdout().print(
        f"{folder}: {len(manifest.files)} files of {run.run_id}, saved at "
        f"{moment(commit.at)} UTC, {size(manifest.size_bytes)}",
        markup=False,
        soft_wrap=True,
    )


def import_(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…", help="One file of `torch.save`, or one or more .safetensors."
        ),
    ],
    *,
    to: Annotated[str, typer.Option("--to", help="The id of the new run that holds them.")],
    storage: StorageOption = "",
    object_: Annotated[
        str, typer.Option("--object", help="What they are to the Checkpointer.")
    ] = "model",
    key: Annotated[
        str,
        typer.Option(help="The part of torch's file that holds them, such as `state_dict`."),
    ] = "",
    step: Annotated[int, typer.Option(help="Steps that they were trained for.", min=0)] = 0,
    json: JsonOption = False,
) -> None:
    """Make pretrained weights a checkpoint, for runs to start from.

    They become the only checkpoint of a new run that never trains. A run that starts from it
    finds the model's weights and nothing else, so its Checkpointer is told with `strict=False`
    that an optimizer may be missing.

    Of a `torch.save` file, torch's safe reader takes tensors and plain containers; nothing in it
    is run.

    Examples:

        spotfirst checkpoint import llama-*.safetensors --to llama-base

        spotfirst run spec.yaml --resume-from llama-base@latest
    """
    place = find_storage(storage)
    weights = read_weights(files, key=key)
    place.probe()
    words = (
        "spotfirst", "checkpoint", "import", *map(str, files), "--to", to, "--object", object_,
        f"--key={key}", "--step", str(step),
    )  # fmt: skip
    run = create_run(place, RunSpec(run_id=to, created_at=utc_now(), command=words))
    newest = run.chain().refresh().newest()
    if newest is not None and run.journal().refresh().seq == 0:
        seq = newest[0]  # an import that was killed before its last line
    else:
        with progress("storing", total=weights.size_bytes) as (_, on_bytes):
            seq = commit_weights(run, weights, name=object_, step=step, on_bytes=on_bytes)

    def choose(state: RunState) -> e.Event | None:
        if state.seq == 0:
            return e.Created(at=utc_now())
        if state.is_final:
            return None
        return e.Succeeded(at=utc_now(), attempt=0, step=step, checkpoint_seq=seq)

    # Over before it began: no controller is to launch anything for it.
    journal = run.journal(by=controller_name())
    journal.decide(choose)
    journal.decide(choose)
    commit = dict(run.chain().refresh().commits)[seq]
    if json:
        print_json(
            {
                "run_id": to, "seq": seq, "step": step, "object": object_,
                "arrays": len(weights.arrays), "size_bytes": weights.size_bytes,
                "new_bytes": commit.new_bytes, "resume_from": f"{to}@{step}",
            }
        )  # fmt: skip
        return
    stdout().print(
        f"{len(weights.arrays)} arrays, {size(weights.size_bytes)}, are the {object_} of "
        f"{to}@{step}. Start from it: spotfirst run … --resume-from {to}@{step}",
        markup=False,
        soft_wrap=True,
    )
