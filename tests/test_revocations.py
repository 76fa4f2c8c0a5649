"""gateway.revocations: the record goes into text and back, and nothing gets lost on the way."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.pki_keys import PkiError
from gateway.revocations import Entry, parse_record, record_of

PATH = Path("revoked")
NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)

entries = st.lists(
    st.builds(
        Entry,
        st.integers(1, 2**160 - 1),
        st.datetimes(datetime(1990, 1, 1), datetime(9999, 12, 31)).map(
            lambda naive: naive.replace(microsecond=0, tzinfo=UTC)
        ),
        st.text(max_size=20),
    )
)


@given(entries)
def test_into_text_and_back(before: list[Entry]) -> None:
    after = parse_record(record_of(before), PATH)
    assert [(each.serial, each.since) for each in after] == [
        (each.serial, each.since) for each in before
    ]
    for old, new in zip(before, after, strict=True):
        if old.whose.isprintable() and old.whose.strip() == old.whose:
            assert new.whose == old.whose


def test_the_text() -> None:
    text = record_of([Entry(31, NOW, "CN=vm1,O=Ü"), Entry(2, NOW, ""), Entry(3, NOW, "a\nb\0")])
    comment, *lines = text.decode().splitlines()
    assert comment.startswith("# ")
    assert lines == [
        "0x1f 2030-01-02T03:04:05Z CN=vm1,O=Ü",
        "0x2 2030-01-02T03:04:05Z",
        "0x3 2030-01-02T03:04:05Z a?b?",
    ]


def test_comments_and_blank_lines_are_passed_over() -> None:
    assert parse_record(b"", PATH) == ()
    assert parse_record(b"\n# 0x1\n \n0x2 2030-01-02T03:04:05Z\n", PATH) == (Entry(2, NOW, ""),)


@pytest.mark.parametrize("line", [b"x", b"0x1", b"0x1 2030", b"\xff", b"0x1\t2030-01-02T03:04:05Z"])
def test_a_line_that_is_not_understood(line: bytes) -> None:
    with pytest.raises(PkiError, match=r"^revoked, line 2: not a serial number and a time as in"):
        parse_record(b"# comment\n" + line, PATH)


@pytest.mark.parametrize(
    "when", ["0030-01-01T02:00:00Z", "2030-1-1T2:0:0Z", "+2030-01-01T02:00:00Z"]
)
def test_a_time_that_would_not_be_written_back_alike(when: str) -> None:
    with pytest.raises(PkiError, match="line 1: not a serial number and a time"):
        parse_record(f"0x2 {when}\n".encode(), Path("revoked"))
