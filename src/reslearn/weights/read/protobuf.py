"""Protocol buffers, as far as Caffe's files need them: the binary encoding and the text one.

Nothing is allocated on a file's word: every length is compared with the bytes that are there.
"""

import re
from collections.abc import Iterator
from typing import Any

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
DEPTH = 32  # nested messages of a text; Caffe's have 3


class Malformed(ValueError):
    """What is wrong with a message, and where (byte offset or line)."""


def varint(data: memoryview, at: int, end: int) -> tuple[int, int]:
    """(value, offset behind it) of the number at an offset: 7 bits a byte, the lowest first, at most 10 bytes."""
    value = 0
    for i in range(10):
        if at + i >= end:
            raise Malformed(f"at byte {at}: a number is cut off")
        byte = data[at + i]
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value & (2**64 - 1), at + i + 1
    raise Malformed(f"at byte {at}: a number of more than 10 bytes")


def fields(data: memoryview, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(field number, wire type, a, b) of each field of the message data[start:end], in order.

    VARINT: a is the value. Others: data[a:b] is the content. Raises Malformed.
    """
    at = start
    while at < end:
        key, after = varint(data, at, end)
        number, wire = key >> 3, key & 7
        if number == 0 or number >= 2**29:
            raise Malformed(f"at byte {at}: no field has the number {number}")
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
            raise Malformed(f"at byte {at}: field {number} claims {length:,} bytes where {end - after:,} are left")
        at = after + length
        yield number, wire, after, at


TOKEN = re.compile(r"""\s+|\#[^\n]*|(?P<word>[A-Za-z_][\w.]*)|(?P<number>[-+]?(?:\d[\w.+-]*|\.\d[\w.+-]*))
    |(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|(?P<mark>[{}:;,\[\]<>])""", re.VERBOSE)  # fmt: skip

Message = dict[str, list[Any]]
"""A message in text form: field name -> its values in order, each a Message or the text that stands there, without quotes."""


def tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """(kind, token, line) of a text; kinds: word, number, text, mark. Raises Malformed."""
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
    """A message in protobuf's text form (.prototxt). Raises Malformed."""
    top: Message = {}
    stack = [top]
    name, colon = "", False  # the field whose value is to come
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
            if len(stack) > DEPTH:
                raise Malformed(f"in line {line}: messages within messages, more than {DEPTH} deep")
            inner: Message = {}
            stack[-1].setdefault(name, []).append(inner)
            stack.append(inner)
            name = ""
        elif name and colon and kind != "mark":
            stack[-1].setdefault(name, []).append(token[1:-1] if kind == "text" else token)
            name = ""
        else:
            raise Malformed(f"in line {line}: '{token}' does not belong there")
    if name or len(stack) > 1:
        raise Malformed("at the end: a brace or a value is missing")
    return top
