"""The wire protocol by itself: messages are taken apart and put together as they came."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_pgmonkey.testing.gateway.protocol import wire
from pytest_pgmonkey.testing.gateway.protocol.wire import Answers, Bind, Parse, ProtocolViolation

names = st.binary(max_size=20).filter(lambda name: b"\0" not in name)
kinds = st.sampled_from([bytes([kind]) for kind in b"DTCZEN1G"])
messages = st.lists(st.tuples(kinds, st.binary(max_size=40)), max_size=12)


@given(messages, st.data())
def test_answers_come_whole_however_they_are_cut(
    sent: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    raw = b"".join(wire.message(kind, body) for kind, body in sent)
    answers, pieces, at = Answers(b"DT"), [], 0
    while at < len(raw):
        size = data.draw(st.integers(1, len(raw) - at))
        pieces += answers.feed(raw[at : at + size])
        at += size
    assert b"".join(pieces) == raw
    for piece in pieces:
        passed_on = piece[0] in b"DT"
        assert passed_on or len(piece) == 1 + struct.unpack_from("!I", piece, 1)[0]


@given(names, names, st.binary(max_size=40), names)
def test_a_parse_is_renamed_and_nothing_else(
    name: bytes, query: bytes, types: bytes, other: bytes
) -> None:
    raw = Parse(name, query, types).renamed(name)
    assert Parse.read(raw) == Parse(name, query, types)
    assert Parse.read(Parse.read(raw).renamed(other)) == Parse(other, query, types)


@given(names, names, st.binary(max_size=40), names)
def test_a_bind_is_renamed_and_nothing_else(
    portal: bytes, statement: bytes, rest: bytes, other: bytes
) -> None:
    raw = Bind(portal, statement, rest).of(statement)
    assert Bind.read(raw) == Bind(portal, statement, rest)
    assert Bind.read(Bind.read(raw).of(other)) == Bind(portal, other, rest)


@given(st.lists(st.one_of(st.none(), st.text(max_size=8), st.booleans()), max_size=6))
def test_parameters_are_read(values: list[str | bool | None]) -> None:
    formats = [int(isinstance(value, bool)) for value in values]
    rest = struct.pack(f"!H{len(values)}H", len(values), *formats)
    rest += struct.pack("!H", len(values))
    for value in values:
        raw = bytes([value]) if isinstance(value, bool) else (value or "").encode()
        rest += struct.pack("!i", -1) if value is None else struct.pack("!i", len(raw)) + raw
    shown = ["ft"[value] if isinstance(value, bool) else value for value in values]
    assert Bind(b"", b"", rest).texts() == shown


@given(st.binary(max_size=30))
def test_parameters_that_are_cut_off_are_refused_or_read(rest: bytes) -> None:
    with suppress(ProtocolViolation):
        Bind(b"", b"", rest).texts()


@given(st.dictionaries(st.sampled_from("SVCMDHP"), names.filter(bool)))
def test_the_fields_of_a_report_are_read(fields: dict[str, bytes]) -> None:
    assert wire.fields_of(wire.report(b"E", fields)) == fields


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (struct.pack("!cI", b"Q", 2**31), "invalid message length"),
        (struct.pack("!cI", b"Q", 3), "invalid message length"),
        (struct.pack("!cI", b"E", 10_001), "invalid message length"),
        (struct.pack("!cI", b"?", 4), "invalid frontend message type 63"),
    ],
)
def test_a_length_that_cannot_be_is_refused(header: bytes, problem: str) -> None:
    with pytest.raises(ProtocolViolation, match=problem):
        wire.size_of(header)


def startup(code: int, words: bytes) -> bytes:
    return struct.pack("!II", 8 + len(words), code) + words


def test_a_startup_message_is_read() -> None:
    raw = startup(0x30002, b"user\0me\0_pq_.new\0on\0database\0it\0\0")
    assert wire.read_startup(raw) == (0x30002, {"user": "me", "database": "it"}, ("_pq_.new",))


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (startup(0x20000, b"user\0me\0\0"), "protocol 2.0"),
        (startup(0x30000, b"user\0me"), "terminator"),
        (startup(0x30000, b"user\0\0"), "a value is missing"),
        (startup(0x30000, b"user\0\xff\0\0"), "UTF-8"),
    ],
)
def test_a_wrong_startup_message_is_refused(raw: bytes, problem: str) -> None:
    with pytest.raises(ProtocolViolation, match=problem):
        wire.read_startup(raw)


@pytest.mark.parametrize("size", [0, 7, 10_001, 2**32 - 1])
def test_a_startup_message_of_a_wrong_length_is_refused(size: int) -> None:
    with pytest.raises(ProtocolViolation, match="length of startup packet"):
        wire.startup_size(struct.pack("!I", size))
