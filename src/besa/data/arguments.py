"""Arguments of the public functions: each is checked against its annotation before any work."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Annotated, Any, ParamSpec, TypeVar, get_type_hints

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from besa.errors import BesaError

P = ParamSpec("P")
Result = TypeVar("Result")

SHOWN = 80  # characters of a value in a sentence
DTYPES = ("auto", "float32", "bfloat16", "float16")
HEADS = ("same", "int8")
BOS = ("auto", "yes", "no")


def _one_of(names: tuple[str, ...]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"should be {', '.join(names[:-1])} or {names[-1]}")
        return name

    return AfterValidator(check)


Count = Annotated[int, Field(ge=1)]
Samples = Annotated[int, Field(ge=1, le=1_000_000)]  # calibration sequences
Ranks = Annotated[int, Field(ge=1, le=1024)]  # on one machine
Length = Annotated[int, Field(ge=2)]  # tokens of a sequence; a single token leaves nothing to predict
Bytes = Annotated[int, Field(ge=0)]
Dtype = Annotated[str, _one_of(DTYPES)]
Head = Annotated[str, _one_of(HEADS)]
Bos = Annotated[str, _one_of(BOS)]


def checked(function: Callable[P, Result]) -> Callable[P, Result]:
    """The function with a check of every argument against its annotation.

    Nothing is converted: neither "2" nor True counts as a number.

    Args:
        function: fully annotated, with types that exist at run time.

    Returns:
        A function that raises `BesaError` if an argument does not match, and otherwise passes arguments on unchanged.
    """
    signature = inspect.signature(function)

    @cache
    def adapter(name: str) -> TypeAdapter[Any]:
        kind = get_type_hints(function, include_extras=True)[name]
        return TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True, strict=True))

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            try:
                adapter(name).validate_python(value)
            except ValidationError as error:
                raise BesaError(f"{function.__name__}: {name} {_complaint(error)}, not {_shown(value)}.") from None
        return function(*args, **kwargs)

    return call


def check_used(needed: str, given: object, others: Mapping[str, object]) -> None:
    """Check that arguments have what they work on.

    Args:
        needed: the option that gives it, by its name on the command line.
        given: its value, if it is given.
        others: values of those that work on it, by name.

    Raises:
        BesaError: one has nothing.
    """
    for name, value in others.items():
        if value and not given:
            raise BesaError(f"{name} is not used: add {needed}, or leave it out.")


def _complaint(error: ValidationError) -> str:
    """What a value should be, for each type that its annotation allows."""
    complaints = (
        "a list" if complaint["type"] == "sequence_str" else complaint["msg"].removeprefix("Value error, ")
        for complaint in error.errors()
    )
    choices = dict.fromkeys(
        re.sub("^(Input )?should be (a valid dictionary or )?", "", complaint) for complaint in complaints
    )
    return f"should be {' or '.join(choices)}"


def _shown(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
