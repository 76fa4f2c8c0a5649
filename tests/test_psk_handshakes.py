"""Handshakes with pre-shared keys: who gets in, as whom, and who does not."""

from __future__ import annotations

import random
import socket
import ssl

import pytest
import trio

from gateway import psk
from gateway.errors import Refusal
from gateway.transport import Channel
from tests import psk_rig
from tests.psk_rig import KEY, VERSIONS, Shake, Shaking, client_context, keys, needs_psk

pytestmark = needs_psk
version = pytest.mark.parametrize("version", VERSIONS)
shake = psk_rig.shake


@version
def test_who_has_the_key_is_known_by_its_name(shake: Shake, version: str) -> None:
    context = psk.context(keys(), "1.2")
    for name, key in KEY.items():
        done = shake(context, client_context(name, key, version)).finish()
        assert not done.errors
        assert psk.prove(context, done.server) == name
        assert done.server.version() == f"TLSv{version}"
        assert done.client.getpeercert(binary_form=True) is None
        done.client.send(b"hello")
        assert done.server.recv(10) == b"hello"


def test_what_is_negotiated(shake: Shake) -> None:
    context = psk.context(keys(), "1.2")
    old = shake(context, client_context("alice", KEY["alice"], "1.2")).finish()
    new = shake(context, client_context("alice", KEY["alice"], "1.3")).finish()
    assert old.server.cipher()[0] == "ECDHE-PSK-CHACHA20-POLY1305"
    assert new.server.cipher()[0].endswith("_SHA256")
    assert new.server.session_reused  # so OpenSSL calls an external key
    assert not old.server.session_reused


def refused(done: Shaking) -> tuple[Refusal, str, str]:
    """The reason, its words, and what the client has got to see."""
    error = done.errors[done.server]
    found = psk.refusal(error)
    assert found is not None
    seen = ""
    try:
        done.client.recv(1)  # in TLS 1.3 its handshake may have ended before
    except ssl.SSLError as later:
        seen = later.reason
    return found.reason, str(found), done.errors[done.client].reason or seen


@version
@pytest.mark.parametrize("name", ["carol", "alice2", "Alice", "x" * 200, "é"])
def test_a_wrong_key_and_an_unknown_name_look_the_same(
    shake: Shake, version: str, name: str
) -> None:
    context = psk.context(keys(), "1.2")
    poor, unknown = (
        refused(shake(context, client_context(one, KEY["bob"], version)).finish())
        for one in ("alice", name)
    )
    assert poor[:2] == (Refusal.UNKNOWN_PSK, "its key for 'alice' is not the one in --psk-file")
    assert unknown[0] is Refusal.UNKNOWN_PSK
    assert unknown[1].startswith(f"--psk-file has no key for '{name[:50]}")
    assert poor[2] == unknown[2]
    assert "_ALERT_" in poor[2]


@version
def test_the_bytes_of_both_refusals_are_as_many(version: str) -> None:
    """What the client gets in each turn, apart from what is random in it."""
    context = psk.context(keys(), "1.2")
    sizes = {
        name: _sizes(context, client_context(name, KEY["bob"], version))
        for name in ("alice", "carol")
    }
    assert sizes["alice"] == sizes["carol"]
    assert len(sizes["alice"]) == (2 if version == "1.2" else 1)


def _sizes(context: ssl.SSLContext, client_context: ssl.SSLContext) -> list[int]:
    near, far = socket.socketpair()
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(inward, outward)
    near.setblocking(False)
    far.setblocking(False)
    sizes = []
    with far, context.wrap_socket(near, server_side=True, do_handshake_on_connect=False) as server:
        while True:
            with pytest.raises(ssl.SSLWantReadError):
                client.do_handshake()
            far.send(outward.read())
            try:
                server.do_handshake()
            except ssl.SSLWantReadError:
                failed = False
            except ssl.SSLError:
                failed = True
            answer = far.recv(1 << 16)
            sizes.append(len(answer))
            if failed:
                return sizes
            inward.write(answer)


@version
def test_a_client_with_certificates_only(shake: Shake, version: str) -> None:
    context = psk.context(keys(), "1.2")
    done = shake(context, client_context(None, b"", version)).finish()
    reason, words, seen = refused(done)
    assert reason is Refusal.NO_PSK
    assert "offered no pre-shared key that we can use" in words
    assert seen == "SSLV3_ALERT_HANDSHAKE_FAILURE"


@pytest.mark.parametrize(
    "cipher",
    [
        "PSK-AES256-GCM-SHA384",  # no forward secrecy
        "RSA-PSK-AES256-GCM-SHA384",
        "ECDHE-PSK-AES256-CBC-SHA384",  # no AEAD
        "ECDHE-PSK-NULL-SHA256:@SECLEVEL=0",
        "ADH-AES256-GCM-SHA384:@SECLEVEL=0",
        "AECDH-AES256-SHA:@SECLEVEL=0",
    ],
)
def test_ciphers_without_forward_secrecy_or_authentication(shake: Shake, cipher: str) -> None:
    context = psk.context(keys(), "1.2")
    done = shake(context, client_context("alice", KEY["alice"], "1.2", cipher)).finish()
    assert refused(done)[0] is Refusal.NO_PSK


def test_the_least_version(shake: Shake) -> None:
    context = psk.context(keys(), "1.3")
    assert not shake(context, client_context("bob", KEY["bob"], "1.3")).finish().errors
    done = shake(context, client_context("bob", KEY["bob"], "1.2")).finish()
    assert done.errors[done.server].reason == "UNSUPPORTED_PROTOCOL"
    assert psk.refusal(done.errors[done.server]) is None


@version
def test_who_leaves_in_the_middle(shake: Shake, version: str) -> None:
    context = psk.context(keys(), "1.2")
    shaking = shake(context, client_context("bob", KEY["bob"], version))
    shaking.step(0)
    socket.socket.shutdown(shaking.client, socket.SHUT_WR)
    shaking.step(1)
    found = psk.refusal(shaking.errors[shaking.server])
    assert found is not None
    assert found.reason is Refusal.EOF


def test_two_hundred_interleaved_handshakes_with_different_names(shake: Shake) -> None:
    """Each in its own order of steps; every connection knows who is at its other end."""
    people = {f"client-{number}": random.Random(number).randbytes(32) for number in range(200)}
    context = psk.context(keys(people), "1.2")
    order = random.Random(13)
    shaking = {
        name: shake(context, client_context(name, key, order.choice(list(VERSIONS))))
        for name, key in people.items()
    }
    going = list(shaking)
    while going:
        name = order.choice(going)
        if not shaking[name].step(order.randrange(2)):
            going.remove(name)
    assert {name: psk.prove(context, one.server) for name, one in shaking.items()} == {
        name: name for name in people
    }


def test_interleaved_with_those_that_borrow_a_name(shake: Shake) -> None:
    """One with the right key for each name that has only the name, all at the same time."""
    people = {f"client-{number}": random.Random(number).randbytes(32) for number in range(50)}
    context = psk.context(keys(people), "1.2")
    order = random.Random(17)
    names = list(people)
    honest, liars = {}, {}
    for number, name in enumerate(names):
        one = client_context(name, people[name], order.choice(list(VERSIONS)))
        another = client_context(name, people[names[number - 1]], order.choice(list(VERSIONS)))
        honest[name], liars[name] = shake(context, one), shake(context, another)
    going = [*honest.values(), *liars.values()]
    while going:
        one = order.choice(going)
        if not one.step(order.randrange(2)):
            going.remove(one)
    for name in names:
        assert psk.prove(context, honest[name].server) == name
        error = psk.refusal(liars[name].errors[liars[name].server])
        assert error is not None
        assert error.reason is Refusal.UNKNOWN_PSK


async def test_as_the_gateway_does_it() -> None:
    """Through `Channel.start_tls`, with all the clients at once, and the same context for all."""
    people = {f"client-{number}": random.Random(number).randbytes(16) for number in range(60)}
    context = psk.context(keys(people), "1.2")
    found: dict[str, str] = {}

    async def serve(sock: socket.socket, name: str) -> None:
        channel = await Channel(sock).start_tls(context)
        found[name] = psk.prove(context, channel.tls)
        await channel.aclose()

    async def ask(sock: socket.socket, name: str, version: str) -> None:
        context = client_context(name, people[name], version)
        channel = await Channel(sock).start_tls(context, server_side=False)
        assert await channel.receive() == b""
        channel.close()

    async with trio.open_nursery() as nursery:
        for number, name in enumerate(people):
            near, far = socket.socketpair()
            nursery.start_soon(serve, near, name)
            nursery.start_soon(ask, far, name, ["1.2", "1.3"][number % 2])
    assert found == {name: name for name in people}
