"""Types of JSON files' fields, which pydantic checks strictly, and the line that names a wrong one.

A record is a subclass of `Record`. Its fields without a default must be there, fields that it does
not name are left alone, and no value is converted: true is no number, "3" neither.
"""

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import core_schema

from open_r1.base.errors import Mistake

_LARGEST = 2**53  # integers up to it survive a trip through JSON


class Record(BaseModel):
    """An object of a JSON file."""

    model_config = ConfigDict(strict=True)


RecordType = TypeVar("RecordType", bound=Record)


@dataclass(frozen=True)
class Expected:
    """What an error says was expected of a field; stands behind all that is checked of it."""

    what: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        message = f"expected {self.what}"
        return core_schema.custom_error_schema(handler(source), "expected", custom_error_message=message)


def _must_be_name(text: str) -> str:
    """It heads a column: letters to see, nothing that moves a terminal's cursor."""
    if not (text.isprintable() and text.strip()):
        raise ValueError
    return text


def _must_encode(text: str) -> str:
    """UTF-8 can hold it: there is no half of a character in it."""
    text.encode()
    return text


Count = Annotated[int, Field(ge=0, le=_LARGEST), Expected("a whole number from 0")]
Flag = Annotated[bool, Expected("true or false")]
Name = Annotated[str, AfterValidator(_must_be_name), Expected("a name of printable letters")]
Number = Annotated[float, Expected("a number")]  # or NaN or infinite, which Python writes into JSON
Prose = Annotated[str, AfterValidator(_must_encode), Expected("text")]  # what a tokenizer takes
Share = Annotated[float, Field(ge=0, le=1), Expected("a number from 0 to 1")]
Text = Annotated[str, Expected("text")]  # may hold half a character (a lone surrogate), as JSON may


def is_usable(value: Any) -> bool:
    """Whether it is a number that can be averaged and drawn."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) <= _LARGEST  # false for NaN


def check(kind: type[RecordType], value: Any, origin: object) -> RecordType:
    """The value as a record, if its fields hold what they must.

    Raises:
        Mistake: they do not; one line that names the origin and the field.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
    *path, name = problems[0]["loc"] or ("",)
    if problems[0]["type"] == "missing":
        names = [problem["loc"][-1] for problem in problems if problem["type"] == "missing"]
        what = f"missing {', '.join(names)}"
    else:
        path = [*path[:-1], "name"] if name == "[key]" else [*path, name]
        is_object = problems[0]["type"] in ("model_type", "dict_type")
        what = "expected an object" if is_object else problems[0]["msg"]
    raise Mistake(": ".join([str(part) for part in (origin, *path, what) if part != ""]))
