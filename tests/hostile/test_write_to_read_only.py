"""Writes to a read-only gateway: EPERM, with the payload drained *through TLS* (X2).

A server that skips the payload on the bare socket eats ciphertext and loses the stream.
"""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.support.fake_upstream import MIB
from tests.support.rawclient import Cf, Cmd, Err, Request, Tf

OPTIONS = ("--read-only",)
FAKE_REQUEST = Request(Cmd.WRITE, 0, 16, cookie=0xBAD).pack() * 40  # a payload of requests


@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
@pytest.mark.parametrize("size", [1, 512, 16384, 16385, 70000, MIB])
def test_refused_and_in_step(lab: Lab, size: int, structured: bool) -> None:
    session = lab.session(structured=structured)
    assert session.export.flags & Tf.READ_ONLY
    for _ in range(3):
        payload = (FAKE_REQUEST * (size // len(FAKE_REQUEST) + 1))[:size]
        assert session.ask(Cmd.WRITE, 0, payload=payload).error == Err.EPERM
        session.check()
    session.disc()
    assert {request.cmd for request in lab.fake.wait_end().requests} == {Cmd.READ, Cmd.DISC}


def test_32_mib(lab: Lab) -> None:
    lab.fake.script.size = 64 * MIB
    session = lab.session()
    lab.forget_peak()
    before = lab.peak_kib()
    assert session.ask(Cmd.WRITE, 0, payload=bytes(32 * MIB)).error == Err.EPERM
    assert lab.peak_kib() - before < 8 << 10, "drained is not stored"
    session.check()
    session.disc()


def test_pipelined(lab: Lab) -> None:
    """Refused writes and good reads, cut into records at odd places."""
    session = lab.session()
    requests = []
    for i in range(20):
        requests.append(Request(Cmd.WRITE, 0, 1000, 2 * i, payload=FAKE_REQUEST[:1000]))
        requests.append(Request(Cmd.READ, 512 * i, 512, 2 * i + 1))
    stream = b"".join(request.pack() for request in requests)
    for request in requests:
        session.expect(request)
    for at in range(0, len(stream), 777):
        session.client.send(stream[at : at + 777])
    for _ in requests:
        answer = session.collect()
        assert answer.error == (Err.EPERM if answer.request.cmd == Cmd.WRITE else 0)
    session.check()
    session.disc()


@pytest.mark.parametrize(
    ("cmd", "flags"),
    [
        (Cmd.TRIM, 0),
        (Cmd.TRIM, Cf.FUA),
        (Cmd.WRITE_ZEROES, 0),
        (Cmd.WRITE_ZEROES, Cf.NO_HOLE),
        (Cmd.WRITE_ZEROES, Cf.FAST_ZERO),
    ],
)
def test_other_changes(lab: Lab, cmd: Cmd, flags: int) -> None:
    session = lab.session()
    answer = session.ask(cmd, 0, 512, flags=flags)
    # A gateway that no longer offers the command or its flag may call that invalid instead.
    withdrawn = not session.export.flags & (Tf.SEND_TRIM | Tf.SEND_WRITE_ZEROES)
    no_flag = bool(flags) and not session.export.flags & (Tf.SEND_FUA | Tf.SEND_FAST_ZERO)
    assert answer.error in ({Err.EPERM, Err.EINVAL} if withdrawn or no_flag else {Err.EPERM})
    session.check()
    session.disc()
    assert {request.cmd for request in lab.fake.wait_end().requests} == {Cmd.READ, Cmd.DISC}


def test_what_changes_nothing_still_works(lab: Lab) -> None:
    session = lab.session(contexts=[b"base:allocation"])
    assert session.ask(Cmd.BLOCK_STATUS, 0, 4096).error == 0
    if session.export.flags & Tf.SEND_CACHE:
        assert session.ask(Cmd.CACHE, 0, 4096).error == 0
    if session.export.flags & Tf.SEND_FLUSH:
        assert session.ask(Cmd.FLUSH).error == 0
    session.disc()
