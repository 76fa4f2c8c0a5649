"""Hellos of TLS 1.3 that no honest client sends, written by hand. They need Python 3.13."""

from __future__ import annotations

import socket
import ssl
import struct
import sys
from pathlib import Path

import pytest

from gateway import psk
from gateway.errors import Refusal, TLSRefused
from tests.psk_rig import needs_psk

pytestmark = needs_psk

SHA256, SHA384 = b"\x13\x01", b"\x13\x02"  # TLS_AES_128_GCM_SHA256, TLS_AES_256_GCM_SHA384
PSK_KE, PSK_DHE_KE = b"\0", b"\1"
UNUSABLE = "it has a pre-shared key, but for that it needs TLS 1.3 with (EC)DHE and SHA-256"


def _short(data: bytes) -> bytes:
    return struct.pack(">B", len(data)) + data


def _long(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


def hello(*names: bytes, suite: bytes = SHA256, mode: bytes = PSK_DHE_KE) -> bytes:
    """RFC 8446, sections 4.1.2 and 4.2.11, in records. Every binder in it is wrong."""
    extensions = {
        43: _short(b"\x03\x04"),  # supported_versions
        10: _long(b"\0\x17"),  # supported_groups: secp256r1
        51: _long(b""),  # key_share: none yet
        13: _long(b"\x04\x03\x08\x04"),  # signature_algorithms
        45: _short(mode),  # psk_key_exchange_modes
        41: _long(b"".join(_long(name) + bytes(4) for name in names))  # pre_shared_key
        + _long(b"".join([_short(bytes(32))] * min(len(names), 100))),
    }
    body = b"\x03\x03" + bytes(32) + _short(b"") + _long(suite) + _short(b"\0")
    body += _long(b"".join(struct.pack(">H", kind) + _long(d) for kind, d in extensions.items()))
    message = b"\1" + len(body).to_bytes(3, "big") + body
    return b"".join(
        b"\x16\x03\x01" + _long(message[at : at + 16384]) for at in range(0, len(message), 16384)
    )


def failed(data: bytes) -> ssl.SSLError:
    keys = psk.parse(Path("keys.psk"), b"alice:%s\nbob:%s\n" % (b"00" * 32, b"11" * 32))
    near, far = socket.socketpair()
    with far:
        far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        far.sendall(data)
        far.shutdown(socket.SHUT_WR)
        context = psk.context(keys, "1.2")
        sock = context.wrap_socket(near, server_side=True, do_handshake_on_connect=False)
        with sock:
            with pytest.raises(ssl.SSLError) as caught:
                sock.do_handshake()
            with pytest.raises(TLSRefused):
                psk.prove(context, sock)
    return caught.value


def refused(data: bytes) -> TLSRefused:
    found = psk.refusal(failed(data))
    assert found is not None
    return found


def test_a_binder_that_is_wrong() -> None:
    found = refused(hello(b"alice"))
    assert found.reason is Refusal.UNKNOWN_PSK
    assert str(found) == "its key for 'alice' is not the one in --psk-file"


@pytest.mark.parametrize(
    "names", [(b"alice", b"bob"), (b"carol", b"bob"), (b"bob", b"alice", b"carol")]
)
def test_the_first_of_several_names_is_the_claim(names: tuple[bytes, ...]) -> None:
    """A name that is not in the file is no exception: it cannot be passed over to try the next."""
    found = refused(hello(*names))
    assert found.reason is Refusal.UNKNOWN_PSK
    assert repr(names[0].decode()) in str(found)


def test_thousands_of_names_for_a_hash_that_goes_with_none() -> None:
    found = refused(hello(*(b"n%d" % (at % 9) for at in range(7000)), suite=SHA384))
    assert found.reason is Refusal.NO_SHARED_CIPHER
    assert str(found).startswith(UNUSABLE)


def test_a_key_without_forward_secrecy() -> None:
    assert refused(hello(b"alice", mode=PSK_KE)).reason is Refusal.NO_PSK


@pytest.mark.parametrize("name", [b"x" * 257, b"al\xffice", b"x" * 60000])
def test_names_that_can_be_nobodys(
    name: bytes, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenSSL or `ssl` passes over them without asking, and without a traceback in the log."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    assert refused(hello(name)).reason is Refusal.NO_PSK
    assert not unraisable
    assert capfd.readouterr().err == ""


def test_control_characters_of_a_name_are_not_printed() -> None:
    found = refused(hello(b"a\nFAKE LOG LINE\x1b[2J"))
    assert str(found) == r"--psk-file has no key for 'a\nFAKE LOG LINE\x1b[2J'"


def test_a_binder_that_is_cut_short() -> None:
    whole = hello(b"alice")
    error = failed(whole.replace(_long(_short(bytes(32))), b"\0\0" + bytes(33)))
    assert psk.refusal(error) is None  # no key has anything to do with it
