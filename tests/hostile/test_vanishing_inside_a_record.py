"""A client that is gone in the middle of a TLS record (nbd-server spun at 100 % CPU on TLS EOF).

The session ends, the upstream connection too, no CPU is burnt, no descriptor stays.
"""

from __future__ import annotations

import socket

import pytest

from tests.hostile.conftest import Lab
from tests.support.rawclient import Cmd, Opt, Request, info_data, option

LEAVING = ["fin", "rst", "half_close"]
CUTS = [1, 4, 5, 6, 12, -1]  # within the record's header of 5 bytes, behind it, one byte short


@pytest.mark.parametrize("how", LEAVING)
def test_while_haggling(lab: Lab, how: str) -> None:
    base = lab.settled_fds()
    for cut in CUTS:
        client = lab.tls()
        record = client.seal(option(Opt.GO, info_data()))
        client.sock.sendall(record[:cut])
        if how == "half_close":
            client.sock.shutdown(socket.SHUT_WR)
            assert client.recv_to_end() == b""
        client.reset() if how == "rst" else client.close()
    lab.wait_fds(base)
    lab.assert_idle()
    assert lab.fake.connects == 0


@pytest.mark.parametrize("how", LEAVING)
def test_in_transmission(lab: Lab, how: str) -> None:
    base = lab.settled_fds()
    for cut in CUTS:
        client = lab.session().client
        record = client.seal(Request(Cmd.READ, 0, 512).pack())
        client.sock.sendall(record[:cut])
        if how == "half_close":
            client.sock.shutdown(socket.SHUT_WR)
            assert client.recv_to_end() == b""
        client.reset() if how == "rst" else client.close()
    lab.wait_fds(base)
    lab.assert_idle()
    for i in range(len(CUTS)):
        assert lab.fake.wait_end(i).end == "disc"  # X12: politely, and no request was made up
        assert [request.cmd for request in lab.fake.links[i].requests] == [Cmd.DISC]


def test_after_disc(lab: Lab) -> None:
    """Gone right after NBD_CMD_DISC, without reading the close_notify."""
    base = lab.settled_fds()
    for _ in range(3):
        session = lab.session()
        session.client.send(Request(Cmd.DISC).pack())
        session.client.reset()
    lab.wait_fds(base)
    lab.assert_idle()
    for i in range(3):
        assert lab.fake.wait_end(i).end == "disc"


def test_missing_close_notify(lab: Lab) -> None:
    """T11: a bare FIN between two requests ends the session just as well."""
    base = lab.settled_fds()
    session = lab.session()
    session.check()
    session.client.sock.shutdown(socket.SHUT_WR)
    assert session.client.recv_to_end() == b""
    session.client.close()
    lab.wait_fds(base)
    assert lab.fake.wait_end().end == "disc"
