"""State as JSON and back: dataclasses, plain types and bytes; nothing in a file can name code to run.

Decoding is strict: `build` makes a dataclass only from an object with exactly its fields, each of the type the class
declares, so a restore never meets a string where it expects a number.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import functools
import json
import types
import typing
from typing import Any, Final, TypeVar

from ..errors import SnapshotError

T = TypeVar("T")
MAX_DEPTH: Final = 16
_BYTES: Final = "$bytes"


def encode(value: object) -> bytes:
    """JSON of dataclasses, dicts with string keys, lists, tuples, str, bytes, int, float, bool and None."""
    return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False).encode()


def _plain(value: Any) -> Any:
    if isinstance(value, (bytes, bytearray)):
        return {_BYTES: base64.b64encode(value).decode()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(name, str) and name != _BYTES for name in value):
            raise TypeError("names in saved state are strings")
        return {name: _plain(item) for name, item in value.items()}
    if value is None or isinstance(value, (str, int, float)):
        return value
    raise TypeError(f"no saved state: {type(value).__name__}")


def decode(data: bytes) -> Any:
    """What `encode` was given, with dicts for dataclasses and lists for tuples. Raises SnapshotError."""
    try:
        return json.loads(data, object_hook=_bytes)
    except (ValueError, RecursionError) as error:
        raise SnapshotError("the snapshot's description cannot be read") from error


def _bytes(value: dict[str, Any]) -> Any:
    if len(value) != 1 or _BYTES not in value:
        return value
    text = value[_BYTES]
    if not isinstance(text, str):
        raise ValueError("no bytes")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError("no bytes") from error


def build(kind: type[T], value: object) -> T:
    """An instance of the dataclass ``kind`` from a decoded object. Raises SnapshotError."""
    built: T = _build(kind, value, kind.__name__, 0)
    return built


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build(kind: Any, value: Any, what: str, depth: int) -> Any:
    wrong = SnapshotError(f"the snapshot's {what} is not what this version saves")
    if depth > MAX_DEPTH:
        raise wrong
    if kind is Any or kind is object:
        return value
    if dataclasses.is_dataclass(kind):
        hints = _hints(typing.cast(type, kind))
        names = [field.name for field in dataclasses.fields(kind)]
        if not isinstance(value, dict) or set(value) != set(names):
            raise wrong
        return typing.cast(Any, kind)(
            **{name: _build(hints[name], value[name], f"{what}.{name}", depth + 1) for name in names}
        )
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, list) or len(arguments) != 2 or arguments[1] is not Ellipsis:
            raise wrong
        return tuple(_build(arguments[0], item, what, depth + 1) for item in value)
    if origin is list:
        if not isinstance(value, list):
            raise wrong
        return [_build(arguments[0], item, what, depth + 1) for item in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise wrong
        return {name: _build(arguments[1], item, what, depth + 1) for name, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            try:
                return _build(option, value, what, depth + 1)
            except SnapshotError:
                continue
        raise wrong
    if kind is type(None):
        kind = types.NoneType
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    return value
