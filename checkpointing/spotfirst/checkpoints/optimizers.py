"""Optimizers and schedulers of a script that has changed: by the names of parameters, by one rule.

Torch numbers an optimizer's parameters in the order in which it got them. Here each number has the
parameter's name beside it, as the modules given to the Checkpointer know it. So state goes to the
parameter that it is of, whatever the order and the groups are now.

**The rule.** A checkpoint also has the values that hyperparameters had when the script had made its
optimizers and schedulers. What the script now makes with *another* value has that new value. All
else is restored. A learning rate that a scheduler controls is what the schedule says at the restored
place, with the new values.
"""

from __future__ import annotations

import bisect
import copy
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch  # noqa: TID253 - it is about torch's optimizers; only the Checkpointer imports it
from torch.optim import lr_scheduler  # noqa: TID253

from spotfirst.checkpoints.manifest import ArrayRef, GroupMade, Made
from spotfirst.checkpoints.statetree import ArrayCollector, Leaf, flatten, unflatten, walk_leaves
from spotfirst.checkpoints.wrappers import matched, parameter_names
from spotfirst.errors import UnsupportedState

__all__ = ["Refit", "Start"]

_NO_HYPERPARAMETERS = frozenset({"params", "param_names"})
_PROGRESS = frozenset({
    "last_epoch", "_step_count", "_last_lr", "_is_initial", "_get_lr_called_within_step",
    "T_cur", "T_i",
})  # fmt: skip
"""Where a scheduler is. It goes on from there, so these are always restored."""
_PER_GROUP = frozenset({
    "base_lrs", "base_values", "base_momentums", "max_lrs", "max_momentums", "min_lrs", "_last_lr",
    "lr_lambdas",
})  # fmt: skip
"""Lists in a scheduler's state that have a value for each of the optimizer's groups."""
_LIKE_THE_PARAMETER = frozenset({
    "acc_delta", "ax", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq",
    "momentum_buffer", "prev", "square_avg", "step_size", "sum",
})  # fmt: skip
"""What torch's optimizers keep in the shape of the parameter."""
_STATE_OF = {
    "amsgrad": ("max_exp_avg_sq", "exp_avg_sq"),
    "centered": ("grad_avg", "square_avg"),
    "momentum": (
        "momentum_buffer",
        "square_avg",
    ),  # of RMSprop; SGD makes its own when it is needed
}
"""What a switch keeps for each parameter, and what it lies beside. Torch makes it at the first step."""
_RATES = frozenset({"lr", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"})
"""Hyperparameters of a group from which a schedule follows."""
_CLOSED_FORM = (
    lr_scheduler.CosineAnnealingWarmRestarts, lr_scheduler.CyclicLR, lr_scheduler.LambdaLR,
    lr_scheduler.OneCycleLR,
)  # fmt: skip
"""Schedulers whose ``get_lr`` does not depend on the learning rate of the step before."""


class Start:
    """How the script has made its optimizers and schedulers, seen before anything is restored."""

    def __init__(self, objects: Mapping[str, Any]) -> None:
        self._objects = objects
        self.optimizers = {n: _inner(v) for n, v in objects.items() if _is_optimizer(v)}
        self.schedulers = {n: _inner(v) for n, v in objects.items() if _is_scheduler(v)}
        self._used = {n for n, each in self.optimizers.items() if _has_stepped(each)}
        self._used |= {n for n, s in self.schedulers.items() if getattr(s, "last_epoch", 0) > 0}
        self.groups: dict[str, list[Any]] = {
            # Those of one in use may have been changed by training.
            name: [None if name in self._used else _values(group) for group in each.param_groups]
            for name, each in self.optimizers.items()
        }
        self.values = {
            name: {k: copy.copy(v) for k, v in each.state_dict().items()}
            for name, each in self.schedulers.items()
        }
        self._trees: dict[str, Any] = {
            name: None if name in self._used else _tree(values)
            for name, values in self.values.items()
        }

    def is_fresh(self, name: str) -> bool:
        """Whether the values are those that the object was made with; it has not been used yet."""
        return name not in self._used

    def has_made(self, name: str, group: int) -> bool:
        """Whether the script has made this group of a fresh optimizer; training may add others."""
        return self.is_fresh(name) and group < len(self.groups[name])

    def adopt(self, made: Mapping[str, Made]) -> None:
        """Take the word of a checkpoint for objects that were in use before."""
        for name in self._used & made.keys():
            groups = [group.values for group in made[name].groups]
            if name in self.groups and len(groups) == len(self.groups[name]):
                self.groups[name] = groups
            if name in self.schedulers:
                self._trees[name] = made[name].values

    def names(self) -> dict[int, list[str]]:
        """The names of the parameters of all modules; see :func:`parameter_names`."""
        return parameter_names(self._objects)

    def made(self) -> dict[str, Made]:
        """What the next checkpoint says of them, with the names that parameters have now."""
        names = self.names() if self.optimizers else {}
        found = {}
        for name, optimizer in self.optimizers.items():
            started = self.groups[name]
            # Groups that were added later begin with the values that they are first seen with.
            started += [_values(group) for group in optimizer.param_groups[len(started) :]]
            found[name] = Made(
                kind=_kind(optimizer),
                groups=tuple(
                    GroupMade(
                        names=tuple(each[0] if each else "" for each in _names(group, names)),
                        values=values,
                    )
                    for group, values in zip(optimizer.param_groups, started, strict=False)
                ),
            )
        for name, scheduler in self.schedulers.items():
            found[name] = Made(kind=_kind(scheduler), values=self._trees[name])
        return found


@dataclass
class _Fit:
    """How a stored optimizer goes to the one at hand.

    ``sources`` has the number of the stored group for each group here. ``new`` has the
    hyperparameters of each that the script's own values replace.
    """

    sources: list[int | None]
    stored_groups: int
    new: list[set[str]] = field(default_factory=list)

    @property
    def is_in_order(self) -> bool:
        return self.sources == list(range(self.stored_groups))


class Refit:
    """Fits the optimizers and schedulers of a checkpoint to those at hand.

    First :meth:`arrange` the trees, before they are read; then :meth:`renew` each value, load it,
    and :meth:`settle` when all are loaded. ``problems`` says what does not fit, by object.
    """

    def __init__(
        self,
        start: Start,
        made: Mapping[str, Made],
        trees: Mapping[str, Any],
        arrays: Sequence[ArrayRef | Leaf],
        modules: AbstractSet[str] = frozenset(),
    ) -> None:
        """``trees`` over ``arrays`` are the stored ones by object; ``modules`` are modules.

        ``made`` says how the script had made the objects when the checkpoint's training began.
        """
        self._start = start
        self._made = made
        self._arrays = arrays
        self._shapes = {
            f"{name}.{path}": arrays[number].shape
            for name in modules & trees.keys()
            for path, _, number in walk_leaves(trees[name])
        }
        self._fits: dict[str, _Fit] = {}
        self._before: dict[str, list[dict[str, Any]]] = {}
        self._renewed: set[str] = set()
        self._states: dict[str, dict[Any, Any]] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        """What the script's own values have replaced, in words."""

    # -- before the bytes are read ------------------------------------------------------------

    def arrange(self, trees: Mapping[str, Any]) -> dict[str, Any]:
        """The trees, with optimizers in the order of those at hand; without those of other classes."""
        arranged = dict(trees)
        names = self._start.names()
        for name, value in {**self._start.optimizers, **self._start.schedulers}.items():
            if name not in trees:
                continue
            made, kind = self._made.get(name), _kind(value)
            if made is not None and made.kind and made.kind != kind:
                self.problems.append(f"{name} is {made.kind} in the checkpoint and {kind} here")
                del arranged[name]
            elif name in self._start.optimizers:
                arranged[name] = self._arranged(name, value, trees[name], _all_names(value, names))
        return arranged

    def _arranged(self, name: str, optimizer: Any, tree: Any, here: list[list[list[str]]]) -> Any:
        parts = _Parts.of(tree)
        if parts is None:
            return tree
        stored = self._stored_names(name, parts)
        known, ours = _joined(stored), _joined(here)
        if not any(known) and list(map(len, stored)) != list(map(len, here)):
            return tree  # without names, only torch's own rule is left; it refuses this
        sources = _sources(known, ours)
        self.problems += [
            f"{name}: {_said(names)} is not in the checkpoint"
            for names, source in zip(ours, sources, strict=True)
            if source is None
        ]
        self.problems += [
            f"{name}: {_said([known[left]])} is in the checkpoint, and is none of its parameters"
            for left in sorted(set(range(len(known))) - set(sources))
        ]
        in_order = sources == list(range(len(known)))
        if not in_order and isinstance(optimizer, torch.optim.LBFGS):
            self.problems.append(
                f"{name}: LBFGS keeps one vector for all parameters, and their order has changed"
            )
        state = {}
        parameters = _joined([group["params"] for group in optimizer.param_groups])
        for position, source in enumerate(sources):
            kept = None if source is None else parts.state.get(parts.numbers[source])
            if source is None or kept is None:
                continue
            shape = tuple(parameters[position].shape)
            if self._fits_shape(known[source], kept, shape):
                state[position] = kept
            else:
                self.problems.append(
                    f"{name}: the state of {_said([known[source]])} (parameter {position}) is of "
                    f"another shape than {list(shape)}"
                )
        fit = self._fits[name] = _Fit([], len(parts.groups))
        groups, first = [], 0
        for number, group in enumerate(optimizer.param_groups):
            last = first + len(group["params"])
            origins = sorted({parts.group_of(s) for s in sources[first:last] if s is not None})
            if not group["params"] and number < len(parts.groups):
                origins = [number]
            values = self._group(name, optimizer, parts, number, origins)
            groups.append({**values, "params": list(range(first, last))})
            first = last
        is_whole = len(state) == len(parts.state.keys() & set(parts.numbers))
        same_groups = list(map(len, stored)) == list(map(len, here)) and fit.is_in_order
        if in_order and is_whole and same_groups:
            return tree
        return parts.rebuilt(state, groups)

    def _group(
        self, name: str, optimizer: Any, parts: _Parts, number: int, origins: list[int]
    ) -> dict[str, Any]:
        """The hyperparameters of a group here, from the stored groups that its parameters were in."""
        fit, group = self._fits[name], optimizer.param_groups[number]
        fit.sources.append(origins[0] if origins else None)
        new: set[str] = set()
        fit.new.append(new)
        here = _pairs(_values(group))
        made = self._made.get(name)
        is_known = made is not None and len(parts.groups) == len(made.groups)
        result = dict(parts.groups[origins[0]]) if origins else {}
        for gone in _NO_HYPERPARAMETERS & result.keys():
            del result[gone]
        for key in group.keys() - _NO_HYPERPARAMETERS - result.keys():
            result[key] = None
            new.add(key)
        for key in result.keys() - new:
            outcomes = []
            for origin in origins:
                started = _pairs(made.groups[origin].values) if made and is_known else {}
                is_new = self._start.has_made(name, number) and _changed(started, here, key)
                outcomes.append((is_new, None if is_new else parts.groups[origin].get(key)))
            if any(is_new for is_new, _ in outcomes):
                new.add(key)
            values = [here[key] if is_new else value for is_new, value in outcomes]
            if any(value != values[0] for value in values):
                shown = ", ".join(_shown(parts.groups[origin].get(key)) for origin in origins)
                self.problems.append(
                    f"{name}: group {number} has parameters of groups "
                    f"{', '.join(map(str, origins))} of the checkpoint, whose {key} differs: {shown}"
                )
                new.add(key)
        return result

    def _stored_names(self, name: str, parts: _Parts) -> list[list[str]]:
        """The stored parameters' names by group; those that have none are empty."""
        made = self._made.get(name)
        sizes = [len(numbers) for numbers in parts.params]
        if made is not None and [len(group.names) for group in made.groups] == sizes:
            return [list(group.names) for group in made.groups]
        named = [[f".{each}" for each in given] for given in parts.param_names]
        if [len(each) for each in named] == sizes:
            return named
        return [[""] * size for size in sizes]

    def _fits_shape(self, known: str, kept: Any, shape: tuple[int, ...]) -> bool:
        stored = self._shapes.get(known)
        if stored is not None and stored != shape:
            return False
        return all(
            self._arrays[number].shape == shape
            for path, tag, number in walk_leaves(kept)
            if tag == "tensor" and path in _LIKE_THE_PARAMETER
        )

    # -- before a value is loaded ---------------------------------------------------------------

    def renew(self, name: str, state: Any) -> Any:
        """The state to load: what was read, with the values that the script has set anew."""
        if name in self._fits:
            return self._renew_optimizer(name, state)
        if name in self._start.schedulers and isinstance(state, dict):
            return self._renew_scheduler(name, state)
        return state

    def _renew_optimizer(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        optimizer, fit = self._start.optimizers[name], self._fits[name]
        is_scheduled = bool(self._schedulers_of(optimizer))
        self._before[name] = []
        self._states[name] = state["state"]
        for number, (group, new) in enumerate(zip(state["param_groups"], fit.new, strict=False)):
            here, source = optimizer.param_groups[number], fit.sources[number]
            self._before[name].append(
                {"initial_lr": group.get("initial_lr"), "lr": group.get("lr")}
            )
            for key in sorted(new):
                if key not in here:
                    continue
                if key == "lr" and is_scheduled and source is not None:
                    continue  # settle() asks the schedule
                if source is not None and key in group and group[key] is not None:
                    self.notes.append(
                        f"{name}: {key} of group {number} is {_shown(here[key])}, as the script "
                        f"sets it now, and not {_shown(group[key])}"
                    )
                group[key] = copy.deepcopy(here[key])
            group.pop("param_names", None)
            if "param_names" in here:
                group["param_names"] = list(here["param_names"])
            for key, (kept, beside) in _STATE_OF.items():
                for parameter in group["params"] if group.get(key) else ():
                    own = state["state"].get(parameter, {})
                    if kept not in own and beside in own:
                        own[kept] = torch.zeros_like(own[beside])
        return state

    def _renew_scheduler(self, name: str, state: dict[str, Any]) -> dict[str, Any]:
        scheduler = self._start.schedulers[name]
        made = self._made.get(name)
        started = made.values if made is not None else None
        fit = next(
            (
                self._fits[n]
                for n, each in self._start.optimizers.items()
                if n in self._fits and each is _inner(getattr(scheduler, "optimizer", None))
            ),
            None,
        )  # fmt: skip
        here = self._start.values[name]
        if fit is not None and not fit.is_in_order:
            state = _regrouped(state, here, fit)
            if isinstance(started, dict):
                started = _tree(_regrouped(unflatten(started, _no_leaf), here, fit))
        if isinstance(started, dict) and self._start.is_fresh(name):
            state, changed = _renewed(state, _pairs(started), here)
            if changed:
                self._renewed.add(name)
                self.notes += [f"{name}: {each}, as the script sets it now" for each in changed]
        return state

    # -- when all is loaded -------------------------------------------------------------------

    def settle(self) -> None:
        """Give each group that a scheduler controls the learning rate that the schedule says."""
        for name, state in self._states.items():
            if not self.problems:  # else the parameters may have other element types now
                _keep_types(self._start.optimizers[name], state)
        self._states.clear()
        for name, fit in self._fits.items():
            if name not in self._before:  # it refused its state
                continue
            optimizer = self._start.optimizers[name]
            governing = self._schedulers_of(optimizer)
            is_new = any(_RATES & new for new in fit.new)
            if not governing or not (is_new or self._renewed & governing.keys()):
                continue
            schedulers = [_inner(each) for each in governing.values()]
            lrs = _rates_at_its_place(schedulers[0]) if len(schedulers) == 1 else None
            if lrs is None or len(lrs) != len(optimizer.param_groups):
                lrs = [
                    self._scaled(name, number, group)
                    for number, group in enumerate(optimizer.param_groups)
                ]
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                _set_rate(group, lr)
            rates = [_plain_number(group["lr"]) for group in optimizer.param_groups]
            self.notes.append(f"{name}: the learning rate is {', '.join(map(str, rates))} here")
            for each in schedulers:
                if hasattr(each, "_last_lr"):
                    each._last_lr = list(rates)  # noqa: SLF001 - torch keeps it there

    def _scaled(self, name: str, number: int, group: dict[str, Any]) -> Any:
        """The restored learning rate, in proportion to the new one that the schedule starts from."""
        before = self._before[name][number]
        made = self._made.get(name)
        source = self._fits[name].sources[number]
        if before["lr"] is None or made is None or source is None or source >= len(made.groups):
            return group["lr"]
        if not self._start.has_made(name, number):
            return group["lr"]
        fresh = _pairs(self._start.groups[name][number])
        started = _pairs(made.groups[source].values)
        for key in ("initial_lr", "lr"):
            old, new = started.get(key), fresh.get(key)
            if isinstance(old, (int, float)) and isinstance(new, (int, float)) and old:
                return before["lr"] * (new / old)
        return fresh.get("lr", group["lr"])

    def _schedulers_of(self, optimizer: Any) -> dict[str, Any]:
        return {
            name: each
            for name, each in self._start.schedulers.items()
            if _inner(getattr(each, "optimizer", None)) is optimizer
        }


class _Parts:
    """The tree of an optimizer's state, taken apart."""

    def __init__(self, tree: Any, state: dict[Any, Any], groups: list[dict[str, Any]]) -> None:
        self._tree = tree
        self.state = state
        self.groups = groups
        self.params: list[list[int]] = [list(group["params"]) for group in groups]
        self.param_names = [list(group.get("param_names") or ()) for group in groups]
        self.numbers = [number for numbers in self.params for number in numbers]
        self._group_of = [g for g, numbers in enumerate(self.params) for _ in numbers]

    @classmethod
    def of(cls, tree: Any) -> _Parts | None:
        """``None`` for the state of an optimizer that does not keep it as torch's do."""
        top = _pairs(tree)
        state, groups = _pairs(top.get("state")), top.get("param_groups")
        if not isinstance(groups, list) or not groups:
            return None
        taken = [_pairs(group) for group in groups]
        numbers = [n for group in taken for n in group.get("params") or [] if type(n) is int]
        if not all(isinstance(group.get("params"), list) for group in taken):
            return None
        if len(set(numbers)) != sum(len(group["params"]) for group in taken):
            return None
        return cls(tree, state, taken)

    def group_of(self, source: int) -> int:
        return self._group_of[source]

    def rebuilt(self, state: Mapping[int, Any], groups: Sequence[Mapping[str, Any]]) -> Any:
        """The tree with other ``state`` of parameters and other ``groups``."""
        numbers = set(self.numbers)
        others = {key: node for key, node in self.state.items() if key not in numbers}
        content = [
            [key, _dict({**state, **others})]
            if key == "state"
            else [key, [_dict(group) for group in groups]]
            if key == "param_groups"
            else [key, node]
            for key, node in _pairs(self._tree).items()
        ]
        return {"dict": content}


def _sources(there: list[str], ours: list[list[str]]) -> list[int | None]:
    """For each parameter here, the place of the stored one; those without a name go by order."""
    if not any(there):
        return list(range(len(ours)))
    if all(not name or name.startswith(".") for name in there):  # torch's param_names only
        ours = [[each for each in names if each.startswith(".")] for names in ours]
    places = {name: place for place, name in enumerate(there) if name}
    found = matched(places, [name for names in ours for name in names])
    place_of = {mine: places[name] for name, mine in found.items()}
    unnamed = iter([place for place, name in enumerate(there) if not name])
    result: list[int | None] = []
    for names in ours:
        named = [place_of[name] for name in names if name in place_of]
        result.append(named[0] if named else None if names else next(unnamed, None))
    return result


def _all_names(optimizer: Any, names: Mapping[int, list[str]]) -> list[list[list[str]]]:
    """The names of the parameters by group, torch's own (after a dot) among them."""
    result = []
    for group in optimizer.param_groups:
        given = group.get("param_names") or [None] * len(group["params"])
        result.append([
            [*names.get(id(p), ()), *([f".{own}"] if own is not None else ())]
            for p, own in zip(group["params"], given, strict=False)
        ])  # fmt: skip
    return result


def _names(group: dict[str, Any], names: Mapping[int, list[str]]) -> list[list[str]]:
    given = group.get("param_names") or [None] * len(group["params"])
    return [
        names.get(id(p)) or ([f".{own}"] if own is not None else [])
        for p, own in zip(group["params"], given, strict=False)
    ]


def _joined(groups: list[list[Any]]) -> list[Any]:
    return [each for group in groups for each in group]


def _said(names: Sequence[str]) -> str:
    name = next((each.lstrip(".") for each in names if each), "")
    return name or "a parameter that no module has"


def _renewed(
    state: dict[str, Any], started: dict[str, Any], here: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """A scheduler's restored state with the settings that the script has changed, and which."""
    result, changed = dict(state), []
    fresh = _pairs(_tree(here))
    for key, value in here.items():
        if key in _PROGRESS or key not in state:
            continue
        if key == "_schedulers" and isinstance(started.get(key), list):
            inner = [
                _renewed(dict(one), _pairs(before), now)
                for one, before, now in zip(state[key], started[key], value, strict=False)
            ]
            result[key] = [one for one, _ in inner]
            changed += [f"scheduler {n}: {each}" for n, (_, c) in enumerate(inner) for each in c]
        elif _changed(started, fresh, key):
            result[key] = value
            changed.append(f"{key} is {_shown(value)}")
    if changed:
        _place(result)
    return result, changed


def _place(state: dict[str, Any]) -> None:
    """Say where a schedule is within its parts, as its new settings have it."""
    if state.keys() >= {"T_0", "T_mult", "T_cur", "T_i"}:  # restarts
        passed, length = state["last_epoch"] + state["T_cur"] % 1, state["T_0"]
        while passed >= length:
            passed, length = passed - length, length * state["T_mult"]
        state.update(T_cur=passed, T_i=length)
    milestones = state.get("_milestones")
    if isinstance(milestones, list) and isinstance(state.get("_schedulers"), list):
        running = bisect.bisect_right(milestones, state["last_epoch"])
        for number, part in enumerate(state["_schedulers"]):
            if number >= running and "last_epoch" in part:
                passed = state["last_epoch"] - (milestones[number - 1] if number else 0)
                part["last_epoch"] = max(passed, 0)
                _place(part)


def _regrouped(state: Any, here: Mapping[str, Any], fit: _Fit) -> Any:
    """A scheduler's state with the lists that go by group in the order of the groups here."""
    result = dict(state)
    for key, value in state.items():
        if key == "_schedulers" and isinstance(value, list):
            ours = here.get(key, [{}] * len(value))
            result[key] = [
                _regrouped(each, mine, fit) for each, mine in zip(value, ours, strict=False)
            ]
        elif key in _PER_GROUP and isinstance(value, list) and len(value) == fit.stored_groups:
            mine = here.get(key) or []
            result[key] = [
                value[source] if source is not None else mine[n] if n < len(mine) else None
                for n, source in enumerate(fit.sources)
            ]
    return result


def _rates_at_its_place(scheduler: Any) -> list[Any] | None:
    """The learning rates that a schedule says where it is; ``None`` when it cannot be asked."""
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        part = bisect.bisect_right(scheduler._milestones, scheduler.last_epoch)  # noqa: SLF001
        return _rates_at_its_place(scheduler._schedulers[part])  # noqa: SLF001
    closed = getattr(scheduler, "_get_closed_form_lr", None)
    if closed is None and not isinstance(scheduler, _CLOSED_FORM):
        return None
    try:
        if closed is not None:
            return list(closed())
        scheduler._get_lr_called_within_step = True  # noqa: SLF001 - as torch does: no warning
        try:
            return list(scheduler.get_lr())
        finally:
            scheduler._get_lr_called_within_step = False  # noqa: SLF001
    except Exception:  # noqa: BLE001 - a schedule that ends before the place it is at
        return None


def _keep_types(optimizer: Any, state: Mapping[Any, Any]) -> None:
    """Undo that torch converts the state of a parameter to the parameter's element type.

    An optimizer that has its own ``load_state_dict`` has the last word.
    """
    if type(optimizer).load_state_dict is not torch.optim.Optimizer.load_state_dict:
        return
    parameters = _joined([group["params"] for group in optimizer.param_groups])
    for position, kept in state.items():
        loaded = optimizer.state.get(parameters[position]) if type(position) is int else None
        if not isinstance(loaded, dict) or not isinstance(kept, dict):
            continue
        for key, value in kept.items():
            now = loaded.get(key)
            if key == "step" or not isinstance(now, torch.Tensor):
                continue
            if isinstance(value, torch.Tensor) and now.dtype != value.dtype:
                loaded[key] = value.to(now.device)


def _set_rate(group: dict[str, Any], lr: Any) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(_plain_number(lr))
    else:
        group["lr"] = _plain_number(lr)


def _plain_number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) else value


def _has_stepped(optimizer: Any) -> bool:
    """Whether it is in use. Adagrad has state at once, with a step count of 0."""
    states = [each for each in optimizer.state.values() if isinstance(each, dict)]
    return any(_plain_number(each.get("step", 1)) != 0 for each in states if each)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, torch.optim.Optimizer)


def _is_scheduler(value: Any) -> bool:
    if isinstance(value, torch.nn.Module) or _is_optimizer(value):
        return False
    inner = _inner(value)
    if isinstance(inner, lr_scheduler.LRScheduler):
        return True
    # timm's schedulers extend no class of torch.
    return _is_optimizer(getattr(inner, "optimizer", None)) and hasattr(inner, "base_values")


def _inner(value: Any) -> Any:
    """What Accelerate wraps."""
    if _is_optimizer(value):
        while _is_optimizer(getattr(value, "optimizer", None)):
            value = value.optimizer
    elif isinstance(getattr(value, "scheduler", None), lr_scheduler.LRScheduler):
        value = value.scheduler
    return value


def _kind(value: Any) -> str:
    inner = getattr(value, "_schedulers", None)
    parts = f"({', '.join(map(_kind, inner))})" if isinstance(inner, list) else ""
    return type(value).__qualname__ + parts


def _values(group: Mapping[str, Any]) -> Any:
    return _tree({k: v for k, v in group.items() if k not in _NO_HYPERPARAMETERS})


def _tree(values: Mapping[str, Any]) -> Any:
    """The tree of all values that are plain; the others are left out."""
    return {"dict": [[k, n] for k, v in values.items() for n in _plain(v)]}


def _plain(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or hasattr(value, "to_local"):
            return []
        value = value.item()
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return [[_tree(each) for each in value]]
    if isinstance(value, (list, tuple)):
        value = (
            type(value)(_plain_number(each) for each in value)
            if type(value) in (list, tuple)
            else value
        )
    collector = ArrayCollector()
    try:
        node = flatten(value, collector)
    except UnsupportedState:
        return []
    return [] if collector.leaves else [node]


def _pairs(tree: Any) -> dict[Any, Any]:
    """Keys and nodes of a mapping's tree."""
    if not isinstance(tree, dict):
        return {}
    content = tree.get("dict", tree.get("ordered"))
    if not isinstance(content, list):
        return {}
    return {k if isinstance(k, (str, int)) else unflatten(k, _no_leaf): node for k, node in content}


def _dict(nodes: Mapping[Any, Any]) -> Any:
    return {"dict": [[key, node] for key, node in nodes.items()]}


def _changed(started: Mapping[str, Any], here: Mapping[str, Any], key: str) -> bool:
    """Whether the script makes another value than it did when the checkpoint's training began."""
    return key in started and key in here and bool(started[key] != here[key])


def _shown(value: Any) -> str:
    return f"{_plain_number(value)!r:.60}"


def _no_leaf(tag: str, _: int) -> Any:
    msg = f"{tag} among hyperparameters"
    raise ValueError(msg)
