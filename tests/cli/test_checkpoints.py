"""``spotfirst checkpoint``: looking at what a run has kept, checking it, moving it in and out."""

from __future__ import annotations

import json
import os
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from typer.testing import CliRunner, Result

from spotfirst.checkpoints.files import FileCheckpoints
from spotfirst.checkpoints.retention import Retention, collect, prune
from spotfirst.checkpoints.verifying import verify
from spotfirst.run import Run, create_run
from spotfirst.spec import RunSpec
from spotfirst.state import Phase
from spotfirst.storage import Storage, open_storage
from spotfirst_airflow.cli import app
from spotfirst_airflow.submission import Request, attach
from tests.checkpointing.stored import Writer, manifest_of

NOW = datetime(2026, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    url = str(tmp_path / "storage")
    monkeypatch.setenv("SPOTFIRST_STORAGE", url)
    monkeypatch.setenv("COLUMNS", "200")
    return open_storage(url)


@pytest.fixture
def run(storage: Storage) -> Run:
    spec = RunSpec(
        run_id="night", created_at=NOW, command=("train",), retention=Retention(metric="loss")
    )
    return create_run(storage, spec)


def call(*words: str) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *words])


def ok(*words: str) -> str:
    done = call(*words)
    assert done.exit_code == 0, done.output
    return done.stdout


def found(*words: str) -> Any:
    return json.loads(ok(*words, "--json"))


def refused(*words: str, code: int = 2) -> str:
    done = call(*words)
    assert done.exit_code == code, done.output
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def weights(seed: int, size: int = 1000) -> dict[str, torch.Tensor]:
    return {"w": torch.rand(size, generator=torch.Generator().manual_seed(seed))}


def three(run: Run) -> tuple[Writer, list[int]]:
    """Steps 10, 20 (the best) and 30, which share the backbone."""
    writer = Writer(run)
    backbone = weights(0, 5000)["w"]
    losses = {10: 2.0, 20: 1.0, 30: 1.5}
    return writer, [
        writer.save(
            step, model={"backbone": backbone, "head": weights(step)["w"]}, metrics={"loss": loss}
        )
        for step, loss in losses.items()
    ]


def break_pack(run: Run, seq: int, *, shared: bool) -> str:
    """Flip a bit of the backbone, or of the checkpoint's own head; the pack's name."""
    manifest: Any = manifest_of(run, seq)
    part = manifest.arrays[0 if shared else 1].parts[0]
    name = str(manifest.packs[part.pack].name)
    data = bytearray(run.packs().read(name))
    data[part.offset + 5] ^= 0x10
    run.packs().write(name, bytes(data))
    return name


# -- ls ------------------------------------------------------------------------------------------


def test_ls_says_which_is_newest_best_pinned_and_pruned(run: Run) -> None:
    writer, seqs = three(run)
    run.pin(seqs[0], by="child")
    writer.chain.prune(1, [seqs[0]])
    rows = found("ls", "night")
    assert [(row["step"], row["kept"], row["newest"], row["best"]) for row in rows] == [
        (30, True, True, False), (20, True, False, True), (10, False, False, False),
    ]  # fmt: skip
    assert rows[2]["pinned_by"] == ["child"]
    text = [line.rstrip() for line in ok("ls", "night").splitlines()]
    assert text[1].endswith("newest")
    assert "loss 1 " in text[2]
    assert text[2].endswith("best")
    assert text[3].endswith("pinned by child, pruned")


def test_ls_leaves_out_what_is_gone_unless_it_is_asked_for(run: Run) -> None:
    writer, seqs = three(run)
    writer.chain.prune(1, seqs[:2])
    assert [row["step"] for row in found("ls", "night")] == [30]
    assert "2 more are no longer kept" in ok("ls", "night")
    assert [row["step"] for row in found("ls", "night", "--all")] == [30, 20, 10]


def test_ls_of_a_run_without_checkpoints(run: Run) -> None:
    assert ok("ls", "night") == "no checkpoints yet\n"
    assert found("ls", "night") == []


def test_a_run_that_is_not_there_is_one_line(storage: Storage, run: Run) -> None:
    for words in (
        ("ls", "nihgt"),
        ("ls", "nigh"),
        ("verify", "nigh@3"),
        ("gc", "nigh"),
        ("diff", "nigh", "night"),
    ):
        assert "did you mean night?" in refused(*words)


def test_what_a_script_saved_on_its_own_is_no_different(storage: Storage, tmp_path: Path) -> None:
    three(Run(storage, "local"))  # no spec, no journal
    assert [row["best"] for row in found("ls", "local")] == [False, True, False]
    assert found("verify", "local", "--all")["whole"]
    assert found("diff", "local@10", "local@best")["changed"] == 1
    ok("export", "local", str(tmp_path / "x.safetensors"))
    assert "nothing to remove" in ok("gc", "local")


@pytest.mark.parametrize("text", ["night@x", "@3", "night@seq:", "night@", "night@-1"])
def test_a_checkpoint_is_named_in_one_way(run: Run, text: str) -> None:
    assert "RUN@STEP" in refused("verify", text)


def test_a_pruned_checkpoint_is_refused_with_those_that_are_kept(run: Run, tmp_path: Path) -> None:
    writer, seqs = three(run)
    writer.chain.prune(1, seqs[:1])
    for text in ("night@10", f"night@seq:{seqs[0]}"):
        said = refused("export", text, str(tmp_path / "x.safetensors"))
        assert "at step 10 was pruned" in said
        assert "kept are the steps 20, 30" in said


def test_a_pinned_checkpoint_can_be_read_although_it_was_pruned(run: Run, tmp_path: Path) -> None:
    writer, seqs = three(run)
    run.pin(seqs[0], by="child")
    writer.chain.prune(1, seqs[:2])
    collect(run.packs(), writer.chain, run.pinned())
    assert found("verify", "night@10")["whole"]
    assert found("diff", "night@10", "night@30")["changed"] == 1
    ok("export", f"night@seq:{seqs[0]}", str(tmp_path / "x.safetensors"))
    assert "was pruned" in refused("verify", "night@20")


# -- verify --------------------------------------------------------------------------------------


def test_verify_reads_each_byte_once(run: Run) -> None:
    three(run)
    said = found("verify", "night", "--all")
    assert said["whole"]
    assert said["size_bytes"] == 4 * (5000 + 3 * 1000), "the shared backbone is read once"
    assert [each["step"] for each in said["checkpoints"]] == [10, 20, 30]
    assert "3 checkpoints whole" in ok("verify", "night", "--all")
    assert found("verify", "night@20")["checkpoints"][0]["step"] == 20


def test_verify_names_the_pack_and_every_checkpoint_that_it_touches(run: Run) -> None:
    _, seqs = three(run)
    name = break_pack(run, seqs[2], shared=True)
    done = call("verify", "night", "--all")
    assert done.exit_code == 1
    assert f"damaged: {name}" in done.stdout
    for step, seq in zip((10, 20, 30), seqs, strict=True):
        assert f"step {step} (seq {seq})" in done.stdout


def test_verify_tells_which_one_is_whole(run: Run) -> None:
    _, seqs = three(run)
    break_pack(run, seqs[2], shared=False)
    done = call("verify", "night", "--all")
    assert done.exit_code == 1
    assert "1 of 3 checkpoints damaged" in done.stdout
    assert "the newest whole one is of step 20" in done.stdout
    assert call("verify", "night@20").exit_code == 0
    assert call("verify", "night").exit_code == 1


def test_verify_reads_compressed_chunks(run: Run) -> None:
    writer = Writer(run, compressed=True)
    seqs = [writer.save(step, model={"w": torch.arange(9000) + step}) for step in (1, 2)]
    said = found("verify", "night", "--all")
    assert said["whole"]
    assert said["size_bytes"] < 2 * 9000 * 8
    name = manifest_of(run, seqs[1]).packs[0].name
    data = bytearray(run.packs().read(name))
    data[len(data) // 2] ^= 1
    run.packs().write(name, bytes(data))
    done = call("verify", "night", "--all")
    assert done.exit_code == 1
    assert "1 of 2 checkpoints damaged" in done.stdout


def test_verify_finds_missing_and_short_packs_and_manifests(run: Run) -> None:
    writer = Writer(run)
    seqs = [writer.save(step, model=weights(step)) for step in (1, 2, 3)]
    packs = run.packs()
    names = [manifest_of(run, seq).packs[0].name for seq in seqs]
    packs.delete(names[0])
    packs.write(names[1], packs.read(names[1])[:-1])
    manifest = dict(run.chain().refresh().commits)[seqs[2]].manifest
    packs.write(manifest, packs.read(manifest).replace(b"3", b"4", 1))
    done = call("verify", "night", "--all", "--json")
    assert done.exit_code == 1
    said = {each["name"]: each for each in json.loads(done.stdout)["damage"]}
    assert {name: each["problem"] for name, each in said.items()} == {
        names[0]: "missing", names[1]: "damaged", manifest: "damaged",
    }  # fmt: skip
    assert said[names[0]]["checkpoints"] == [{"seq": seqs[0], "step": 1}]


def test_what_a_running_writer_lets_go_of_meanwhile_is_no_damage(run: Run) -> None:
    writer, seqs = three(run)
    commits = run.chain().refresh().commits
    writer.chain.prune(1, seqs[:2])
    collect(run.packs(), writer.chain)
    kept = [seq for seq, _ in run.chain().refresh().commits]
    assert verify(run.packs(), commits).damage != ()
    assert verify(run.packs(), commits, still_kept=lambda: kept).damage == ()


# -- export and import ---------------------------------------------------------------------------


def test_export_by_suffix_of_the_best_checkpoint(run: Run, tmp_path: Path) -> None:
    three(run)
    path = tmp_path / "model.safetensors"
    said = found("export", "night@best", str(path))
    assert (said["step"], said["size_bytes"]) == (20, path.stat().st_size)
    assert torch.equal(safetensors.torch.load_file(path)["head"], weights(20)["w"])
    ok("export", "night", str(tmp_path / "model.pt"))
    assert torch.equal(torch.load(tmp_path / "model.pt")["head"], weights(30)["w"])


def test_export_replaces_a_file_only_when_told_to(run: Run, tmp_path: Path) -> None:
    three(run)
    path = tmp_path / "model.pt"
    path.write_text("mine")
    assert "--force" in refused("export", "night", str(path))
    assert path.read_text() == "mine"
    ok("export", "night", str(path), "--force")
    assert "head" in torch.load(path)


def test_export_of_something_else_says_what_there_is(run: Run, tmp_path: Path) -> None:
    three(run)
    assert "none of .safetensors and .pt" in refused("export", "night", str(tmp_path / "x.onnx"))
    said = refused("export", "night", str(tmp_path / "x.pt"), "--object", "ema", code=1)
    assert "no object 'ema'; it has model" in said


def test_pretrained_weights_are_imported_and_started_from(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPOTFIRST_LOCAL_FLEET", str(tmp_path / "fleet"))
    safetensors.torch.save_file(weights(1), tmp_path / "base.safetensors")
    said = found("import", str(tmp_path / "base.safetensors"), "--to", "base")
    assert (said["resume_from"], said["arrays"]) == ("base@0", 1)
    state = Run(storage, "base").journal().refresh()
    assert state.phase is Phase.SUCCEEDED, "no controller launches anything for it"
    assert not state.attempts
    request = Request(command=("python", "train.py"), resume_from="base@latest")
    child = attach(storage, "tuned", request, owner="me", environment={})
    source = child.spec().resume_from
    assert source is not None
    assert (source.run_id, source.step) == ("base", 0)
    ok("export", "base", str(tmp_path / "again.safetensors"))
    again = safetensors.torch.load_file(tmp_path / "again.safetensors")
    assert torch.equal(again["w"], weights(1)["w"])


def test_runs_and_show_know_a_run_that_was_imported(storage: Storage, tmp_path: Path) -> None:
    safetensors.torch.save_file(weights(1), tmp_path / "base.safetensors")
    ok("import", str(tmp_path / "base.safetensors"), "--to", "base")
    for words in (["runs"], ["show", "base"], ["show", "base", "--json"]):
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        assert "succeeded" in done.stdout


def test_an_import_that_was_killed_is_completed_by_the_next(
    storage: Storage, tmp_path: Path
) -> None:
    path = str(tmp_path / "base.safetensors")
    safetensors.torch.save_file(weights(1), path)
    ok("import", path, "--to", "base")
    for entry in storage.list("control/runs/base/journal"):
        storage.delete(f"control/runs/base/journal/{entry}")
    ok("import", path, "--to", "base")
    run = Run(storage, "base")
    assert run.journal().refresh().phase is Phase.SUCCEEDED
    assert len(run.chain().refresh().commits) == 1
    assert "has checkpoints already" in refused("import", path, "--to", "base")
    safetensors.torch.save_file(weights(2), tmp_path / "other.safetensors")
    said = refused("import", str(tmp_path / "other.safetensors"), "--to", "base")
    assert "exists" in said


# -- diff ----------------------------------------------------------------------------------------


def differences(*words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    said = found("diff", *words)
    return said, {each["name"]: each for each in said["differences"]}


def test_diff_measures_what_changed_and_reads_nothing_else(run: Run) -> None:
    writer = Writer(run)
    frozen = weights(0)["w"]
    head = torch.arange(1000, dtype=torch.float32)
    one = writer.save(1, model={"frozen": frozen, "head": head, "old": head[:5].clone()})
    tuned = head.clone()
    tuned[7] += 0.5
    writer.save(2, model={"frozen": frozen, "head": tuned, "new": head[:6].clone()})
    break_pack(run, one, shared=True)  # the frozen array, which nobody needs to read
    said, by_name = differences("night@1", "night@2")
    assert (said["same"], said["changed"], said["only_left"], said["only_right"]) == (1, 1, 1, 1)
    assert by_name["model/head"]["max_abs"] == 0.5
    assert 0 < by_name["model/head"]["changed_bytes"] <= 4
    assert by_name["model/old"]["kind"] == "only_left"
    text = ok("diff", "night@1", "night@2")
    assert "by up to 0.5" in text
    assert "1 same, 1 changed, 1 only in the first, 1 only in the second" in text


def test_diff_tells_other_shapes_types_and_values(run: Run) -> None:
    writer = Writer(run)
    writer.save(1, model={"w": torch.ones(2, 3)}, optimizer={"lr": 0.1, "betas": (0.9, 0.99)})
    writer.save(2, model={"w": torch.ones(3, 2)}, optimizer={"lr": 0.2, "betas": (0.9, 0.99)})
    said, by_name = differences("night@1", "night@2")
    assert (by_name["model/w"]["left"], by_name["model/w"]["right"]) == (
        "float32[2, 3]", "float32[3, 2]",
    )  # fmt: skip
    assert by_name["optimizer/lr"]["kind"] == "value"
    assert said["same"] == 2


def test_diff_of_the_same_bytes_in_other_shards_is_none(run: Run) -> None:
    writer = Writer(run)
    model = {"w": torch.rand(7, 12)}
    writer.save(1, model=model, shards=3)
    writer.save(2, model=model)
    said, _ = differences("night@1", "night@2")
    assert (said["same"], said["changed"]) == (1, 0)


@pytest.mark.parametrize(
    ("before", "after", "largest"),
    [
        (torch.tensor([200], dtype=torch.uint8), torch.tensor([10], dtype=torch.uint8), 190.0),
        (torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([3.0], dtype=torch.bfloat16), 2.0),
        (torch.tensor([True]), torch.tensor([False]), 1.0),
        (torch.tensor([1.0, float("inf")]), torch.tensor([2.0, float("inf")]), 1.0),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, float("nan")]), None),
        (torch.tensor([3 + 4j]), torch.tensor([0j]), 5.0),
        (torch.tensor([1j, 3 + 4j]).to(torch.complex128), torch.zeros(2).to(torch.complex128), 5.0),
        (torch.ones(2).to(torch.float8_e4m3fn), torch.zeros(2).to(torch.float8_e4m3fn), None),
    ],
)
def test_diff_of_many_element_types(
    run: Run, before: torch.Tensor, after: torch.Tensor, largest: float | None
) -> None:
    writer = Writer(run)
    writer.save(1, model={"w": before})
    writer.save(2, model={"w": after})
    _, by_name = differences("night@1", "night@2")
    assert by_name["model/w"]["changed_bytes"] > 0
    assert by_name["model/w"]["max_abs"] == largest


def test_diff_compares_checkpoints_of_two_runs(storage: Storage, run: Run) -> None:
    other = create_run(storage, RunSpec(run_id="other", created_at=NOW, command=("train",)))
    Writer(run).save(1, model=weights(1))
    Writer(other).save(9, model=weights(1))
    assert found("diff", "night@1", "other@9")["same"] == 1


# -- gc ------------------------------------------------------------------------------------------


def test_gc_removes_what_a_killed_writer_left_and_says_so_before(run: Run) -> None:
    writer, seqs = three(run)
    leftover = f"{writer.chain.claims[-1]:08d}/000002-00000-000009"
    run.packs().write(leftover, b"x" * 700)
    writer.chain.prune(1, seqs[:1])
    said = found("gc", "night", "--dry-run")
    names = {each["name"] for each in said["objects"]}
    assert leftover in names
    assert run.packs().exists(leftover)
    assert "would remove" in ok("gc", "night", "--dry-run")
    assert "removed" in ok("gc", "night")
    assert not {name for name, _ in run.packs().walk("")} & names
    assert "nothing to remove" in ok("gc", "night")
    assert found("verify", "night", "--all")["whole"]


def test_gc_spares_what_is_pinned_and_what_is_being_written(run: Run) -> None:
    writer, seqs = three(run)
    run.pin(seqs[0], by="child")
    writer.chain.prune(1, seqs[:2])
    under_way = f"{writer.chain.claims[-1]:08d}/000004-00000-000000"
    run.packs().write(under_way, b"not committed yet")
    ok("gc", "night")
    assert run.packs().exists(under_way)
    said = found("verify", "night", "--all")
    assert said["whole"]
    assert [each["step"] for each in said["checkpoints"]] == [10, 30]


def test_gc_beside_a_writer_leaves_every_kept_checkpoint_whole(run: Run) -> None:
    stop = threading.Event()
    backbone = weights(0, 3000)["w"]

    def write() -> None:
        writer = Writer(run)
        step = 0
        while not stop.is_set():
            step += 1
            writer.save(step, model={"backbone": backbone, "head": weights(step)["w"]})
            if prune(writer.chain, 1, Retention(last=2)):
                collect(run.packs(), writer.chain, run.pinned())

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(15):
            assert call("gc", "night").exit_code == 0
            ok("verify", "night", "--all")
    finally:
        stop.set()
        thread.join()
    assert found("verify", "night", "--all")["whole"]


@pytest.mark.parametrize("command", ["ls", "verify", "export", "import", "diff", "gc"])
def test_help_teaches_with_an_example(command: str) -> None:
    text = ok(command, "--help")
    assert f"spotfirst checkpoint {command}" in text


def files_checkpoint(storage: Storage, folder: Path) -> None:
    spec = RunSpec(run_id="study", created_at=NOW, command=("train",), checkpoint_mode="files")
    files = FileCheckpoints(create_run(storage, spec), 1, folder)
    files.restore()
    (folder / "trials").mkdir()
    (folder / "trials" / "1.json").write_text("one")
    (folder / "last").symlink_to("trials/1.json")
    os.utime(folder / "trials" / "1.json", ns=(5_000_000_000, 5_000_000_000))
    files.capture(final=True)
    files.release()


def test_the_files_of_a_script_are_exported_to_a_folder(storage: Storage, tmp_path: Path) -> None:
    files_checkpoint(storage, tmp_path / "files")
    assert "1 files of study" in ok("export", "study", str(tmp_path / "out"))
    assert (tmp_path / "out" / "last").read_text() == "one"
    assert (tmp_path / "out" / "trials" / "1.json").stat().st_mtime_ns == 5_000_000_000
    told = found("export", "study@latest", str(tmp_path / "other"))
    assert told["files"] == ["trials/1.json"]
    assert told["folder"] == str(tmp_path / "other")
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_a_folder_that_is_not_empty_is_written_into_only_when_asked(
    storage: Storage, tmp_path: Path
) -> None:
    files_checkpoint(storage, tmp_path / "files")
    out, precious = tmp_path / "out", tmp_path / "precious"
    out.mkdir()
    precious.mkdir()
    (precious / "1.json").write_text("precious")
    (out / "mine").write_text("mine")
    (out / "trials").symlink_to(precious)
    assert "not empty" in refused("export", "study", str(out))
    assert "1 files" in ok("export", "study", str(out), "--force")
    assert (out / "mine").read_text() == "mine"
    assert (out / "trials" / "1.json").read_text() == "one"
    assert (precious / "1.json").read_text() == "precious"
    (out / "last").unlink()
    (out / "last").mkdir()
    assert "cannot write" in refused("export", "study", str(out), "--force", code=1)


def test_a_folder_gets_no_name_of_a_file(storage: Storage, tmp_path: Path) -> None:
    files_checkpoint(storage, tmp_path / "files")
    assert "no name for their folder" in refused("export", "study", str(tmp_path / "a.safetensors"))


def test_files_have_no_objects_to_export(storage: Storage, tmp_path: Path) -> None:
    files_checkpoint(storage, tmp_path / "files")
    assert "--object" in refused("export", "study", str(tmp_path / "out"), "--object", "model")
    (tmp_path / "file").write_text("mine")
    assert "no folder" in refused("export", "study", str(tmp_path / "file"), "--force")
