"""What is proved by a handshake with a pre-shared key, and the contexts in which it was done."""

from __future__ import annotations

import gc
import socket
import ssl
import weakref

import pytest

from gateway import psk
from gateway.errors import Refusal, TLSRefused
from tests import psk_rig
from tests.psk_rig import KEY, VERSIONS, Shake, client_context, keys, needs_psk

pytestmark = needs_psk
version = pytest.mark.parametrize("version", VERSIONS)
shake = psk_rig.shake


@version
def test_a_proof_holds_for_one_set_of_keys(shake: Shake, version: str) -> None:
    before = psk.context(keys(), "1.2")
    after = psk.context(keys(), "1.2")
    done = shake(before, client_context("bob", KEY["bob"], version)).finish()
    assert psk.prove(before, done.server) == "bob"
    with pytest.raises(TLSRefused) as caught:
        psk.prove(after, done.server)
    assert caught.value.reason is Refusal.UNKNOWN_PSK


@version
def test_several_names_in_one_handshake(shake: Shake, version: str) -> None:
    """OpenSSL takes the first that has a key, as all have here. If that changes, nobody is it."""
    context = psk.context(keys(), "1.2")
    done = shake(context, client_context("bob", KEY["bob"], version)).finish()
    claim = psk._claim(done.server)
    claim.key("bob")  # behind a HelloRetryRequest it is asked for once more
    assert psk.prove(context, done.server) == "bob"
    claim.key("alice")
    with pytest.raises(TLSRefused, match="several names") as caught:
        psk.prove(context, done.server)
    assert caught.value.reason is Refusal.UNKNOWN_PSK


@version
def test_a_name_that_is_not_in_the_file(shake: Shake, version: str) -> None:
    """OpenSSL would have to take a random key for the right one; were that so, nobody got in."""
    context = psk.context(keys(), "1.2")
    done = shake(context, client_context("bob", KEY["bob"], version)).finish()
    psk._claim(done.server).name = "carol"
    with pytest.raises(TLSRefused, match="no key for 'carol'") as caught:
        psk.prove(context, done.server)
    assert caught.value.reason is Refusal.UNKNOWN_PSK


def test_a_hello_that_has_to_be_said_again(shake: Shake) -> None:
    context = psk.context(keys(), "1.2")
    client = client_context("bob", KEY["bob"], "1.3")
    client.set_ecdh_curve("secp521r1")  # of which the server has not got a share: its first choice
    done = shake(context, client).finish()
    assert psk.prove(context, done.server) == "bob"


def test_before_the_handshake_has_ended_nothing_is_proved(shake: Shake) -> None:
    context = psk.context(keys(), "1.2")
    for version in VERSIONS:
        shaking = shake(context, client_context("bob", KEY["bob"], version))
        shaking.step(0)
        shaking.step(1)
        with pytest.raises(TLSRefused) as caught:
            psk.prove(context, shaking.server)
        assert caught.value.reason is Refusal.NO_PSK


@version
def test_no_session_is_taken_up_again(shake: Shake, version: str) -> None:
    """Nor could one: the context of the connection before is gone, and no ticket was given out."""
    context = psk.context(keys(), "1.2")
    client = client_context("bob", KEY["bob"], version)
    first = shake(context, client).finish()
    first.server.send(b"x")
    assert first.client.recv(1) == b"x"
    session = first.client.session
    assert session is None or not session.has_ticket
    second = shake(context, client, session=session).finish()
    assert not second.errors
    assert psk.prove(context, second.server) == "bob"
    assert second.server.session_reused == (version == "1.3")
    # And a session is nothing for who has lost the key.
    poor = client_context("bob", KEY["alice"], version)
    third = shake(context, poor).finish()
    assert third.errors[third.server]


def test_the_context_itself_never_shakes_hands() -> None:
    context = psk.context(keys(), "1.2")
    with pytest.raises(NotImplementedError):
        context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)
    for version in VERSIONS:
        near, far = socket.socketpair()
        client = client_context("bob", KEY["bob"], version)
        near.setblocking(False)
        far.setblocking(False)
        server = ssl.SSLContext.wrap_socket(
            context, near, server_side=True, do_handshake_on_connect=False
        )
        other = client.wrap_socket(far, do_handshake_on_connect=False)
        with server, other:
            with pytest.raises(ssl.SSLWantReadError):
                other.do_handshake()
            with pytest.raises(ssl.SSLError) as caught:
                server.do_handshake()
            assert not isinstance(caught.value, ssl.SSLWantReadError)


def test_each_connection_has_a_context_of_its_own_and_it_goes_with_it(shake: Shake) -> None:
    context = psk.context(keys(), "1.2")
    near, far = socket.socketpair()
    sock = context.wrap_socket(near, server_side=True, do_handshake_on_connect=False)
    gone = weakref.ref(sock.context)
    assert sock.context is not context
    assert sock.context.cert_store_stats()["x509"] == 0
    sock.close()
    far.close()
    gc.disable()
    try:
        del sock
        assert gone() is None  # without the garbage collector
    finally:
        gc.enable()


def test_no_certificate_gets_into_it() -> None:
    context = psk.context(keys(), "1.2")
    near, far = socket.socketpair()
    with context.wrap_socket(near, server_side=True, do_handshake_on_connect=False) as sock:
        inner = sock.context
        assert inner.verify_mode is ssl.CERT_NONE
        assert inner.num_tickets == 0
        assert inner.options & ssl.OP_NO_TICKET
        assert inner.options & ssl.OP_NO_RENEGOTIATION
        assert not inner.options & (1 << 10)  # SSL_OP_ALLOW_NO_DHE_KEX
        old = [one["name"] for one in inner.get_ciphers() if one["protocol"] != "TLSv1.3"]
        assert old == ["ECDHE-PSK-CHACHA20-POLY1305"]
    far.close()
