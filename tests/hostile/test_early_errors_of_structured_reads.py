"""READ under structured replies is answered by chunks, even when refused at once (P:396)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Answering
from tests.support.fake_upstream import MIB, Script, error_chunk, simple
from tests.support.rawclient import Cf, Cmd, Err

BAD = {
    "past_the_end": (MIB, 512, 0),
    "overflow": ((1 << 64) - 1, 512, 0),
    "unaligned": (1, 512, 0),
    "unknown_flag": (0, 512, 1 << 15),
    "flag_of_another_command": (0, 512, Cf.REQ_ONE),
}


@pytest.mark.parametrize(("offset", "length", "flags"), BAD.values(), ids=BAD.keys())
def test_refused_by_the_gateway(lab: Lab, offset: int, length: int, flags: int) -> None:
    lab.fake.script = Script(block_sizes=(512, 4096, MIB))
    session = lab.session()
    answer = session.ask(Cmd.READ, offset, length, flags=flags)
    assert answer.structured
    assert answer.error == Err.EINVAL
    session.check(0, 512)
    session.disc()


def test_refused_by_a_structured_upstream(lab: Lab) -> None:
    lab.fake.script = Answering(Cmd.READ, lambda got: error_chunk(got.cookie, Err.EIO, b"broken"))
    session = lab.session()
    for _ in range(3):
        answer = session.ask(Cmd.READ, 0, 512)
        assert answer.structured
        assert answer.error == Err.EIO
    session.disc()


@pytest.mark.parametrize("style", ["fixed", "newstyle", "oldstyle"])
def test_refused_by_a_simple_upstream(lab: Lab, style: str) -> None:
    """The gateway converts, errors too."""
    lab.fake.script = Answering(
        Cmd.READ, lambda got: simple(got.cookie, Err.EIO), structured=False, style=style
    )
    session = lab.session()
    for _ in range(3):
        answer = session.ask(Cmd.READ, 0, 512)
        assert answer.structured == session.client.structured
        assert answer.error == Err.EIO
    assert session.ask(Cmd.WRITE, 0, payload=bytes(512)).error == 0
    session.disc()


@pytest.mark.parametrize("style", ["fixed", "newstyle", "oldstyle"])
def test_served_by_a_simple_upstream(lab: Lab, style: str) -> None:
    lab.fake.script = Script(structured=False, style=style)
    session = lab.session()
    session.check()
    session.check(0, MIB)
    session.disc()
