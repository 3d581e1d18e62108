"""Optimizers and schedulers of a script that has changed since its checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from spotfirst.checkpointer import Checkpointer
from spotfirst.errors import StateMismatch

Optimizers = Callable[[torch.nn.Module], torch.optim.Optimizer]


def a_model(count: int = 3) -> torch.nn.Module:
    """Equal shapes throughout: nothing but its name tells one parameter from another."""
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(count)))


def train(model: torch.nn.Module, optimizer: Any, scheduler: Any = None, steps: int = 1) -> None:
    """Gradients that differ from parameter to parameter."""
    for step in range(steps):
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 1.0 + number + 0.1 * step)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


class Saved:
    """The objects as a script makes them, and what is saved of them in the end."""

    def __init__(self, storage: object, **objects: Any) -> None:
        self.checkpointer = Checkpointer(storage=str(storage), period_s=1e9, **objects)
        self.first = self.checkpointer.restore()

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self.checkpointer.step(self.first + 3)
        self.checkpointer.close()


def restore(storage: object, *, strict: bool = True, **objects: Any) -> int:
    return Checkpointer(storage=str(storage), period_s=1e9, strict=strict, **objects).restore()


def by_name(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Each parameter's state and hyperparameters."""
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return {
        name: (
            {k: v.tolist() for k, v in optimizer.state[p].items()},
            {k: v for k, v in groups[id(p)].items() if k not in {"params", "param_names"}},
        )
        for name, p in model.named_parameters()
        if id(p) in groups
    }


def decayed(model: torch.nn.Module, *, swapped: bool = False) -> torch.optim.Optimizer:
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for n, p in named if n.endswith("bias")], "weight_decay": 0.0, "lr": 0.5},
    ]
    return torch.optim.AdamW(groups[::-1] if swapped else groups)


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_each_parameter_gets_its_own_state_whatever_the_order_and_the_groups_are(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As long as all have the same hyperparameters, groups are only a partition."""
    count = data.draw(st.integers(1, 4))
    kind = data.draw(st.sampled_from([torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]))
    is_named = data.draw(st.booleans())

    def grouped(model: torch.nn.Module) -> Any:
        named = data.draw(st.permutations(list(model.named_parameters())))
        cuts = sorted(data.draw(st.sets(st.integers(1, len(named) - 1), max_size=3)))
        parts = [named[a:b] for a, b in zip([0, *cuts], [*cuts, len(named)], strict=True)]
        return [{"params": part if is_named else [p for _, p in part]} for part in parts]

    storage = tmp_path_factory.mktemp("checkpoints")
    model = a_model(count)
    optimizer = kind(grouped(model))
    with Saved(storage, model=model, optimizer=optimizer):
        train(model, optimizer, steps=2)
    again = a_model(count)
    other = kind(grouped(again))
    assert restore(storage, model=again, optimizer=other) == 3
    assert by_name(again, other) == by_name(model, optimizer)
    train(model, optimizer)
    train(again, other)
    assert by_name(again, other) == by_name(model, optimizer)


def test_parameters_in_the_same_order_may_be_cut_into_other_groups(tmp_path: Path) -> None:
    def cut_after(model: torch.nn.Module, *places: int) -> torch.optim.Optimizer:
        parameters = list(model.parameters())
        ends = zip([0, *places], [*places, len(parameters)], strict=True)
        return torch.optim.AdamW([{"params": parameters[a:b]} for a, b in ends])

    model, again = a_model(), a_model()
    optimizer, other = cut_after(model, 1, 2), cut_after(again, 1, 3)
    with Saved(tmp_path, model=model, optimizer=optimizer):
        train(model, optimizer)
    restore(tmp_path, model=again, optimizer=other)
    assert by_name(again, other) == by_name(model, optimizer)


def test_groups_in_another_order_keep_their_own_hyperparameters(tmp_path: Path) -> None:
    model = a_model()
    optimizer = decayed(model)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    with Saved(tmp_path, model=model, optimizer=optimizer, scheduler=scheduler):
        train(model, optimizer, scheduler, 3)
    again = a_model()
    other = decayed(again, swapped=True)
    schedule = lr_scheduler.LambdaLR(other, lambda step: 0.5**step)
    restore(tmp_path, model=again, optimizer=other, scheduler=schedule)
    assert schedule.base_lrs == scheduler.base_lrs[::-1]
    assert schedule.get_last_lr() == scheduler.get_last_lr()[::-1]
    for _ in range(2):
        assert by_name(again, other) == by_name(model, optimizer)
        train(model, optimizer, scheduler)
        train(again, other, schedule)


def test_a_group_that_is_split_takes_the_scripts_new_values(tmp_path: Path) -> None:
    model = a_model()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, lr=0.25)
    with Saved(tmp_path, model=model, optimizer=optimizer):
        train(model, optimizer)
    again = a_model()
    other = decayed(again)
    restore(tmp_path, model=again, optimizer=other)
    assert [group["weight_decay"] for group in other.param_groups] == [0.1, 0.0]
    assert [group["lr"] for group in other.param_groups] == [0.001, 0.5]
    assert [s for s, _ in by_name(again, other).values()] == [
        s for s, _ in by_name(model, optimizer).values()
    ]


def test_groups_that_are_joined_need_one_value_for_all(tmp_path: Path) -> None:
    model = a_model()
    optimizer = decayed(model)
    with Saved(tmp_path, model=model, optimizer=optimizer):
        optimizer.param_groups[0]["lr"] = 0.75  # as a script does that changes it by hand
    again = a_model()
    other = torch.optim.AdamW(again.parameters(), weight_decay=0.1, lr=0.001)
    with pytest.raises(
        StateMismatch, match=r"optimizer: group 0 .* groups 0, 1 .*lr differs: 0\.75"
    ):
        restore(tmp_path, model=again, optimizer=other)
    again = a_model()
    other = torch.optim.AdamW(again.parameters(), weight_decay=0.2, lr=0.002)
    restore(tmp_path, model=again, optimizer=other)
    assert (other.param_groups[0]["lr"], other.param_groups[0]["weight_decay"]) == (0.002, 0.2)


def test_a_parameter_that_is_new_or_gone_is_named(tmp_path: Path) -> None:
    model = a_model()
    optimizer = torch.optim.AdamW(list(model.parameters())[:-1])
    with Saved(tmp_path, model=model, optimizer=optimizer):
        train(model, optimizer)
    again = a_model()
    other = torch.optim.AdamW(list(again.parameters())[1:])
    with pytest.raises(StateMismatch) as refusal:
        restore(tmp_path, model=again, optimizer=other)
    assert "optimizer: model.2.bias is not in the checkpoint" in str(refusal.value)
    assert "optimizer: model.0.weight is in the checkpoint, and is none" in str(refusal.value)
    again = a_model()
    other = torch.optim.AdamW(list(again.parameters())[1:])
    restore(tmp_path, model=again, optimizer=other, strict=False)
    assert again[2].bias not in other.state  # type: ignore[index]
    found, expected = by_name(again, other), by_name(model, optimizer)
    for name in expected.keys() & found.keys() - {"0.weight"}:
        assert found[name] == expected[name]


class Own(torch.optim.AdamW):
    """Another class, and by its own name."""


@pytest.mark.parametrize("strict", [True, False])
def test_another_class_is_refused_by_name_or_begins_anew(tmp_path: Path, strict: bool) -> None:
    model = a_model()
    optimizer = torch.optim.Adam(model.parameters())
    with Saved(tmp_path, model=model, optimizer=optimizer):
        train(model, optimizer)
    again = a_model()
    other = Own(again.parameters())
    if strict:
        with pytest.raises(StateMismatch, match="optimizer is Adam in the checkpoint and Own here"):
            restore(tmp_path, model=again, optimizer=other)
    else:
        restore(tmp_path, model=again, optimizer=other, strict=False)
        assert not other.state


def test_another_schedule_is_refused_by_name(tmp_path: Path) -> None:
    def objects(*kinds: Any) -> dict[str, Any]:
        model = a_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        parts = [kind(optimizer, 2) for kind in kinds]
        scheduler = lr_scheduler.SequentialLR(optimizer, parts, [2])
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    with Saved(tmp_path, **objects(lr_scheduler.StepLR, lr_scheduler.CosineAnnealingLR)):
        pass
    said = r"scheduler is SequentialLR\(StepLR, CosineAnnealingLR\) in the checkpoint and Seq"
    with pytest.raises(StateMismatch, match=said):
        restore(tmp_path, **objects(lr_scheduler.StepLR, lr_scheduler.StepLR))


def test_parameters_that_no_module_has_go_by_order_and_shape(tmp_path: Path) -> None:
    def objects(*sizes: int) -> dict[str, Any]:
        model = a_model(1)
        extra = [torch.nn.Parameter(torch.ones(size)) for size in sizes]
        optimizer = torch.optim.SGD([*extra, *model.parameters()], lr=0.1, momentum=0.9)
        for parameter in [*extra, *model.parameters()]:
            parameter.grad = torch.full_like(parameter, float(len(parameter)))
        return {"model": model, "optimizer": optimizer}

    first = objects(2, 5)
    with Saved(tmp_path, **first):
        first["optimizer"].step()
    again = objects(2, 5)
    restore(tmp_path, **again)
    expected = first["optimizer"].state_dict()["state"]
    found = again["optimizer"].state_dict()["state"]
    assert [v["momentum_buffer"].tolist() for v in found.values()] == [
        v["momentum_buffer"].tolist() for v in expected.values()
    ]
    with pytest.raises(
        StateMismatch, match=r"a parameter that no module has \(parameter 0\) .*shape"
    ):
        restore(tmp_path, **objects(5, 2))


def test_names_that_torch_keeps_are_enough(tmp_path: Path) -> None:
    """The optimizer alone is given; its parameters have the names of ``named_parameters()``."""
    model = a_model()
    optimizer = torch.optim.AdamW(model.named_parameters())
    with Saved(tmp_path, optimizer=optimizer):
        train(model, optimizer)
    again = a_model()
    other = torch.optim.AdamW(list(again.named_parameters())[::-1])
    restore(tmp_path, optimizer=other)
    assert by_name(again, other) == by_name(model, optimizer)
    assert other.param_groups[0]["param_names"] == [n for n, _ in again.named_parameters()][::-1]


def test_the_order_counts_for_lbfgs(tmp_path: Path) -> None:
    model = a_model()
    optimizer = torch.optim.LBFGS(model.parameters())
    with Saved(tmp_path, model=model, optimizer=optimizer):
        pass
    again = a_model()
    restore(tmp_path, model=again, optimizer=torch.optim.LBFGS(again.parameters()))
    with pytest.raises(StateMismatch, match="LBFGS keeps one vector"):
        restore(tmp_path, model=again, optimizer=torch.optim.LBFGS(list(again.parameters())[::-1]))


OF_TORCH = sorted(
    (
        kind
        for kind in vars(torch.optim).values()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind not in {torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam}
    ),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", OF_TORCH, ids=lambda kind: kind.__name__)
def test_each_of_torchs_optimizers_goes_on_as_it_was(
    tmp_path: Path, kind: type[torch.optim.Optimizer]
) -> None:
    def made() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        model = a_model()
        matrices = [p for p in model.parameters() if p.ndim == 2]  # Muon takes no others
        return model, kind(matrices)  # type: ignore[call-arg]

    model, optimizer = made()
    with Saved(tmp_path, model=model, optimizer=optimizer):
        train(model, optimizer, steps=2)
    again, other = made()
    restore(tmp_path, model=again, optimizer=other)
    train(model, optimizer, steps=2)
    train(again, other, steps=2)
    assert by_name(again, other) == by_name(model, optimizer)


class Wide(torch.optim.Optimizer):
    """Keeps its state in wider types than the parameters, and a count beside it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["sum"] = state.get("sum", torch.zeros(p.shape)) + p.grad.float() / 3
                state["seen"] = state.get("seen", torch.zeros((), dtype=torch.int64)) + 16_777_217


def test_state_keeps_its_element_types(tmp_path: Path) -> None:
    """Torch's own ``load_state_dict`` would make all of it bfloat16."""
    model = a_model().bfloat16()
    optimizer = Wide(model.parameters())
    with Saved(tmp_path, model=model, optimizer=optimizer):
        train(model, optimizer)
    again = a_model().bfloat16()
    other = Wide(again.parameters())
    restore(tmp_path, model=again, optimizer=other)
    for before, after in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in before.items()}
    assert by_name(again, other) == by_name(model, optimizer)


# -- the rule ------------------------------------------------------------------------------------

TOTAL = 20
SCHEDULES: dict[str, Callable[[Any, float], Any]] = {
    "none": lambda _optimizer, _lr: None,
    "lambda": lambda o, _: lr_scheduler.LambdaLR(o, lambda s: min(1.0, (s + 1) / 8)),
    "multiplicative": lambda o, _: lr_scheduler.MultiplicativeLR(o, lambda _s: 0.9),
    "step": lambda o, _: lr_scheduler.StepLR(o, 3),
    "multi step": lambda o, _: lr_scheduler.MultiStepLR(o, [2, 7]),
    "exponential": lambda o, _: lr_scheduler.ExponentialLR(o, 0.8),
    "linear": lambda o, _: lr_scheduler.LinearLR(o, 0.1, total_iters=7),
    "polynomial": lambda o, _: lr_scheduler.PolynomialLR(o, TOTAL, 2),
    "cosine": lambda o, _: lr_scheduler.CosineAnnealingLR(o, TOTAL),
    "cosine with a floor": lambda o, _: lr_scheduler.CosineAnnealingLR(o, TOTAL, eta_min=0.01),
    "warm restarts": lambda o, _: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "cyclic": lambda o, lr: lr_scheduler.CyclicLR(o, lr, 3 * lr, 4, cycle_momentum=False),
    "one cycle": lambda o, lr: lr_scheduler.OneCycleLR(o, lr, TOTAL),
    "warmup, then cosine": lambda o, _: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 16)],
        [4],
    ),
    "chained": lambda o, _: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def script(schedule: str, lr: float, **options: Any) -> dict[str, Any]:
    """What a script makes: it is the same but for what is set."""
    model = a_model(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, **options)
    scheduler = SCHEDULES[schedule](optimizer, lr)
    return {"model": model, "optimizer": optimizer} | (
        {"scheduler": scheduler} if scheduler is not None else {}
    )


def rates(objects: dict[str, Any], steps: int) -> list[float]:
    """The learning rate now and after each of the next steps."""
    found = []
    for _ in range(steps):
        found.append(objects["optimizer"].param_groups[0]["lr"])
        train(*objects.values())
    return found


@pytest.mark.parametrize("at", [1, 3, 6])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_learning_rate_that_the_script_sets_anew_wins(
    tmp_path: Path, schedule: str, at: int
) -> None:
    first = script(schedule, 0.1)
    with Saved(tmp_path, **first):
        train(*first.values(), steps=at)
    after = rates(first, TOTAL - at)
    same = script(schedule, 0.1)
    restore(tmp_path, **same)
    assert rates(same, TOTAL - at) == after
    other = script(schedule, 0.004)
    restore(tmp_path, **other)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = rates(script(schedule, 0.004), TOTAL)[at:]
    assert rates(other, TOTAL - at) == pytest.approx(expected, rel=1e-6)


def test_a_changed_rate_stays_when_the_replay_is_interrupted_itself(tmp_path: Path) -> None:
    first = script("cosine", 0.1)
    with Saved(tmp_path, **first):
        train(*first.values(), steps=3)
    replay = script("cosine", 0.01)
    with Saved(tmp_path, **replay):
        train(*replay.values(), steps=2)
    expected = rates(replay, 4)
    again = script("cosine", 0.01)
    assert restore(tmp_path, **again) == 6
    assert rates(again, 4) == expected


def test_other_hyperparameters_follow_the_same_rule(tmp_path: Path) -> None:
    first = script("none", 0.1, betas=(0.9, 0.99), weight_decay=0.1)
    with Saved(tmp_path, **first):
        train(*first.values())
        first["optimizer"].param_groups[0].update(
            eps=1e-3, weight_decay=0.3
        )  # by hand, in training
    other = script("none", 0.1, betas=(0.8, 0.99), weight_decay=0.1)
    restore(tmp_path, **other)
    group = other["optimizer"].param_groups[0]
    assert group["betas"] == (0.8, 0.99)  # set anew
    assert (group["eps"], group["weight_decay"]) == (1e-3, 0.3)  # restored
    assert (
        by_name(first["model"], first["optimizer"])["0.bias"][0]
        == (by_name(other["model"], other["optimizer"])["0.bias"][0])
    )


@pytest.mark.parametrize(
    ("kind", "switched_on"),
    [
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.RMSprop, {"centered": True}),
        (torch.optim.RMSprop, {"momentum": 0.9}),
        (torch.optim.SGD, {"momentum": 0.9}),
    ],
)
def test_what_is_switched_on_begins_as_a_fresh_optimizer_begins_it(
    tmp_path: Path, kind: Any, switched_on: dict[str, Any]
) -> None:
    model = a_model()
    optimizer = kind(model.parameters(), lr=0.1)
    with Saved(tmp_path, model=model, optimizer=optimizer):
        train(model, optimizer)
    again = a_model()
    other = kind(again.parameters(), lr=0.1, **switched_on)
    restore(tmp_path, model=again, optimizer=other)
    train(again, other, steps=2)
    fresh = kind(model.parameters(), lr=0.1, **switched_on)
    train(model, fresh)
    assert [each.keys() for each in other.state.values()] == [
        each.keys() for each in fresh.state.values()
    ]


def of_parts(warm_up: int) -> Callable[[Any], Any]:
    return lambda o: lr_scheduler.SequentialLR(
        o,
        [
            lr_scheduler.LinearLR(o, 0.1, total_iters=warm_up),
            lr_scheduler.CosineAnnealingWarmRestarts(o, warm_up),
        ],
        [warm_up],
    )


RESET: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "warm restarts": (
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2, 2),
    ),
    "an earlier milestone": (of_parts(3), of_parts(2)),
    "a later milestone": (of_parts(3), of_parts(6)),
    "momentum of one cycle": (
        lambda o: lr_scheduler.OneCycleLR(o, 0.5, TOTAL),
        lambda o: lr_scheduler.OneCycleLR(o, 0.5, TOTAL, base_momentum=0.7, max_momentum=0.8),
    ),
    "momentum of cycles": (
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, 4),
        lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, 4, base_momentum=0.7, max_momentum=0.8),
    ),
}


@pytest.mark.parametrize("at", [1, 4, 5, 9])
@pytest.mark.parametrize("name", RESET)
def test_a_schedule_with_other_settings_is_where_it_would_be_with_them(
    tmp_path: Path, name: str, at: int
) -> None:
    def script(setting: Callable[[Any], Any]) -> dict[str, Any]:
        model = a_model(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return {"model": model, "optimizer": optimizer, "scheduler": setting(optimizer)}

    def followed(objects: dict[str, Any], steps: int) -> list[tuple[float, float]]:
        found = []
        for _ in range(steps):
            group = objects["optimizer"].param_groups[0]
            found.append((group["lr"], group["momentum"]))
            train(*objects.values())
        return found

    before, now = RESET[name]
    first = script(before)
    with Saved(tmp_path, **first):
        train(*first.values(), steps=at)
    again = script(now)
    restore(tmp_path, **again)
    expected = followed(script(now), TOTAL)[at:]
    assert followed(again, TOTAL - at) == [pytest.approx(each, rel=1e-6) for each in expected]


def test_settings_of_a_schedule_follow_the_same_rule(tmp_path: Path) -> None:
    def objects(total: int, gamma: float = 0.5) -> dict[str, Any]:
        made = script("none", 0.1)
        optimizer = made["optimizer"]
        return made | {
            "scheduler": lr_scheduler.SequentialLR(
                optimizer,
                [
                    lr_scheduler.CosineAnnealingLR(optimizer, total),
                    lr_scheduler.StepLR(optimizer, 2, gamma),
                ],
                [total],
            )
        }

    first = objects(6)
    with Saved(tmp_path, **first):
        train(*first.values(), steps=3)
    other = objects(12, gamma=0.1)
    restore(tmp_path, **other)
    assert rates(other, 15) == pytest.approx(rates(objects(12, gamma=0.1), 18)[3:])


def test_a_plateau_keeps_what_it_has_reduced(tmp_path: Path) -> None:
    def objects(lr: float, patience: int = 0) -> dict[str, Any]:
        made = script("none", lr)
        plateau = lr_scheduler.ReduceLROnPlateau(made["optimizer"], patience=patience)
        return made | {"scheduler": plateau}

    first = objects(0.1)
    with Saved(tmp_path, **first):
        for loss in (1.0, 2.0):
            first["scheduler"].step(loss)
        assert first["optimizer"].param_groups[0]["lr"] == pytest.approx(0.01)
    other = objects(0.5, patience=3)
    restore(tmp_path, **other)
    assert other["optimizer"].param_groups[0]["lr"] == pytest.approx(0.05)
    assert (other["scheduler"].best, other["scheduler"].patience) == (1.0, 3)


def test_a_learning_rate_in_a_tensor_is_set_too(tmp_path: Path) -> None:
    def objects(lr: float) -> dict[str, Any]:
        model = a_model(1)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=torch.tensor(lr), foreach=False, capturable=False
        )
        return {"model": model, "optimizer": optimizer}

    first = objects(0.5)
    with Saved(tmp_path, **first):
        train(*first.values())
    again = objects(0.5)
    restore(tmp_path, **again)
    assert again["optimizer"].param_groups[0]["lr"].item() == 0.5
    other = objects(0.25)
    restore(tmp_path, **other)
    assert other["optimizer"].param_groups[0]["lr"].item() == 0.25


def test_objects_that_are_in_use_are_restored_as_they_were(tmp_path: Path) -> None:
    """A script that goes back to a checkpoint has not set anything anew."""
    objects = script("none", 0.1)
    with Saved(tmp_path, **objects):
        train(*objects.values(), steps=3)
    for _ in range(2):
        objects["optimizer"].param_groups[0]["lr"] *= 0.1
        restore(tmp_path, **objects)
        assert objects["optimizer"].param_groups[0]["lr"] == 0.1
    again = script("none", 0.1)
    restore(tmp_path, **again)
    assert again["optimizer"].param_groups[0]["lr"] == 0.1


def test_a_group_that_training_adds_is_restored_with_its_values(tmp_path: Path) -> None:
    def objects() -> tuple[dict[str, Any], torch.nn.Module]:
        model, extra = a_model(1), torch.nn.Linear(2, 2)
        both = torch.nn.ModuleList([model, extra])
        return {"model": both, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}, extra

    first, extra = objects()
    checkpointer = Checkpointer(storage=str(tmp_path), period_s=1e9, **first)
    checkpointer.restore()
    first["optimizer"].add_param_group({"params": extra.parameters(), "lr": 0.7})
    checkpointer.step(1)
    checkpointer.close()
    again, extra = objects()
    again["optimizer"].add_param_group({"params": extra.parameters(), "lr": 0.7})
    again["optimizer"].param_groups[1]["lr"] = 0.7
    restore(tmp_path, **again)
    assert [group["lr"] for group in again["optimizer"].param_groups] == [0.1, 0.7]
