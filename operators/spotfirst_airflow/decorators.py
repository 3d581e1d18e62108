"""``@task.spot_training``: a function that says what to train, then the operator that does it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.bases.decorator import (
    DecoratedOperator,
    TaskDecorator,
    determine_kwargs,
    task_decorator_factory,
)
from airflow.sdk.definitions._internal.types import SET_DURING_EXECUTION
from airflow.sdk.definitions.context import context_merge
from airflow.sdk.exceptions import AirflowFailException

from spotfirst_airflow.arguments import suggestion
from spotfirst_airflow.operators import SpotTrainingOperator

if TYPE_CHECKING:
    from airflow.sdk import Context

__all__ = ["SpotTrainingDecoratedOperator", "spot_training_task"]


class SpotTrainingDecoratedOperator(DecoratedOperator, SpotTrainingOperator):
    """Calls the function in the worker; what it returns says what to train.

    The function returns the command, a list of words, or a dict of arguments of
    :class:`SpotTrainingOperator`, the command among them. Arguments that are fixed when the DAG
    is parsed go to the decorator. Returned strings are taken as they are: rendering them would
    evaluate what the function may have got from a Param.

    The function is called once per try. It is not called again when the run has ended.
    """

    template_fields: Sequence[str] = (
        *DecoratedOperator.template_fields,
        *SpotTrainingOperator.template_fields,
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {
        **DecoratedOperator.template_fields_renderers,
        **SpotTrainingOperator.template_fields_renderers,
    }
    custom_operator_name = "@task.spot_training"
    overwrite_rtif_after_execution = True

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("command", SET_DURING_EXECUTION) is not SET_DURING_EXECUTION:
            msg = "@task.spot_training takes no command: the decorated function returns it"
            raise TypeError(msg)
        super().__init__(
            python_callable=python_callable,
            op_args=op_args,
            op_kwargs=op_kwargs,
            command=SET_DURING_EXECUTION,
            **kwargs,
        )

    def execute(self, context: Context) -> dict[str, Any]:
        """Call the function, take its arguments, and train."""
        context_merge(context, self.op_kwargs)
        kwargs = determine_kwargs(self.python_callable, self.op_args, context)
        self._take(self.python_callable(*self.op_args, **kwargs))
        return SpotTrainingOperator.execute(self, context)

    def _take(self, returned: Any) -> None:
        arguments = dict(returned) if isinstance(returned, Mapping) else {"command": returned}
        command = arguments.get("command")
        if not command or isinstance(command, (str, bytes)) or not isinstance(command, Sequence):
            msg = (
                f"{self.python_callable.__name__} returned {returned!r}; it must return a command "
                "such as ['python', 'train.py'], or a dict of operator arguments with one"
            )
            raise AirflowFailException(msg)
        known = SpotTrainingOperator.ARGUMENTS
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            msg = (
                f"{self.python_callable.__name__} returned unknown arguments {unknown}"
                f"{suggestion(unknown, known)}; there are {', '.join(known)}"
            )
            raise AirflowFailException(msg)
        for name, value in arguments.items():
            setattr(self, name, value)

    def _arguments(self) -> dict[str, Any]:
        arguments = super()._arguments()
        if arguments["command"] is SET_DURING_EXECUTION:
            del arguments["command"]
        return arguments


def spot_training_task(
    python_callable: Callable[..., Any] | None = None, **kwargs: Any
) -> TaskDecorator:
    """Make a spot training task of a function; ``kwargs`` are the operator's arguments."""
    return task_decorator_factory(
        python_callable=python_callable,
        decorated_operator_class=SpotTrainingDecoratedOperator,
        **kwargs,
    )
