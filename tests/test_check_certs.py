"""gateway.check: verdicts about the server's certificate, its chain and key, and the CAs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from gateway.check.certs import covers
from gateway.settings import ListenSystemd, ListenTCP
from gateway.trust import load_trust
from tests.check_rig import DAY, Folder, Pair, make, make_ca


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "tls")


def server(folder: Folder, **more: Any) -> None:
    folder.use(make("disk", folder.ca, **more))


def dns(*names: str) -> tuple[x509.GeneralName, ...]:
    return tuple(x509.DNSName(name) for name in names)


# ---------------------------------------------------------------- the server's certificate


def test_a_good_set(folder: Folder) -> None:
    found = folder.check()
    assert found.code == 0, str(found)
    assert found.has("ok", r"cert: CN=server: may be a TLS server's")
    assert found.has("ok", r"cert: for localhost, 127\.0\.0\.1$")
    assert found.has("ok", r"cert: CN=server: valid until \d{4}-\d\d-\d\d, 36\d days$")
    assert found.has("ok", r"cert: its CA is CN=ca, which --client-ca has too$")
    assert found.has("ok", r"cert: covers what is listened on: 127\.0\.0\.1$")
    assert found.has("ok", r"key: the key of the certificate in .*/cert$")
    assert found.has("ok", r"ca: CN=ca: valid until")
    assert found.has("ok", r"^ok    start: ")
    assert found.of("warn") == [
        f"warn  --socket {folder.socket}: not there: clients are refused until the NBD server is "
        "started"
    ]
    assert found.lines[-1] == f"{len(found.lines) - 2} ok, 1 warn, 0 bad: fit to start or reload"


WRONG: list[tuple[str, dict[str, Any], str, str]] = [
    ("expired", {"begin": -9 * DAY, "end": -2 * DAY}, "bad", "expired on .*, 2 days ago: renew"),
    ("a minute ago", {"begin": -9 * DAY, "end": timedelta(minutes=-1)}, "bad", "expired on "),
    ("not yet valid", {"begin": DAY, "end": 9 * DAY}, "bad", "not valid before .* the clock"),
    ("soon", {"end": 29 * DAY}, "warn", r"ends on .*, in 2[89] days: renew"),
    ("not so soon", {"end": 32 * DAY}, "ok", r"valid until .*, 3\d days"),
    ("client's", {"purposes": [ExtendedKeyUsageOID.CLIENT_AUTH]}, "bad", "without serverAuth"),
    ("any purpose", {"purposes": [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]}, "ok", "may be a"),
    ("no purpose", {"purposes": None, "usage": None}, "ok", "may be a TLS server's"),
    ("no signing", {"usage": ["key_encipherment"]}, "bad", "lacks digitalSignature"),
    ("no enciphering", {"usage": ["digital_signature"]}, "warn", "lacks keyEncipherment: some Q"),
    ("a CA", {"ca": True}, "warn", "a CA itself: QEMU refuses it"),
    ("no names", {"san": ()}, "bad", "no names .* the CN counts for nothing"),
    ("only a URI", {"san": [x509.UniformResourceIdentifier("a:b")]}, "bad", "no names"),
    ("address as DNS", {"san": dns("127.0.0.1")}, "warn", "127.0.0.1 is an address and stands"),
    ("elsewhere", {"san": dns("disks.example.com")}, "warn", r"not for 127\.0\.0\.1 \(--listen\)"),
    ("many names", {"san": dns(*(f"a{i}.example" for i in range(9)))}, "ok", "and 3 more$"),
    ("P-192", {"key": "SECP192R1"}, "bad", "weak key, EC secp192r1, and P-256 is needed"),
    ("odd curve", {"key": "SECP256K1"}, "warn", "few clients know the curve secp256k1"),
    ("P-384", {"key": "SECP384R1"}, "ok", "key: the key of the certificate"),
    ("Ed25519", {"key": "ed25519"}, "ok", "key: the key of the certificate"),
    ("RSA 1024", {"key": 1024}, "bad", "weak key, RSA of 1024 bits, and 2048 are"),
    ("RSA 2048", {"key": 2048}, "ok", "key: the key of the certificate"),
    ("DSA", {"key": "dsa"}, "bad", "weak key, DSA"),
]


def key_of(kind: Any) -> Any:
    match kind:
        case int():
            return rsa.generate_private_key(65537, kind)
        case "dsa":
            return dsa.generate_private_key(1024)
        case "ed25519":
            return ed25519.Ed25519PrivateKey.generate()
        case str():
            return ec.generate_private_key(getattr(ec, kind)())
    return None


@pytest.mark.parametrize(
    ("how", "level", "text"), [pytest.param(*one[1:], id=one[0]) for one in WRONG]
)
def test_server_certificate(how: dict[str, Any], level: str, text: str, folder: Folder) -> None:
    server(folder, **{**how, "key": key_of(how.get("key"))})
    found = folder.check()
    assert found.has(level, text), str(found)
    if level != "bad":
        assert found.code == 0, str(found)


@pytest.mark.parametrize("digest", ["sha1", "md5"])
def test_signatures_that_can_be_forged(digest: str, folder: Folder, tmp_path: Path) -> None:
    """`cryptography` signs with neither any more; openssl does."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    authority = make_ca("rsa", key=key_of(2048))
    folder.write(folder.client_ca, authority.pem)
    ca, key, request = (tmp_path / name for name in ("ca.pem", "ca-key.pem", "request"))
    ca.write_bytes(authority.pem)
    key.write_bytes(authority.key_pem())
    new = f"openssl req -new -key {folder.key} -subj /CN=disk -out {request}"
    sign = f"openssl x509 -req -in {request} -CA {ca} -CAkey {key} -days 99 -{digest}"
    subprocess.run(new.split(), check=True, capture_output=True)
    made = subprocess.run(sign.split(), check=True, capture_output=True).stdout
    folder.write(folder.cert, made)
    found = folder.check()
    assert found.has("bad", f"CN=disk: signed with {digest.upper()}, which can"), str(found)


def test_signature_that_nobody_knows(folder: Folder) -> None:
    ecdsa_with_sha256, nothing = (
        bytes.fromhex("2a8648ce3d040302"),
        bytes.fromhex("2a8648ce3d04037f"),
    )
    der = folder.server.certificate.public_bytes(Encoding.DER)
    strange = x509.load_der_x509_certificate(der.replace(ecdsa_with_sha256, nothing))
    folder.write(folder.cert, strange.public_bytes(Encoding.PEM))
    found = folder.check()
    assert found.has("bad", "cert: CN=server: unknown signature: "), str(found)


# ---------------------------------------------------------------- the chain


@pytest.fixture
def middle(folder: Folder) -> Pair:
    return make_ca("middle", folder.ca)


@pytest.fixture
def leaf(middle: Pair) -> Pair:
    return make("leaf", middle)


def test_chain_in_order(folder: Folder, middle: Pair, leaf: Pair) -> None:
    folder.use(leaf, middle)
    found = folder.check()
    assert found.code == 0, str(found)
    assert found.has("ok", "cert: chain of 2, each signed by the next")
    assert found.has("ok", "CN=middle: valid until")
    assert not found.has("warn", "superfluous")


def test_superfluous_root(folder: Folder, middle: Pair, leaf: Pair) -> None:
    folder.use(leaf, middle, folder.ca)
    found = folder.check()
    assert found.has("warn", r"the root \(CN=ca\) is superfluous"), str(found)
    assert found.has("ok", "its CA is CN=ca")


def test_chain_out_of_order(folder: Folder, middle: Pair, leaf: Pair) -> None:
    folder.use(leaf, folder.ca, middle)
    found = folder.check()
    words = r"certificate 1 \(CN=leaf\) is not signed by the next one \(CN=ca\)"
    assert found.has("bad", words)
    # Some clients have the rest themselves, so it starts; and its log says the same.
    (concern,) = load_trust(folder.settings()).concerns(datetime.now(UTC))
    assert re.match(f"--cert: {words}: the server's own first", concern)


def test_leaf_comes_last(folder: Folder, middle: Pair, leaf: Pair) -> None:
    folder.use(leaf, middle)
    folder.write(folder.cert, middle.pem, leaf.pem)
    found = folder.check()
    assert found.has("bad", "key: the key of certificate 2 in .*: that one has to be first")
    assert found.has("bad", "start: ")


def test_a_stranger_in_the_chain(folder: Folder) -> None:
    folder.use(folder.server, make_ca("stranger"))
    assert folder.check().has("bad", "is not signed by the next one")


def test_issuer_that_is_no_ca(folder: Folder) -> None:
    false = make("false", folder.ca, ca=False)
    folder.use(make("leaf", false), false)
    assert folder.check().has("bad", r"CN=false is no CA \(basicConstraints\)")


def test_self_signed(folder: Folder) -> None:
    folder.use(make("alone"))
    found = folder.check()
    assert found.has("warn", "self-signed: each client has to be given this very certificate")


def test_of_another_ca(folder: Folder) -> None:
    folder.use(make("disk", make_ca("public ca")))
    found = folder.check()
    assert found.has("warn", r"its issuer CN=public ca is not in --client-ca: clients need that")
    assert found.code == 0, str(found)


def test_of_a_ca_that_was_renewed(folder: Folder) -> None:
    folder.use(make("disk", make_ca("ca")))
    assert folder.check().has("bad", "in --client-ca by name, with another key")


def test_expired_in_the_middle(folder: Folder) -> None:
    middle = make_ca("middle", folder.ca, begin=-9 * DAY, end=-DAY)
    folder.use(make("leaf", middle), middle)
    assert folder.check().has("bad", "cert: CN=middle: expired on")


def test_text_of_others_is_shown_harmlessly(folder: Folder) -> None:
    folder.use(make("x\nok    all is well\x1b[2J" + "y" * 40, folder.ca))
    found = folder.check()
    assert found.has("ok", r"cert: CN=x\?ok    all is well\?\[2Jy+")
    assert not any("\x1b" in line for line in found.lines)


# ---------------------------------------------------------------- names that are listened on


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("disks.example.com", True),
        ("DISKS.example.com.", True),
        ("a.wild.example.com", True),
        ("wild.example.com", False),
        ("a.b.wild.example.com", False),
        ("example.com", False),
        ("com", False),
        ("192.0.2.1", True),
        ("192.0.2.2", False),
        ("2001:db8:0::1", True),
        ("2001:db8::1%eth0", True),
        ("192.0.2.9", False),
    ],
)
def test_covers(host: str, good: bool) -> None:
    names = ("disks.example.com", "*.Wild.example.com", "192.0.2.9", "*.2.1")
    assert covers(names, ("192.0.2.1", "2001:db8::1"), host) is good


@pytest.mark.parametrize("listen", [ListenTCP(None, 1), ListenTCP("::", 1), ListenSystemd(None)])
def test_the_machines_name_stands_for_all_addresses(
    listen: ListenTCP | ListenSystemd, folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "box.example.com")
    found = folder.check(listen=(listen,))
    assert found.has("warn", "cert: not for box.example.com, this machine's name"), str(found)
    server(folder, san=dns("*.example.com"))
    found = folder.check(listen=(listen,))
    assert found.has("ok", "covers what is listened on: box.example.com"), str(found)
    assert found.code == 0, str(found)


# ---------------------------------------------------------------- the CAs

Change = Callable[[Folder], list[Pair]]
CA_FILES: list[tuple[str, Change, str, str]] = [
    ("two", lambda f: [f.ca, make_ca("other")], "ok", "CN=other: valid until"),
    ("twice", lambda f: [f.ca, f.ca], "warn", "ca: CN=ca is in it twice"),
    ("a leaf", lambda f: [f.ca, f.server], "bad", r"CN=server is no CA \(basicConstraints\)"),
    ("no constraints", lambda f: [make_ca("x", ca=None)], "bad", "CN=x is no CA"),
    ("may not sign", lambda f: [make_ca("x", usage=["crl_sign"])], "bad", "CN=x may not sign"),
    ("no usage", lambda f: [f.ca, make_ca("x", usage=None)], "ok", "CN=x: valid until"),
    (
        "one expired",
        lambda f: [f.ca, make_ca("x", begin=-9 * DAY, end=-DAY)],
        "warn",
        "CN=x: expired on",
    ),
    (
        "all expired",
        lambda f: [make_ca("x", begin=-9 * DAY, end=-DAY)],
        "bad",
        "no CA in it is valid any more: nobody can enter",
    ),
    ("soon", lambda f: [f.ca, make_ca("x", end=9 * DAY)], "warn", "CN=x: ends on .*, in [89] days"),
    ("middle", lambda f: [f.ca, make_ca("x", f.ca)], "ok", "CN=x: an intermediate CA of CN=ca"),
    (
        "middle alone",
        lambda f: [make_ca("x", f.ca)],
        "bad",
        "CN=x is an intermediate CA, and its issuer CN=ca is not in the file",
    ),
    (
        "false root",
        lambda f: [make_ca("ca", make_ca("ca"))],
        "bad",
        "CN=ca: it says that it signed itself, and did not",
    ),
    ("namesakes", lambda f: [f.ca, make_ca("ca")], "warn", "several CAs are called CN=ca"),
    ("weak", lambda f: [f.ca, make_ca("x", key=key_of(1024))], "bad", "CN=x: weak key, RSA"),
]


@pytest.mark.parametrize(
    ("content", "level", "text"), [pytest.param(*one[1:], id=one[0]) for one in CA_FILES]
)
def test_ca_file(content: Change, level: str, text: str, folder: Folder) -> None:
    folder.write(folder.client_ca, *(one.pem for one in content(folder)))
    found = folder.check()
    assert found.has(level, text), str(found)
    if level != "bad":
        assert found.code == 0, str(found)


# ---------------------------------------------------------------- the key


def test_key_of_another_certificate(folder: Folder) -> None:
    folder.write(folder.key, make("other").key_pem())
    found = folder.check()
    assert found.has("bad", "key: not the key of the certificate in .*/cert"), str(found)


@pytest.mark.parametrize("old", [False, True])
def test_encrypted_key(old: bool, folder: Folder) -> None:
    folder.write(folder.key, folder.server.key_pem("secret", old=old))
    found = folder.check()
    assert found.has("bad", "key: the key is encrypted: name its password's file"), str(found)
    for content in (b"secret", b"secret\n", b"secret\r\nsecond line"):
        folder.write(folder.password, content)
        found = folder.check()
        assert found.has("ok", "the key of the certificate in .*, and its password fits")
    folder.write(folder.password, b"guess")
    assert folder.check().has("bad", "the password in .*/password does not open it")
    folder.write(folder.password, b"\nsecret")
    assert folder.check().has("bad", "password: its first line is empty")


def test_password_without_need(folder: Folder) -> None:
    folder.write(folder.password, b"secret")
    found = folder.check()
    assert found.has("warn", "password: not needed: the key in .* is not encrypted"), str(found)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n", b"\0" * 99])
def test_no_key(content: bytes, folder: Folder) -> None:
    folder.write(folder.key, content)
    assert folder.check().has("bad", "key: no private key: put the one that is meant")


def test_two_keys(folder: Folder) -> None:
    folder.write(folder.key, folder.server.key_pem(), make("other").key_pem())
    assert folder.check().has("bad", "key: 2 private keys: leave the one that is meant")


def test_key_among_the_cas(folder: Folder) -> None:
    folder.write(folder.client_ca, folder.ca.pem, folder.ca.key_pem())
    assert folder.check().has("bad", "ca: there is a key in it: only certificates of CAs")


def test_cut_off(folder: Folder) -> None:
    folder.write(folder.cert, folder.server.pem, folder.ca.pem[:-9])
    assert folder.check().has("bad", "cert: cut off: something begins in it and does not end")


def test_broken_key(folder: Folder) -> None:
    broken = b"-----BEGIN PRIVATE KEY-----\nMAAA\n-----END PRIVATE KEY-----\n"
    folder.write(folder.key, broken)
    assert folder.check().has("bad", "key: no usable private key: broken")


def test_certificate_and_key_in_one_file(folder: Folder) -> None:
    folder.write(folder.cert, folder.server.pem, folder.server.key_pem(old=True))
    found = folder.check(tls={"key": folder.cert})
    assert found.code == 0, str(found)


def test_a_missing_ca_is_said_once(folder: Folder) -> None:
    """And once more as what a start makes of it."""
    folder.client_ca.unlink()
    said = [line for line in folder.check().of("bad") if "No such file" in line]
    assert len(said) == 2
    assert said[0] == f"bad   {folder.client_ca}: cannot be read: No such file or directory"
    assert said[1].startswith("bad   start: ")


def test_key_without_a_certificate(folder: Folder) -> None:
    folder.cert.unlink()
    found = folder.check()
    assert found.has("bad", "cert: cannot be read: No such file"), str(found)
    assert found.has("ok", "key: a private key; whose, is not known"), str(found)
