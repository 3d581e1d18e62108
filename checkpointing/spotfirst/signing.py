"""Signatures on what controllers decide: an HMAC-SHA256 with a key that no instance has.

Instances may write to the storage, and so may others. What a controller acts on (spec, amendments,
events, pins) therefore ends with a ``mac`` field over the run's id, the object's path, the entry
before it and the content, so that a record that was changed, made up, or moved to another place is
refused. Controllers find the key in this order:

1. the field ``control_secret`` of the Spotfirst connection (:class:`spotfirst_airflow.hooks`),
2. the environment variable ``SPOTFIRST_CONTROL_KEY``,
3. ``~/.config/spotfirst/control.key``, which is made at its first use, readable by its owner only.

A key is any text of at least 32 characters. Several, separated by white space, are for a change of
keys: the first one signs, and all are accepted. Instances use :data:`UNVERIFIED`: they hold no key,
and the digest of their spec comes with their launch.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from pathlib import Path

from spotfirst.errors import InvalidSpec, UntrustedObject
from spotfirst.wire import check_version

__all__ = [
    "KEY_VARIABLE",
    "UNVERIFIED",
    "ControlKeys",
    "Seal",
    "default_keys",
    "generate_key",
    "key_file",
]

KEY_VARIABLE = "SPOTFIRST_CONTROL_KEY"
_SHORTEST = 32
_FIELD = re.compile(rb',"mac":"([0-9a-f]{8})\.([0-9a-f]{64})"\}\Z')
_FIELD_BYTES = len(b',"mac":"') + 8 + 1 + 64 + len(b'"}')


class ControlKeys:
    """The keys of one storage's controllers. The first signs; all of them verify."""

    def __init__(self, *keys: str) -> None:
        self._keys: dict[str, bytes] = {}
        for key in keys:
            if len(key) < _SHORTEST:
                msg = (
                    f"a control key must have at least {_SHORTEST} characters, and this one has "
                    f"{len(key)}; make one with: python -m spotfirst.signing"
                )
                raise InvalidSpec(msg)
            secret = hashlib.sha256(b"spotfirst control key\0" + key.encode()).digest()
            self._keys[hashlib.sha256(secret).hexdigest()[:8]] = secret

    def __repr__(self) -> str:
        return f"<ControlKeys {', '.join(self._keys)}>"

    @classmethod
    def parse(cls, text: str) -> ControlKeys:
        """The keys in a text, separated by white space. Raises :class:`InvalidSpec`."""
        keys = text.split()
        if not keys:
            msg = "the control key is empty; make one with: python -m spotfirst.signing"
            raise InvalidSpec(msg)
        return cls(*keys)

    @property
    def verifies(self) -> bool:
        """Whether records are checked at all: everywhere but on instances."""
        return True

    @property
    def ids(self) -> tuple[str, ...]:
        """Short names of the keys, safe to show. The first is of the one that signs."""
        return tuple(self._keys)

    def sign(self, message: bytes) -> tuple[str, str]:
        """(key id, MAC in hexadecimal) of a message."""
        key_id, secret = next(iter(self._keys.items()))
        return key_id, hmac.new(secret, message, hashlib.sha256).hexdigest()

    def verify(self, message: bytes, *, key_id: str, mac: str) -> bool:
        """Whether the key of that id signed the message."""
        secret = self._keys.get(key_id)
        if secret is None:
            return False
        expected = hmac.new(secret, message, hashlib.sha256).hexdigest()
        return hmac.compare_digest(expected, mac)


class _Unverified(ControlKeys):
    @property
    def verifies(self) -> bool:
        return False

    def sign(self, message: bytes) -> tuple[str, str]:  # noqa: ARG002
        msg = "an instance holds no control key, so it cannot write what controllers decide"
        raise UntrustedObject(msg)


UNVERIFIED = _Unverified()
"""For instances, which have no key: reads without a check, and cannot sign."""


class Seal:
    """Signs and checks the objects of one run."""

    def __init__(self, keys: ControlKeys, run_id: str, url: str) -> None:
        self._keys = keys
        self._run_id = run_id
        self._url = url

    def close(self, body: bytes, *, path: str, after: str = "") -> tuple[bytes, str]:
        """A record with its MAC as the last field, and the MAC. ``after``: the entry's before it."""
        key_id, mac = self._keys.sign(self._message(body, path, after))
        return b'%s,"mac":"%s.%s"}' % (body[:-1], key_id.encode(), mac.encode()), mac

    def open(self, data: bytes, *, path: str, after: str = "") -> tuple[bytes, str]:
        """The record without its MAC, and the MAC.

        Raises :class:`UntrustedObject` for a record that no controller of ours wrote at this place.
        """
        found = _FIELD.search(data, max(0, len(data) - _FIELD_BYTES))
        if not self._keys.verifies:
            return (data, "") if found is None else (_without(data, found), found[2].decode())
        if found is None:
            raise self._refused(data, path, "carries no signature")
        body, key_id, mac = _without(data, found), found[1].decode(), found[2].decode()
        if key_id not in self._keys.ids:
            why = f"is signed with key {key_id}, and here is key {', '.join(self._keys.ids)}"
            raise self._refused(data, path, why)
        if not self._keys.verify(self._message(body, path, after), key_id=key_id, mac=mac):
            why = "was changed, moved here, or follows an entry that was replaced or removed"
            raise self._refused(data, path, why)
        return body, mac

    def _message(self, body: bytes, path: str, after: str) -> bytes:
        parts = (b"spotfirst 1", self._run_id.encode(), path.encode(), after.encode(), body)
        return b"".join(len(part).to_bytes(8, "big") + part for part in parts)

    def _refused(self, data: bytes, path: str, why: str) -> UntrustedObject:
        """What to raise; raises itself for something that another release may be able to read."""
        where = f"{self._url}/{path}"
        check_version(data, path=where)
        return UntrustedObject(
            f"{where} {why}: no controller with this key wrote it, so it is not acted "
            f"on. If it is from a controller of yours on another host, give both the same key "
            f"(control_secret of the Spotfirst connection, or {KEY_VARIABLE}); else somebody else "
            "writes to this storage: restore the object from an older version"
        )


def _without(data: bytes, mac: re.Match[bytes]) -> bytes:
    return data[: mac.start()] + b"}"


def default_keys() -> ControlKeys:
    """The keys of this process: ``$SPOTFIRST_CONTROL_KEY``, or the user's key file.

    Makes the file when there is none. Raises :class:`InvalidSpec` for a key that is unusable.
    """
    text = os.environ.get(KEY_VARIABLE, "")
    if text.strip():
        return ControlKeys.parse(text)
    path = Path("control.key")
    try:
        path = key_file()
        if not path.exists():
            _make(path)
        mode = stat.S_IMODE(path.stat().st_mode)
        text = path.read_text()
    except (OSError, RuntimeError, UnicodeDecodeError) as error:  # RuntimeError: no home
        msg = (
            f"there is no control key, and {path} cannot be used for one: {error}. Set "
            f"{KEY_VARIABLE}, or control_secret of the Spotfirst connection, to the output of "
            "`python -m spotfirst.signing`: the same on every host that runs controllers"
        )
        raise InvalidSpec(msg) from error
    if mode & 0o077:
        msg = (
            f"the control key {path} can be read or changed by others (mode {mode:o}); run "
            f"chmod 600 {path}, or make another key if somebody may have read it"
        )
        raise InvalidSpec(msg)
    return ControlKeys.parse(text)


def key_file() -> Path:
    """Where the key of this user is kept."""
    config = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(config).expanduser() / "spotfirst" / "control.key"


def generate_key() -> str:
    """A new key: 256 random bits in hexadecimal."""
    return secrets.token_hex(32)


def _make(path: Path) -> None:
    """Make a key at ``path``, whole or not at all; of several processes one wins."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(generate_key() + "\n")
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    print(generate_key())  # noqa: T201
