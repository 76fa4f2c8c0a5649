"""INFO any number of times, for this name and that, then GO (CVE-2019-14851)."""

from __future__ import annotations

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.session import Session
from tests.support.fake_upstream import MIB, Script
from tests.support.rawclient import Info, Opt, Rep, info_data, parse_export

OPTIONS = ("--any-export",)
A, B = b"alpha", b"beta"


@pytest.fixture
def two(lab: Lab) -> Lab:
    lab.fake.script = Script(names=(A, B), block_sizes=(1, 4096, 32 * MIB))
    return lab


def end(session: Session, lab: Lab, name: bytes) -> None:
    session.check()
    session.disc()
    served = [link for link in lab.fake.links if link.export is not None]
    assert [link.export for link in served] == [name]


def test_other_name_in_between(two: Lab) -> None:
    client = two.tls()
    client.go(A, opt=Opt.INFO)
    client.go(B, opt=Opt.INFO)
    end(Session(client, client.go(A), {}), two, A)


def test_other_name_at_last(two: Lab) -> None:
    client = two.tls()
    client.go(A, opt=Opt.INFO)
    end(Session(client, client.go(B), {}), two, B)


def test_many_times(two: Lab) -> None:
    client = two.tls()
    first = client.go(A, [Info.BLOCK_SIZE], opt=Opt.INFO)
    for _ in range(15):
        assert client.go(A, [Info.BLOCK_SIZE], opt=Opt.INFO) == first
    assert two.fake.connects <= 2, "every INFO dials the upstream anew"
    end(Session(client, client.go(A, [Info.BLOCK_SIZE]), {}), two, A)


def test_go_fails_then_succeeds(two: Lab) -> None:
    client = two.tls()
    for name in (b"gamma", b"", b"alph", b"alphaa"):
        (reply,) = client.ask(Opt.GO, info_data(name))
        assert reply.type == Rep.ERR_UNKNOWN
    end(Session(client, client.go(A), {}), two, A)


def test_info_fails_then_go_succeeds(two: Lab) -> None:
    client = two.tls()
    (reply,) = client.ask(Opt.INFO, info_data(b"gamma"))
    assert reply.type == Rep.ERR_UNKNOWN
    end(Session(client, client.go(A), {}), two, A)


@pytest.mark.parametrize("infos", [[], [3], [0, 1, 2, 3], [3, 77, 0xFFFF]])
def test_go_says_what_info_said(two: Lab, infos: list[int]) -> None:
    """P:1342: the same set, the order may differ; unknown information types are ignored."""
    client = two.tls()
    *first, last = client.ask(Opt.INFO, info_data(A, infos))
    assert last.type == Rep.ACK
    *second, last = client.ask(Opt.GO, info_data(A, infos))
    assert last.type == Rep.ACK
    assert sorted(reply.data for reply in first) == sorted(reply.data for reply in second)
    end(Session(client, parse_export(second), {}), two, A)


def test_structured_reply_between_info_and_go(two: Lab) -> None:
    """What the flags of INFO promised (no DF) may change, and what GO promises must hold."""
    client = two.tls()
    client.go(A, opt=Opt.INFO)
    client.ask_structured()
    end(Session(client, client.go(A), {}), two, A)
