"""A minimal protocol-buffers reader for Caffe's files: binary and text encoding.

Every length is checked against the available bytes before memory is allocated.
"""

import re
from collections.abc import Iterator
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
MAX_DEPTH = 32  # of nested messages in the text format; Caffe's have 3


class Malformed(ValueError):
    """An invalid message; the text names the problem and its byte offset or line."""


def varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """Decodes the varint at an offset: 7 bits per byte, lowest first, at most 10 bytes. Returns (value, next offset)."""
    value = 0
    for i in range(10):
        if at + i >= end:
            raise Malformed(f"at byte {at}: a varint is truncated")
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value & (2**64 - 1), at + i + 1
    raise Malformed(f"at byte {at}: a varint has more than 10 bytes")


def fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (field number, wire type, a, b) for each field of the message data[start:end].

    VARINT: a is the value. Other types: data[a:b] is the content. Raises Malformed.
    """
    at = start
    while at < end:
        key, after = varint(data, at, end)
        number, wire = key >> 3, key & 7
        if number == 0 or number >= 2**29:
            raise Malformed(f"at byte {at}: invalid field number {number}")
        if wire == VARINT:
            value, at = varint(data, after, end)
            yield number, wire, value, at
            continue
        if wire == BYTES:
            length, after = varint(data, after, end)
        elif wire in (FIXED32, FIXED64):
            length = 4 if wire == FIXED32 else 8
        else:
            raise Malformed(f"at byte {at}: unknown wire type {wire}")
        if length > end - after:
            raise Malformed(f"at byte {at}: field {number} claims {length:,} bytes, but {end - after:,} are left")
        at = after + length
        yield number, wire, after, at


TOKEN = re.compile(r"""\s+|\#[^\n]*|(?P<word>[A-Za-z_][\w.]*)|(?P<number>[-+]?(?:\d[\w.+-]*|\.\d[\w.+-]*))
    |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<mark>[{}:;,\[\]<>])""", re.VERBOSE)  # fmt: skip

Message = dict[str, list[Any]]
"""A message in text format: field name -> list of values, each a Message or an unquoted string."""


def tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """Yields (kind, token, line); kinds: word, number, text, mark. Raises Malformed."""
    at, line = 0, 1
    while at < len(text):
        match = TOKEN.match(text, at)
        if not match:
            raise Malformed(f"in line {line}: cannot read {text[at : at + 12]!r}")
        if match.lastgroup:
            yield match.lastgroup, match[0], line
        line += match[0].count("\n")
        at = match.end()


def parse_text(text: str) -> Message:
    """Parses a message in protobuf's text format (.prototxt). Raises Malformed."""
    top: Message = {}
    stack = [top]
    name, colon = "", False  # the field whose value comes next
    for kind, token, line in tokens(text):
        if kind == "mark" and token in ";,":
            continue
        if not name and kind == "mark" and token == "}" and len(stack) > 1:
            stack.pop()
        elif not name and kind == "word":
            name, colon = token, False
        elif name and token == ":" and not colon:
            colon = True
        elif name and token == "{":
            if len(stack) > MAX_DEPTH:
                raise Malformed(f"in line {line}: messages are nested more than {MAX_DEPTH} deep")
            inner: Message = {}
            stack[-1].setdefault(name, []).append(inner)
            stack.append(inner)
            name = ""
        elif name and colon and kind != "mark":
            stack[-1].setdefault(name, []).append(token[1:-1] if kind == "text" else token)
            name = ""
        else:
            raise Malformed(f"in line {line}: unexpected '{token}'")
    if name or len(stack) > 1:
        raise Malformed("at the end: a brace or a value is missing")
    return top
