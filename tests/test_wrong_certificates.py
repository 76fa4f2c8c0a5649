"""Client certificates made wrong in many ways: each refused, and the log says why.

Against the gateway's own TLS over a socket pair, and against a running gateway, each with both
versions of TLS. What is unusual and not wrong has to come in.
"""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway.errors import Refusal, TLSRefused
from gateway.identity import Identity
from gateway.settings import Settings, TLSSettings
from gateway.tls import refusal
from gateway.trust import Trust, load_trust
from tests.support.gateway import Gateway
from tests.support.rawclient import Opt, PeerClosedError, RawClient, option
from tests.support.wrong_certs import ACCEPTED, Case, authority, cases

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
BOTH_VERSIONS = pytest.mark.parametrize("version", [V12, V13], ids=["TLS1.2", "TLS1.3"])
EVERY_CASE = pytest.mark.parametrize("what", cases())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong") / "tls"
    authority().write(folder)
    return folder


def client_context(case: Case, version: ssl.TLSVersion, scratch: Path) -> ssl.SSLContext:
    """A client that has no scruples about its own certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    path = scratch / "client.pem"
    path.write_bytes(case.chain + case.key)
    context.load_cert_chain(path)
    return context


# ---------------------------------------------------------------- over a socket pair


@pytest.fixture(scope="module")
def trust(folder: Path) -> Trust:
    files = [folder / name for name in ("server-cert.pem", "server-key.pem", "ca-cert.pem")]
    return load_trust(Settings("/none", TLSSettings(*files, crl=folder / "ca-crl.pem")))


def enter(trust: Trust, context: ssl.SSLContext) -> Identity:
    """Both ends in turns. Raises TLSRefused."""
    assert trust.context is not None
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    wrap = functools.partial(ssl.SSLContext.wrap_socket, do_handshake_on_connect=False)
    with (
        wrap(context, theirs, server_hostname="localhost") as client,
        wrap(trust.context, ours, server_side=True, suppress_ragged_eofs=False) as server,
    ):
        while True:
            with contextlib.suppress(OSError):  # a client sees of a refusal what it sees
                client.do_handshake()
            try:
                server.do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                continue
            except ssl.SSLError as error:
                raise refusal(error) from None
            return trust.identify(server)


@BOTH_VERSIONS
@EVERY_CASE
def test_in_process(what: str, version: ssl.TLSVersion, trust: Trust, tmp_path: Path) -> None:
    case = cases()[what]
    context = client_context(case, version, tmp_path)
    if case.reason == ACCEPTED:
        identity = enter(trust, context)
        assert identity.sha256
        assert str(identity).isprintable()
        return
    with pytest.raises(TLSRefused, match=case.words) as refused:
        enter(trust, context)
    assert refused.value.reason is Refusal(case.reason), str(refused.value)
    assert str(refused.value).isprintable()


# ---------------------------------------------------------------- a running gateway


@pytest.fixture(scope="module")
def gateway(folder: Path) -> Iterator[Gateway]:
    # What is behind it is not there: none of these clients gets so far.
    behind = folder / "nothing.sock"
    listen = ("--listen", "127.0.0.1:0")
    with Gateway("--tls-dir", folder, "--socket", behind, *listen) as running:
        yield running


@BOTH_VERSIONS
@EVERY_CASE
def test_running(what: str, version: ssl.TLSVersion, gateway: Gateway, tmp_path: Path) -> None:
    case = cases()[what]
    context = client_context(case, version, tmp_path)
    before = len(gateway.log())
    with RawClient(gateway.uri) as client:
        client.greet()
        refused = False
        try:
            client.start_tls(context)
            client.send(option(Opt.ABORT))
            client.reply()
        except (OSError, PeerClosedError):
            refused = True
    line = gateway.wait_log(r"closed: .*\n", after=before)[0]
    assert refused == (case.reason != ACCEPTED), line
    if refused:
        assert re.search(rf"TLS handshake failed \({case.reason}: ", line), line
        assert re.search(case.words, line), line
    else:
        assert "client aborted the negotiation" in line
    assert line[:-1].isprintable()


def test_each_case_is_a_case() -> None:
    """At least twenty ways to be wrong, and all reasons that a certificate can be refused for."""
    reasons = [case.reason for case in cases().values() if case.reason != ACCEPTED]
    assert len(reasons) >= 20
    assert set(reasons) == {
        *("expired", "not_yet_valid", "revoked", "unknown_ca", "wrong_eku", "weak_key"),
        *("bad_certificate", "no_crl"),
    }
