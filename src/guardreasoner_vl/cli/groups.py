"""Groups of options: one parameter of a command stands for all fields of a dataclass.

    @dataclass(frozen=True)
    class ServerOptions:
        url: Annotated[str, typer.Option(help="The server's address.")] = "http://localhost"

    @grouped
    def ping(*, server: ServerOptions) -> None: ...

The command `ping` has the option --url.
"""

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Returns `command` as typer reads it: each parameter that is a dataclass is replaced by the dataclass's fields."""
    parameters = signature(command).parameters
    groups: dict[str, Any] = {
        name: parameter.annotation for name, parameter in parameters.items() if is_dataclass(parameter.annotation)
    }

    @wraps(command)
    def ungrouped(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{option: values.pop(option) for option in option_names(group)})
        command(**values)

    options = [option for parameter in parameters.values() for option in _options(parameter)]
    ungrouped.__annotations__ = {option.name: option.annotation for option in options}
    vars(ungrouped)["__signature__"] = Signature(options)
    return ungrouped


def option_names(*groups: Any) -> tuple[str, ...]:
    """The names of the parameters that the dataclasses `groups` stand for."""
    return tuple(field.name for group in groups for field in fields(group))


def _options(parameter: Parameter) -> Iterator[Parameter]:
    if not is_dataclass(parameter.annotation):
        yield parameter.replace(kind=Parameter.KEYWORD_ONLY)
        return
    for field in fields(parameter.annotation):
        default = Parameter.empty if field.default is MISSING else field.default
        yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=field.type)
