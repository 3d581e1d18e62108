"""What templates rendered to: a value that is missing is told from the text of a value.

Jinja writes a missing value as the word ``None``, which is also a text that somebody may have
meant. So templates are rendered with a mark in the place of each missing value.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from spotfirst.errors import InvalidSpec
from spotfirst_airflow.arguments import is_template

__all__ = ["check_rendered", "refuse_code", "render_exactly"]

_MAY_BE_EMPTY = {"env"}
"""An environment variable that is set to nothing is a common way to switch something off."""


def render_exactly(
    render: Callable[[Any], object], jinja_env: Any, name: str, owner: Any, *, is_exact: bool
) -> None:
    """Render one field of an operator with ``render(environment)``.

    When ``is_exact``, :class:`InvalidSpec` is raised if a value behind its templates is missing. It
    is also raised for a template that no value can render.
    """
    import jinja2

    own = jinja_env.finalize  # of the DAG's jinja_environment_kwargs

    def finalize(value: Any) -> Any:
        if value is None or isinstance(value, jinja2.Undefined):
            return mark
        return value if own is None else own(value)

    mark = f"\0{secrets.token_hex(8)}\0"
    written = getattr(owner, name)
    try:
        render(jinja_env.overlay(finalize=finalize) if is_exact else jinja_env)
    except jinja2.TemplateError as error:
        msg = f"{name} is {written!r}, which cannot be rendered: {error}"
        raise InvalidSpec(msg) from error
    refuse_code(name, written, getattr(owner, name))
    if is_exact:
        rendered = _with_texts(written, getattr(owner, name))
        check_rendered({name: written}, {name: rendered}, mark=mark)
        setattr(owner, name, rendered)


def refuse_code(name: str, written: Any, rendered: Any) -> None:
    """Raise :class:`InvalidSpec` when a template decides what a controller executes.

    Params, conf and XComs are for more people than DAGs are. They may choose among what is
    installed; which class is imported, and what is run as the agent, the DAG's author writes down.
    """
    if name == "policy" and is_template(written) and ":" in str(rendered):
        msg = (
            f"policy (written as {written!r}) rendered to {rendered!r}: a template may give the "
            "name of an installed policy only. Write MODULE:CLASS into the DAG"
        )
        raise InvalidSpec(msg)
    if name != "fleet_options" or not isinstance(rendered, Mapping):
        return
    literal = written.get("agent_command") if isinstance(written, Mapping) else None
    if rendered.get("agent_command") != literal:
        msg = (
            "fleet_options['agent_command'] was given by a template: it is run where controllers "
            "run. Write it into the DAG"
        )
        raise InvalidSpec(msg)


def check_rendered(written: Mapping[str, Any], rendered: Mapping[str, Any], *, mark: str) -> None:
    """Raise :class:`InvalidSpec` when a field that was meant to hold a value holds none.

    ``written`` are the fields as the DAG's author wrote them, ``rendered`` as they are now, with
    ``mark`` in the place of what a missing Param or XCom gave. Launched without that value, a run
    would train the wrong thing, at full price.
    """
    problems = [
        f"{path} (written as {source!r}) rendered to {_unmarked(value, mark)!r}"
        for name in written
        for path, source, value in _pairs(name, written[name], rendered.get(name))
        if _is_lost(path, source, value, mark)
    ]
    if problems:
        msg = (
            f"{'; '.join(problems)}. Give the Param or XCom behind it a value, or leave the "
            "argument out (for resume_from, 'scratch' means: from the beginning)"
        )
        raise InvalidSpec(msg)


def _with_texts(written: Any, rendered: Any) -> Any:
    """``rendered`` with the text "None" where native rendering read it as a Python literal."""
    if isinstance(written, Mapping) and isinstance(rendered, Mapping):
        return {key: _with_texts(written.get(key), each) for key, each in rendered.items()}
    if _is_list(written) and type(rendered) in {list, tuple} and len(written) == len(rendered):
        pairs = zip(written, rendered, strict=True)
        return type(rendered)(_with_texts(before, after) for before, after in pairs)
    # A value that is missing has the mark in its place, so this one is not.
    return "None" if rendered is None and isinstance(written, str) else rendered


def _unmarked(value: Any, mark: str) -> Any:
    return value.replace(mark, "None") if isinstance(value, str) else value


def _pairs(path: str, written: Any, rendered: Any) -> Iterator[tuple[str, Any, Any]]:
    """(path, leaf as written, leaf as rendered) of a nested field."""
    if isinstance(written, Mapping) and isinstance(rendered, Mapping):
        for key in written:
            yield from _pairs(f"{path}[{key!r}]", written[key], rendered.get(key))
    elif _is_list(written) and _is_list(rendered) and len(written) == len(rendered):
        for index, (before, after) in enumerate(zip(written, rendered, strict=True)):
            yield from _pairs(f"{path}[{index}]", before, after)
    else:
        yield path, written, rendered


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_lost(path: str, written: Any, rendered: Any, mark: str) -> bool:
    if not is_template(written):
        return False
    if rendered is None:
        return True
    if not isinstance(rendered, str):
        return False
    is_empty = not rendered.strip() and path.partition("[")[0] not in _MAY_BE_EMPTY
    return is_empty or mark in rendered
