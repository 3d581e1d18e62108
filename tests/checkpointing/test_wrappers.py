"""Checkpoints of modules that are compiled or replicated, on either side or on both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from spotfirst.checkpointer import Checkpointer, weights_sha256
from spotfirst.checkpoints.importing import commit_weights, read_weights
from spotfirst.checkpoints.manifest import StateManifest, read_manifest
from spotfirst.checkpoints.statetree import walk_leaves
from spotfirst.checkpoints.wrappers import matched
from spotfirst.errors import StateMismatch
from spotfirst.run import Run
from spotfirst.storage import open_storage


class Net(torch.nn.Module):
    """BatchNorm has a version in the state's metadata; ``module`` is a name of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(4, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.module = torch.nn.Linear(4, 4)
        self.last = torch.nn.Sequential(torch.nn.Linear(4, 2))


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _inner(wrap: Callable[[torch.nn.Module], torch.nn.Module], *names: str) -> Any:
    def apply(net: torch.nn.Module) -> torch.nn.Module:
        for name in names:
            setattr(net, name, wrap(getattr(net, name)))
        return net

    return apply


def _compiled_in_place(net: torch.nn.Module) -> torch.nn.Module:
    net.compile()
    net.first.compile()  # type: ignore[operator, union-attr]
    return net


ddp = DistributedDataParallel
WRAPPERS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "plain": lambda net: net,
    "compiled": torch.compile,
    "replicated": ddp,
    "compiled, then replicated": lambda net: ddp(torch.compile(net)),
    "replicated, then compiled": lambda net: torch.compile(ddp(net)),
    "data parallel": torch.nn.DataParallel,
    "compiled in place": _compiled_in_place,
    "compiled inside": _inner(torch.compile, "first", "norm", "module"),
    "replicated inside": _inner(ddp, "first", "module"),
    "checkpointed inside": _inner(checkpoint_wrapper, "first", "last"),
    "everywhere": lambda net: torch.compile(
        ddp(_inner(lambda m: torch.compile(checkpoint_wrapper(m)), "first", "norm", "last")(net))
    ),
}


def _manifest(storage: Path) -> StateManifest:
    run = Run(open_storage(str(storage)), "local")
    newest = run.chain().refresh().newest()
    assert newest is not None
    manifest = read_manifest(run.packs(), newest[1].manifest, newest[1].digest)
    assert isinstance(manifest, StateManifest)
    return manifest


def _objects(wrapper: str, seed: int) -> tuple[Net, dict[str, Any]]:
    net = Net(seed)
    model = WRAPPERS[wrapper](net)
    return net, {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("there", WRAPPERS)
def test_any_wrapper_is_looked_through_at_either_side(
    tmp_path: Path, there: str, strict: bool
) -> None:
    net, objects = _objects(there, 1)
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + number)
    objects["optimizer"].step()
    checkpointer = Checkpointer(storage=str(tmp_path), period_s=1e9, **objects)
    checkpointer.restore()
    checkpointer.step(1)
    checkpointer.close()
    names = [name for name, _, _ in walk_leaves(_manifest(tmp_path).objects["model"])]
    assert names == list(Net(1).state_dict())
    assert weights_sha256(objects["model"]) == weights_sha256(net)
    for here in WRAPPERS:
        other, ours = _objects(here, 2)
        again = Checkpointer(storage=str(tmp_path), period_s=1e9, strict=strict, **ours)
        assert again.restore() == 1
        assert weights_sha256(other) == weights_sha256(net), here
        for one, two in zip(net.parameters(), other.parameters(), strict=True):
            before, after = objects["optimizer"].state[one], ours["optimizer"].state[two]
            assert torch.equal(before["exp_avg"], after["exp_avg"]), here


@pytest.mark.parametrize(
    "prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."]
)
def test_a_file_of_a_wrapped_models_weights_is_looked_through(tmp_path: Path, prefix: str) -> None:
    net = Net(1)
    torch.save({f"{prefix}{k}": v for k, v in net.state_dict().items()}, tmp_path / "w.pt")
    run = Run(open_storage(str(tmp_path / "storage")), "local")
    commit_weights(run, read_weights([tmp_path / "w.pt"]))
    other = Net(2)
    Checkpointer(model=other, storage=str(tmp_path / "storage")).restore()
    assert weights_sha256(other) == weights_sha256(net)


def test_what_is_not_there_is_named_as_the_module_names_it(tmp_path: Path) -> None:
    first = Checkpointer(model=torch.compile(Net(1)), storage=str(tmp_path))
    list(first.steps(1))
    net = Net(2)
    net.first = torch.nn.Linear(4, 5)
    net.extra = torch.nn.Linear(1, 1)
    with pytest.raises(StateMismatch) as refusal:
        Checkpointer(model=torch.compile(net), storage=str(tmp_path)).restore()
    assert "model: first.weight is float32[5, 4] here" in str(refusal.value)
    assert "model: extra.weight is not in the checkpoint" in str(refusal.value)


def test_tensors_that_are_tied_only_now_need_equal_values(tmp_path: Path) -> None:
    def net(*, tied: bool, same: bool = False) -> torch.nn.Module:
        torch.manual_seed(1)
        layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        if tied:
            layers[1].weight = layers[0].weight
        if same:
            layers[1].load_state_dict(layers[0].state_dict())
        return layers

    apart, same = tmp_path / "apart", tmp_path / "same"
    list(Checkpointer(model=net(tied=False), storage=str(apart)).steps(1))
    list(Checkpointer(model=net(tied=False, same=True), storage=str(same)).steps(1))
    with pytest.raises(StateMismatch, match=r"1\.weight is tied to 0\.weight here"):
        Checkpointer(model=net(tied=True), storage=str(apart)).restore()
    Checkpointer(model=net(tied=True), storage=str(same)).restore()
    lenient = net(tied=True)
    Checkpointer(model=lenient, storage=str(apart), strict=False).restore()
    assert torch.equal(lenient[1].weight, net(tied=False)[0].weight)  # type: ignore[index]


PARTS = st.sampled_from(["a", "b", "module", "_orig_mod", "_fsdp_wrapped_module"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(st.lists(NAMES, unique=True), st.lists(NAMES, unique=True))
def test_no_two_stored_names_become_one(stored: list[str], here: list[str]) -> None:
    found = matched(stored, here)
    assert found.keys() <= set(stored)
    assert set(found.values()) <= set(here)
    assert len(set(found.values())) == len(found)
    assert all(found[name] == name for name in set(stored) & set(here))
    assert {v: k for k, v in found.items()} == matched(here, stored)
