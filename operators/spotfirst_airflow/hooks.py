"""The connection type ``spotfirst``: where runs are kept, and the keys to get at them.

========================= ==========================================================
field of the connection   is
========================= ==========================================================
Access key ID (login)     ``AWS_ACCESS_KEY_ID``; with none, the role of the process
Secret key (password)     ``AWS_SECRET_ACCESS_KEY``
``storage``               the URL that holds all runs, such as ``s3://bucket/spotfirst``
``endpoint_url``          an S3 server that is not AWS
``region``                the region of the bucket and of the fleet
``fleet``                 the fleet of tasks that name none
``control_secret``        what controllers sign their decisions with, the same on every host
                          (:mod:`spotfirst.signing`); with none, the key of the process
========================= ==========================================================

Nothing of this is ever written into a spec, a trigger or an XCom: whoever needs it asks the
connection again, so that a rotated key is picked up within one look.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from spotfirst.errors import InvalidSpec, SpotfirstError
from spotfirst.signing import ControlKeys
from spotfirst.storage import Storage, is_s3, open_storage
from spotfirst_airflow.controlkeys import with_keys

__all__ = ["STORAGE_VARIABLE", "SpotfirstHook"]

STORAGE_VARIABLE = "SPOTFIRST_STORAGE"
_OTHER_IDENTITIES = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE")


class SpotfirstHook(BaseHook):
    """Opens the storage, and says what an instance needs to reach it.

    ``spotfirst_conn_id=None`` means: no connection, only this process's environment
    (``AWS_*``, ``SPOTFIRST_STORAGE``).
    """

    conn_name_attr = "spotfirst_conn_id"
    default_conn_name = "spotfirst_default"
    conn_type = "spotfirst"
    hook_name = "Spotfirst"

    def __init__(self, spotfirst_conn_id: str | None = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.conn_id = spotfirst_conn_id
        self._read: Any = None

    @classmethod
    def find(cls, conn_id: str | None) -> SpotfirstHook:
        """The hook for a connection; without one when only the default is asked for and missing.

        Decide this once per task: a look-up that fails later must not turn into "no connection".
        """
        hook = cls(conn_id)
        try:
            hook.connection()
        except AirflowNotFoundException:
            if conn_id != cls.default_conn_name:
                raise
            return cls(None)
        return hook

    def connection(self) -> Any:
        """The Airflow connection, read once per hook; ``None`` without one."""
        if self._read is None and self.conn_id is not None:
            self._read = self.get_connection(self.conn_id)
        return self._read

    @property
    def default_storage(self) -> str | None:
        """The URL for tasks that name none: the connection's, or else ``$SPOTFIRST_STORAGE``."""
        return self._extra("storage") or os.environ.get(STORAGE_VARIABLE) or None

    @property
    def default_fleet(self) -> str:
        """The fleet for tasks that name none."""
        return self._extra("fleet") or "local"

    def environment(self) -> dict[str, str]:
        """The ``AWS_*`` variables for fleets and agents, secrets included: never log or store it."""
        variables = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
        connection = self.connection()
        if connection is None:
            return variables
        if connection.login:
            # A half of each identity would be refused, or worse, be another one.
            for name in _OTHER_IDENTITIES:
                variables.pop(name, None)
            variables["AWS_ACCESS_KEY_ID"] = connection.login
            variables["AWS_SECRET_ACCESS_KEY"] = connection.password or ""
        if region := self._extra("region"):
            variables["AWS_REGION"] = variables["AWS_DEFAULT_REGION"] = region
        if endpoint := self._extra("endpoint_url"):
            variables["AWS_ENDPOINT_URL_S3"] = endpoint
        return variables

    def open_storage(self, url: str | None = None) -> Storage:
        """The storage at ``url``, or the default one. Raises :class:`InvalidSpec` without either."""
        url = url or self.default_storage
        if not url:
            msg = (
                "no storage: give the task storage='s3://BUCKET/PREFIX', or set it in the "
                f"Spotfirst connection {self.conn_id or self.default_conn_name!r} or in "
                f"${STORAGE_VARIABLE}"
            )
            raise InvalidSpec(msg)
        storage = open_storage(url, options=self._options() if is_s3(url) else None)
        return with_keys(storage, self.control_keys())

    def control_keys(self) -> ControlKeys | None:
        """The connection's control key; ``None`` means this process's own.

        It stays in controllers: :meth:`environment`, which instances get, has no part of it.
        """
        key = self._extra("control_secret")
        return ControlKeys.parse(key) if key else None

    def test_connection(self) -> tuple[bool, str]:
        """What the *Test* button of the connection form does: write to the storage and delete."""
        try:
            storage = self.open_storage()
            storage.probe()
        except SpotfirstError as error:
            return False, str(error)
        return True, f"{storage.url} can be written, and creates only what is absent"

    def load_weights(
        self, result: Mapping[str, Any], name: str = "model", *, storage: str | None = None
    ) -> dict[str, Any]:
        """The trained weights of a task's result as NumPy arrays by name; needs no torch.

        ``result`` is what a :class:`SpotTrainingOperator` returned, and ``name`` the object as it
        was given to the Checkpointer. Nested names are joined with ``/``. bfloat16 becomes
        float32, as NumPy has no such type. For torch: ``{k: torch.from_numpy(v) for k, v in …}``.

        The storage is ``storage``, or else the default one: people can edit XComs, so a result
        does not choose what is read. Only where there is no default one, it is the result's; a
        run there must have been signed by a controller of ours. Raises :class:`InvalidSpec` for a
        result of another storage, and when the checkpoint is no longer kept or has no such object;
        :class:`UntrustedObject` for a run that is not ours.
        """
        from spotfirst.checkpoints.weights import read_arrays
        from spotfirst.run import Run
        from spotfirst_airflow.selection import select, split

        missing = [key for key in ("storage", "resume_from") if not result.get(key)]
        if missing:
            msg = f"the result has no {' and no '.join(missing)}: it is of no run with a checkpoint"
            raise InvalidSpec(msg)
        hook = type(self).find(self.conn_id)
        ours = storage or hook.default_storage
        place = hook.open_storage(ours or str(result["storage"]))
        if str(result["storage"]).rstrip("/") != place.url:
            msg = (
                f"the result is of a run in {result['storage']}, and this is {place.url}; give "
                "load_weights(…, storage=…) if that is right"
            )
            raise InvalidSpec(msg)
        Run(place, split(str(result["resume_from"]))[0]).spec()  # its signature, before all else
        run, _, commit = select(place, str(result["resume_from"]), pinned=True)
        return read_arrays(run.packs(), commit, name)

    def get_conn(self) -> Storage:
        """The default storage, as Airflow's hooks are expected to give."""
        return self.open_storage()

    def _options(self) -> dict[str, Any]:
        connection = self.connection()
        if connection is None:
            return {}
        options: dict[str, Any] = {}
        if connection.login:
            options |= {"key": connection.login, "secret": connection.password or ""}
        if region := self._extra("region"):
            options["client_kwargs"] = {"region_name": region}
        if endpoint := self._extra("endpoint_url"):
            options["endpoint_url"] = endpoint
        return options

    def _extra(self, name: str) -> str | None:
        connection = self.connection()
        value = connection.extra_dejson.get(name) if connection is not None else None
        return str(value).strip() or None if value is not None else None
