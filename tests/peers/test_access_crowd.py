"""A thousand clients that may not come in, in every way: the upstream never hears of one."""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import Refusal
from tests.peers import people as rig
from tests.peers.people import WRONG, People
from tests.support.fake_upstream import FakeUpstream
from tests.support.gateway import Gateway, warnings_in
from tests.support.peers import wait_until
from tests.support.rawclient import Opt, RawClient, Rep, info_data, meta_data, option, tls_context

people = rig.people

CROWD = 1000
AT_A_TIME = 16
CONFIG = """\
[[export]]
name = "disk"
read-write = ["cn=writer"]
read-only = ["cn=reader"]

[[export]]
name = "secret"
read-write = ["cn=writer"]
"""
# What a close line may say beside a `Refusal`: it got in, and the export was not its own.
NOT_YOURS = "no such export here, or it is not yours to open"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeUpstream]:
    with FakeUpstream(tmp_path / "up") as fake:
        fake.script.names = (b"disk", b"secret")
        yield fake
        assert not fake.errors


def come(gateway: Gateway, people: People, kind: str, only_1_2: bool) -> None:
    """One client of the crowd, from connecting to leaving."""
    with RawClient(gateway.uri) as client:
        if kind == "probe":
            client.recv_exactly(18)
            return
        client.greet()
        if kind == "plaintext_client":
            assert client.verdict(Opt.GO, info_data(b"disk")) == Rep.ERR_TLS_REQD
            return
        certificates = people.certificates(kind)
        context = tls_context(
            certificates, with_certificate=kind != "no_client_cert", only_1_2=only_1_2
        )
        if kind in WRONG:
            try:
                client.start_tls(context)
            except OSError:  # an alert, TLS 1.2
                return
            assert client.recv_to_end() == b""
            assert client.ended is not None
            assert "ALERT" in client.ended
            return
        client.start_tls(context)
        if kind == "reader":  # may come in, and asks for what is not its own
            for opt in (Opt.INFO, Opt.GO):
                assert client.verdict(opt, info_data(b"secret")) == Rep.ERR_UNKNOWN
                assert client.verdict(opt, info_data(b"nowhere")) == Rep.ERR_UNKNOWN
            client.send(option(Opt.EXPORT_NAME, b"secret"))
            assert client.recv_to_end() == b""
            return
        for opt, data in (
            (Opt.LIST, b""),
            (Opt.STRUCTURED_REPLY, b""),
            (Opt.INFO, info_data(b"disk")),
            (Opt.SET_META_CONTEXT, meta_data(b"disk", (b"base:allocation",))),
            (Opt.GO, info_data(b"disk")),
        ):
            assert client.verdict(opt, data) == Rep.ERR_POLICY


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_is_dialled_for_a_thousand_refused_clients(
    people: People, fake: FakeUpstream, tmp_path: Path, workers: int
) -> None:
    config = tmp_path / "rules.toml"
    config.write_text(CONFIG)
    flags = ["--tls-dir", people.tls_dir, "--socket", fake.path, "--listen", "127.0.0.1:0"]
    flags += ["--config", config, "--log-level", "debug", "--workers", str(workers)]
    flags += ["--limit", "handshake-rate=0"]  # all of them from one address
    kinds = itertools.cycle(["probe", "plaintext_client", *WRONG, "stranger", "reader"])
    crowd = [(kind, number % 20 < 10) for number, kind in zip(range(CROWD), kinds, strict=False)]
    failures: list[BaseException] = []
    with Gateway(*flags) as gateway:

        def work() -> None:
            try:
                while True:
                    try:
                        one = crowd.pop()
                    except IndexError:
                        return
                    come(gateway, people, *one)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(AT_A_TIME)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        wait_until(lambda: gateway.log().count(": closed: ") == CROWD, "all sessions to end")
        assert fake.connects == 0
        with RawClient(gateway.uri) as client:
            client.greet()
            client.start_tls(tls_context(people.certificates("writer")))
            client.go(b"secret")
        assert fake.connects == 1
    lines = [line for line in gateway.log().splitlines() if ": closed: " in line][:CROWD]
    reasons: dict[str, int] = {}
    for line in lines:
        detail = re.search(r": closed: [^(]+\((.*)\); \d+ bytes in", line)
        assert detail is not None, line
        word = NOT_YOURS if NOT_YOURS in detail[1] else detail[1].partition(":")[0]
        assert word == NOT_YOURS or word in set(Refusal), line
        reasons[word] = reasons.get(word, 0) + 1
    expected = {"probe", "plaintext_client", *WRONG, "not_allowed", NOT_YOURS}
    assert reasons == dict.fromkeys(expected, CROWD // 10)
    assert not warnings_in(gateway.log())


def test_who_may_open_nothing_keeps_nobody_out(people: People, fake: FakeUpstream) -> None:
    """It is inside TLS; but a place is for those who may open something."""
    flags = ["--tls-dir", people.tls_dir, "--socket", fake.path, "--listen", "127.0.0.1:0"]
    fake.script.names = (b"",)
    flags += ["--allow", "cn=writer", "--max-connections", "4", "--handshake-timeout", "60"]
    with Gateway(*flags) as gateway, contextlib.ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(RawClient(gateway.uri))
            client.greet()
            client.start_tls(tls_context(people.certificates("stranger")))
            assert client.verdict(Opt.LIST) == Rep.ERR_POLICY
        writer = stack.enter_context(RawClient(gateway.uri))
        writer.greet()
        writer.start_tls(tls_context(people.certificates("writer")))
        writer.go()
        gateway.wait_log(": closed: client not allowed .not_allowed: CN=stranger ")
