"""Everything that Spotfirst raises, as one tree.

SpotfirstError
├── InvalidSpec            the run asked for something that cannot be; nothing was launched
│   ├── UnknownDataset     a dataset or a version of one that is not in this storage
│   ├── UnknownRun         a run, generation or step that is not in this storage
│   └── UnsupportedStorage the storage cannot do what a run needs of it
├── StorageError
│   ├── ObjectMissing      there is no object at this path
│   ├── StorageDenied      the storage refused us: people must act, or it passes (a key rotates)
│   └── StorageUnavailable the storage did not answer; the same call may succeed later
├── FormatError            an object is there, but it is not what it must be
│   ├── NewerFormat        written by a newer Spotfirst
│   └── CorruptObject      its bytes are not the ones that its name or its manifest promises
│       └── UntrustedObject it is not signed by a controller, or not for this place
├── StateError             a training state and a checkpoint do not go together
│   ├── UnsupportedState   the state holds something that checkpoints do not store
│   └── StateMismatch      the checkpoint is of another model, or of other objects
├── Conflict
│   ├── LostRace           another writer decided first; read again
│   ├── ClaimLost          a newer attempt has claimed the checkpoint chain; this one must stop
│   └── SaveOvertaken      a save of a later step was committed first; this one was dropped
└── FleetError
    ├── NoCapacity         the pool has no instance for us now
    │   └── QuotaReached   because the account's quota of that market is used up
    ├── LaunchRejected     the fleet will never accept this launch as it stands
    └── FleetUnavailable   the fleet did not answer; the same call may succeed later
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spotfirst.market import Pool

__all__ = [
    "ClaimLost",
    "Conflict",
    "CorruptObject",
    "FleetError",
    "FleetUnavailable",
    "FormatError",
    "InvalidSpec",
    "LaunchRejected",
    "LostRace",
    "NewerFormat",
    "NoCapacity",
    "ObjectMissing",
    "QuotaReached",
    "SaveOvertaken",
    "SpotfirstError",
    "StateError",
    "StateMismatch",
    "StorageDenied",
    "StorageError",
    "StorageUnavailable",
    "UnknownDataset",
    "UnknownRun",
    "UnsupportedState",
    "UnsupportedStorage",
    "UntrustedObject",
]


class SpotfirstError(Exception):
    """The root of the tree; catches whatever Spotfirst raises on purpose."""


class InvalidSpec(SpotfirstError, ValueError):
    """The run cannot be as asked. Raised before anything is launched or paid for."""


class UnknownDataset(InvalidSpec):
    """No such dataset or version in this storage."""


class UnknownRun(InvalidSpec):
    """No such run, generation or step in this storage."""


class UnsupportedStorage(InvalidSpec):
    """The storage lacks put-if-absent, or cannot be written."""


class StorageError(SpotfirstError):
    """A call to the storage failed. ``path`` is the object it was about."""

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class ObjectMissing(StorageError):
    """There is no object at ``path``."""


class StorageDenied(StorageError):
    """The storage refused the call.

    Credentials, permissions and read-only mounts change while a training runs, and are worth
    waiting for. ``lasting``: this one is not, as the call can never be taken (a name that is too
    long, a bucket that does not exist).
    """

    def __init__(self, message: str, *, path: str = "", lasting: bool = False) -> None:
        super().__init__(message, path=path)
        self.lasting = lasting


class StorageUnavailable(StorageError):
    """No answer, or a 5xx one. The call may or may not have been applied."""


class FormatError(SpotfirstError):
    """An object's content is not what this version of Spotfirst can read."""


class NewerFormat(FormatError):
    """The object was written by a newer version of Spotfirst."""


class CorruptObject(FormatError):
    """The bytes differ from those that the object's name or manifest promises."""


class UntrustedObject(CorruptObject):
    """The object claims to be a controller's, and its signature does not prove it."""


class StateError(SpotfirstError):
    """A training state cannot be saved, or a checkpoint cannot be loaded into it."""


class UnsupportedState(StateError, TypeError):
    """A value of a kind that checkpoints do not store, named with its place in the state."""


class StateMismatch(StateError, ValueError):
    """The checkpoint does not fit the objects it is to be loaded into; the message lists how."""


class Conflict(SpotfirstError):
    """Someone else wrote first. Nothing of ours was written."""


class LostRace(Conflict):
    """Another controller appended this event number; fold again and decide again."""


class ClaimLost(Conflict):
    """A newer attempt holds the checkpoint chain. ``holder`` is its number."""

    def __init__(self, message: str, *, holder: int) -> None:
        super().__init__(message)
        self.holder = holder


class SaveOvertaken(Conflict):
    """Saves overlapped, and one of a later step was committed before this one. That one stands."""


class FleetError(SpotfirstError):
    """A call to the fleet failed."""


class NoCapacity(FleetError):
    """No pool can give an instance now; another pool or a later try may.

    ``pools`` are those that were tried; none named: the one that was asked for first.
    """

    def __init__(self, message: str, *, pools: Sequence[Pool] = ()) -> None:
        super().__init__(message)
        self.pools = tuple(pools)


class QuotaReached(NoCapacity):
    """The account may have no more instances in this market now.

    It passes when other instances end, whoever has them, or when the quota is raised.
    """


class LaunchRejected(FleetError):
    """Permission or configuration: the same launch will be refused again."""


class FleetUnavailable(FleetError):
    """The fleet did not answer. The launch may or may not have happened: ask by token."""
