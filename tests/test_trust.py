"""gateway.trust: one set of files and rules, who proves what by it, and who could not any more."""

from __future__ import annotations

import dataclasses
import os
import ssl
from datetime import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, rsa
from cryptography.x509.oid import NameOID

from gateway.access import ExportRules, Rule, Rules, parse_network
from gateway.errors import Refusal, SettingsError, TLSRefused
from gateway.identity import Identity
from gateway.pki import CertificateAuthority, Credential
from gateway.settings import Settings, TLSSettings
from gateway.snapshot import MAX_BYTES, Snapshot, as_path
from gateway.trust import Trust, check_guards, guards_of, load_trust
from tests import tls_rig
from tests.tls_rig import BOTH_VERSIONS, DAY, NOW, Files, Shake

authority, client, files = tls_rig.authority, tls_rig.client, tls_rig.files  # the fixtures


def settings(files: Files, *allow: str, **more: object) -> Settings:
    rules = Rules(allow=tuple(Rule.parse("--allow", text) for text in allow))
    return Settings("/up", files.settings(**more), rules=rules)


def enter(trust: Trust, context: ssl.SSLContext) -> Identity:
    assert trust.context is not None
    with Shake(trust.context, context) as handshake:
        assert handshake.server_error is None, handshake.reason
        return trust.identify(handshake.server)


def pem(key: object, *, password: bytes | None = None, form: str = "PKCS8") -> bytes:
    sealed = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    found: bytes = key.private_bytes(  # type: ignore[attr-defined]
        serialization.Encoding.PEM, getattr(serialization.PrivateFormat, form), sealed
    )
    return found


def signed(
    name: str,
    key: object,
    issuer: Credential | None,
    signer: object,
    *,
    ca: bool = False,
    begin: datetime = NOW - DAY,
    end: datetime = NOW + DAY,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())  # type: ignore[attr-defined]
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    )
    return builder.sign(signer, hashes.SHA256())  # type: ignore[arg-type]


def test_what_will_keep_clients_out_soon_is_said(
    files: Files, authority: CertificateAuthority
) -> None:
    server = authority.issue_server(["localhost"], 30)
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", server.key_pem)
    crl = files.put("ca-crl.pem", authority.revoke_list([], NOW, 10))
    trust = load_trust(settings(files, crl=crl))

    def said(days: float) -> list[str]:
        return [text.partition(" on ")[0] for text in trust.concerns(NOW + days * DAY)]

    assert said(0) == []
    assert said(9) == ["a CRL expires"]
    assert said(20) == ["our certificate expires"]
    assert said(40) == ["our certificate expired"]


# ---------------------------------------------------------------- our certificate and key


@pytest.mark.parametrize("form", ["PKCS8", "TraditionalOpenSSL"])
@pytest.mark.parametrize("line", [b"secret", b"secret\n", b"secret\r\n", b"secret\nmore\n"])
def test_key_with_a_password(
    form: str, line: bytes, files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    server = authority.issue_server(["localhost"])
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", pem(server.key, password=b"secret", form=form))
    trust = load_trust(settings(files, key_password=files.put("password", line)))
    assert enter(trust, files.client_context(client)).common_name == "backup"


@pytest.mark.parametrize("form", ["PKCS8", "TraditionalOpenSSL"])
@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"another", r"^--key-password-file: .*/password does not open .*: wrong password$"),
        (b" secret", r"wrong password$"),
        (b"", r"^--key-password-file: .*/password is empty"),
        (b"\nsecret", r"is empty: its first line is the password of --key$"),
        (b"x" * 1025, r"more than 1024 bytes"),
        (None, r"^--key: .*/server-key.pem is encrypted: name .* --key-password-file FILE$"),
    ],
)
def test_passwords_that_do_not_open_the_key(
    form: str, line: bytes | None, why: str, files: Files, authority: CertificateAuthority
) -> None:
    server = authority.issue_server(["localhost"])
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", pem(server.key, password=b"secret", form=form))
    password = None if line is None else files.put("password", line)
    with pytest.raises(SettingsError, match=why) as refused:
        load_trust(settings(files, key_password=password))
    assert "secret" not in str(refused.value)


def test_password_that_is_not_needed(files: Files) -> None:
    load_trust(settings(files, key_password=files.put("password", b"secret")))


def test_chain_with_an_intermediate(files: Files, client: Credential) -> None:
    """Clients know the root only."""
    root = CertificateAuthority.create("root")
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
    top = Credential(signed("top", keys[0], None, keys[0], ca=True), keys[0])
    middle = Credential(signed("middle", keys[1], top, keys[0], ca=True), keys[1])
    leaf = Credential(signed("localhost", keys[2], middle, keys[1]), keys[2])
    files.put("server-key.pem", leaf.key_pem)
    files.put("server-cert.pem", leaf.cert_pem, middle.cert_pem)
    context = files.client_context(client)
    context.check_hostname = False
    context.load_verify_locations(files.put("top.pem", top.cert_pem, root.cert_pem))
    assert enter(load_trust(settings(files)), context).common_name == "backup"
    files.put("server-cert.pem", middle.cert_pem, leaf.cert_pem)
    with pytest.raises(SettingsError, match=r"^--key: .* of certificate 2 in .*: put that one fir"):
        load_trust(settings(files))


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (lambda: rsa.generate_private_key(65537, 1024), "RSA of 1024 bits, and 2048 are needed"),
        (lambda: ec.generate_private_key(ec.SECP224R1()), "EC secp224r1, and P-256 is needed"),
        (lambda: dsa.generate_private_key(2048), "RSA, EC or Ed25519 is needed"),
    ],
)
def test_weak_keys_of_ours(
    key: object, why: str, files: Files, authority: CertificateAuthority
) -> None:
    weak = key()  # type: ignore[operator]
    certificate = signed("localhost", weak, authority, authority.key)
    files.put("server-cert.pem", certificate.public_bytes(serialization.Encoding.PEM))
    files.put("server-key.pem", pem(weak))
    with pytest.raises(SettingsError, match=rf"^--cert: .* has a weak key: .*{why}$"):
        load_trust(settings(files))


@BOTH_VERSIONS
@pytest.mark.parametrize(
    "key",
    [
        lambda: rsa.generate_private_key(65537, 1024),
        lambda: ec.generate_private_key(ec.SECP224R1()),
    ],
    ids=["RSA 1024", "P-224"],
)
def test_weak_keys_of_clients(
    key: object, version: ssl.TLSVersion, files: Files, authority: CertificateAuthority
) -> None:
    weak = key()  # type: ignore[operator]
    certificate = signed("x", weak, authority, authority.key)
    context = files.client_context()
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.load_cert_chain(
        files.put("w.pem", certificate.public_bytes(serialization.Encoding.PEM), pem(weak))
    )
    trust = load_trust(settings(files))
    assert trust.context is not None
    with Shake(trust.context, context) as handshake:
        if handshake.server_error is not None:
            # TLS 1.3 has no way to sign with P-224: the client does not even show it.
            assert handshake.reason in ("weak_key", "no_client_cert")
            return
        with pytest.raises(TLSRefused) as refused:
            trust.identify(handshake.server)
        assert refused.value.reason == Refusal.WEAK_KEY


def test_our_security_level_is_not_the_systems_choice(files: Files) -> None:
    context = load_trust(settings(files)).context
    assert context is not None
    assert context.security_level >= 2


WRONG_FILES = {
    "cert is empty": ("server-cert.pem", b"", r"--cert: .* does not hold a certificate"),
    "cert is text": ("server-cert.pem", b"hello", r"--cert: .* does not hold a certificate"),
    "cert is broken": (
        "server-cert.pem",
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        r"--cert: .* does not hold a certificate: 1 is broken",
    ),
    "cert is a key": (
        "server-cert.pem",
        pem(ec.generate_private_key(ec.SECP256R1())),
        r"--cert: .* does not hold a certificate",
    ),
    "key is empty": ("server-key.pem", b"", r"--key: .* is no usable PEM private key"),
    "key is another's": (
        "server-key.pem",
        pem(ec.generate_private_key(ec.SECP256R1())),
        r"--key: .* is not the key of the certificate in",
    ),
    "two keys": (
        "server-key.pem",
        2 * pem(ec.generate_private_key(ec.SECP256R1())),
        r"--key: .* holds 2 private keys",
    ),
    "ca is empty": ("ca-cert.pem", b"", r"--client-ca: .* does not hold a certificate"),
    "ca holds a key": (
        "ca-cert.pem",
        pem(ec.generate_private_key(ec.SECP256R1())),
        r"--client-ca: .* holds a private key",
    ),
    "too large": ("ca-cert.pem", b" " * (MAX_BYTES + 1), r"--client-ca: .* larger than 16 MiB"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_files_that_cannot_be_used(case: str, files: Files) -> None:
    name, content, why = WRONG_FILES[case]
    files.put(name, content)
    with pytest.raises(SettingsError, match=f"^{why}"):
        load_trust(settings(files))


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
def test_files_at_every_cut(name: str, files: Files) -> None:
    """Half of a file is no file: not a shorter chain, and not fewer CAs."""
    path = files.folder / name
    whole = path.read_bytes()
    if name != "server-key.pem":
        whole *= 2
    for size in [*range(0, len(whole) - 2, 37), len(whole) // 2 + 10, len(whole) - 2]:
        if whole[:size].strip() in (b"", whole[: len(whole) // 2].strip()):
            continue
        path.write_bytes(whole[:size])
        with pytest.raises(SettingsError):
            load_trust(settings(files))
    path.write_bytes(whole)
    load_trust(settings(files))


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
def test_what_is_no_file(name: str, files: Files) -> None:
    path = files.folder / name
    path.unlink()
    with pytest.raises(SettingsError, match=r": cannot read .*: No such file or directory$"):
        load_trust(settings(files))
    os.mkfifo(path)
    with pytest.raises(SettingsError, match=r"is no regular file$"):
        load_trust(settings(files))


def test_each_file_is_opened_for_the_snapshot_and_never_again(
    files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    """What was checked is what is used: the files may be gone, or others, when OpenSSL reads."""
    those = settings(files, crl=files.put("ca-crl.pem", authority.revoke_list([])))
    snapshot = Snapshot.take(those.tls)
    for path in files.folder.iterdir():
        path.unlink()
    trust = load_trust(those, snapshot)
    files.put("ca-cert.pem", authority.cert_pem)
    assert enter(trust, files.client_context(client)).common_name == "backup"


def test_folder_that_is_swapped_while_it_is_read(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never the certificate of before with the key of after."""
    reads = []

    def read(flag: str, path: Path) -> bytes:
        reads.append(flag)
        return b"old" if len(reads) == 1 else b"new"

    monkeypatch.setattr("gateway.snapshot._read", read)
    snapshot = Snapshot.take(files.settings())
    assert snapshot.cert is not None
    assert {snapshot.cert.data} == {b"new"}
    assert len(reads) == 9
    monkeypatch.setattr("gateway.snapshot._read", lambda *_: os.urandom(4))
    with pytest.raises(SettingsError, match="change all the time"):
        Snapshot.take(files.settings())


def test_memory_files_are_closed(files: Files) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with as_path(b"abc") as path:
        assert Path(path).read_bytes() == b"abc"
    load_trust(settings(files))
    assert len(os.listdir("/proc/self/fd")) == before


# ---------------------------------------------------------------- who is there


@BOTH_VERSIONS
def test_identity_has_the_whole_chain(
    files: Files, authority: CertificateAuthority, client: Credential, version: ssl.TLSVersion
) -> None:
    who = enter(load_trust(settings(files)), files.client_context(client, version))
    assert who.common_name == "backup"
    assert [one.sha256.hex() for one in who.chain] == [client.sha256, authority.sha256]
    assert who.chain[0].serial == client.certificate.serial_number


def test_anonymous(files: Files, client: Credential) -> None:
    trust = load_trust(settings(files, anonymous=True))
    assert enter(trust, files.client_context(client)) == Identity()
    assert trust.objection(Identity()) is None


def test_chain_that_openssl_does_not_give(
    files: Files, client: Credential, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.tls.verified_chain", lambda _: ())
    with pytest.raises(TLSRefused, match="no chain") as refused:
        enter(load_trust(settings(files)), files.client_context(client))
    assert refused.value.reason == Refusal.BAD_CERTIFICATE


def test_without_tls() -> None:
    trust = load_trust(Settings("/up", None))
    assert trust.context is None
    assert trust.objection(Identity().with_unix(0, 0)) is None


# ---------------------------------------------------------------- who could not any more


def test_objections(files: Files, authority: CertificateAuthority, client: Credential) -> None:
    first = load_trust(settings(files))
    who = enter(first, files.client_context(client))
    assert first.objection(who) is None
    assert load_trust(settings(files, "cn=backup")).objection(who) is None
    assert load_trust(settings(files, "cn=other")).objection(who) is Refusal.NOT_ALLOWED
    assert first.objection(Identity()) is Refusal.NO_CLIENT_CERT
    assert first.objection(Identity.of_psk("backup")) is Refusal.NO_CLIENT_CERT
    crl = files.put("ca-crl.pem", authority.revoke_list([client.certificate.serial_number]))
    assert load_trust(settings(files, crl=crl)).objection(who) is Refusal.REVOKED
    crl = files.put("ca-crl.pem", authority.revoke_list([client.certificate.serial_number + 1]))
    assert load_trust(settings(files, crl=crl)).objection(who) is None
    anonymous = load_trust(settings(files, anonymous=True))
    assert anonymous.objection(who) is None


def test_ca_that_is_gone_and_ca_that_is_renewed(
    files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    first = load_trust(settings(files))
    who = enter(first, files.client_context(client))
    other = CertificateAuthority.create("another CA")
    files.put("ca-cert.pem", other.cert_pem)
    gone = load_trust(settings(files), None, first)
    assert gone.objection(who) is Refusal.UNKNOWN_CA
    files.put("ca-cert.pem", other.cert_pem, authority.cert_pem)
    assert load_trust(settings(files), None, gone).objection(who) is None
    # The same name and the same key, in a new certificate.
    renewed = signed("test CA", authority.key, None, authority.key, ca=True)
    files.put("ca-cert.pem", renewed.public_bytes(serialization.Encoding.PEM))
    assert load_trust(settings(files), None, gone).objection(who) is None
    # The same name and another key.
    namesake = CertificateAuthority.create("test CA")
    files.put("ca-cert.pem", namesake.cert_pem)
    assert load_trust(settings(files), None, gone).objection(who) is Refusal.UNKNOWN_CA


def test_issuer_that_nobody_has_a_crl_of_any_more(
    files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    """An intermediate CA is taken out: OpenSSL lets nobody of it in, so nobody of it stays."""
    who = enter(load_trust(settings(files)), files.client_context(client))
    crl = files.put("ca-crl.pem", authority.revoke_list([]))
    listed = load_trust(settings(files, crl=crl))
    leaf, root = who.chain
    elsewhere = leaf._replace(issuer=b"an intermediate of before")
    below = dataclasses.replace(who, chain=(leaf, elsewhere, root))
    assert listed.objection(who) is None
    assert listed.objection(below) is Refusal.NO_CRL
    assert load_trust(settings(files)).objection(below) is None  # there are no CRLs at all


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (Rules(exports=(ExportRules("a", (Rule.anybody(),)),)), r"the last \[\[export\]\] is gone"),
        (Rules(allow=(Rule.parse("", "cn=a"),)), "the last allow rule is gone"),
        (Rules(allow_from=(parse_network("", "::1"),)), "the last allow-from is gone"),
    ],
)
def test_guards_that_vanish(files: Files, rules: Rules, words: str) -> None:
    """What a file looks like that was cut off."""
    guarded = load_trust(dataclasses.replace(settings(files), rules=rules))
    with pytest.raises(SettingsError, match=words):
        load_trust(settings(files), None, guarded)
    bare = load_trust(settings(files))
    with pytest.raises(SettingsError, match=words):
        check_guards(guards_of(guarded) | guards_of(bare), bare)
    assert load_trust(dataclasses.replace(settings(files), rules=rules), None, bare).rules == rules


def test_bans_may_be_lifted(files: Files) -> None:
    banned = Rules(deny=(Rule.parse("", "cn=a"),), deny_from=(parse_network("", "::1"),))
    before = load_trust(dataclasses.replace(settings(files), rules=banned))
    assert load_trust(settings(files), None, before).rules == Rules()


@pytest.mark.parametrize(
    "junk",
    [b"-----BEGIN A-----\n", b"-----BEGIN A-----\n-----END B-----\n"],
    ids=["begins", "ends"],
)
def test_broken_files_are_looked_at_once(files: Files, junk: bytes) -> None:
    """To look for an end from each beginning on would take minutes, and this test its time."""
    files.put("ca-cert.pem", 40_000 * junk)
    with pytest.raises(SettingsError, match="is cut off"):
        load_trust(settings(files))


def test_files_of_somebody_else(files: Files, client: Credential) -> None:
    """Well-formed, and each a copy that went wrong: nobody could enter any more."""
    good = (files.folder / "ca-cert.pem").read_bytes()
    files.put("ca-cert.pem", (files.folder / "server-cert.pem").read_bytes())
    with pytest.raises(SettingsError, match=r"^--client-ca: .* holds no certificate of a CA"):
        load_trust(settings(files))
    files.put("ca-cert.pem", good, client.cert_pem)
    load_trust(settings(files))  # a CA among others is enough
    files.put("server-cert.pem", client.cert_pem)
    files.put("server-key.pem", client.key_pem)
    with pytest.raises(SettingsError, match=r"^--cert: .* is no certificate of a TLS server"):
        load_trust(settings(files))


def test_cas_that_have_expired(files: Files) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    old = signed("old CA", key, None, key, ca=True, begin=NOW - 9 * DAY, end=NOW - DAY)
    good = (files.folder / "ca-cert.pem").read_bytes()
    pem = old.public_bytes(serialization.Encoding.PEM)
    files.put("ca-cert.pem", pem)
    with pytest.raises(SettingsError, match=r"^--client-ca: .* holds expired CAs only"):
        load_trust(settings(files))
    files.put("ca-cert.pem", pem, good)
    load_trust(settings(files))


@pytest.mark.parametrize("days", [(-9, -1), (1, 9)], ids=["expired", "not yet valid"])
def test_certificate_of_ours_that_nobody_would_take(
    files: Files, authority: CertificateAuthority, days: tuple[int, int]
) -> None:
    """At the start it is said; it does not take the place of a good one."""
    first = load_trust(settings(files))
    key = ec.generate_private_key(ec.SECP256R1())
    root = Credential(authority.certificate, authority.key)
    begin, end = (NOW + day * DAY for day in days)
    bad = Credential(signed("localhost", key, root, authority.key, begin=begin, end=end), key)
    files.put("server-key.pem", bad.key_pem)
    files.put("server-cert.pem", bad.cert_pem)
    (concern,) = load_trust(settings(files)).concerns(NOW)
    assert "expired on" in concern or "is not valid before" in concern
    with pytest.raises(SettingsError, match=r"^--cert: expired or not yet valid"):
        load_trust(settings(files), None, first)


def test_client_that_has_expired(files: Files, client: Credential) -> None:
    trust = load_trust(settings(files))
    who = enter(trust, files.client_context(client))
    assert NOW.timestamp() < who.expires < (NOW + 9999 * DAY).timestamp()
    assert trust.objection(who) is None
    past = dataclasses.replace(who, expires=NOW.timestamp() - 1)
    assert trust.objection(past) is Refusal.EXPIRED


def test_sets_that_would_let_in_more_than_anybody_meant(
    files: Files, authority: CertificateAuthority
) -> None:
    crl = files.put("ca-crl.pem", authority.revoke_list([]))
    first = load_trust(settings(files, crl=crl))
    with pytest.raises(SettingsError, match=r"^--crl is gone"):
        load_trust(settings(files), None, first)
    with pytest.raises(SettingsError, match=r"^--client-ca is gone"):
        load_trust(settings(files, anonymous=True), None, first)
    with pytest.raises(SettingsError, match=r"^--tls"):
        load_trust(Settings("/up", None), None, first)
    both = files.put("both.pem", authority.cert_pem, authority.revoke_list([]))
    inside = dataclasses.replace(
        settings(files), tls=dataclasses.replace(files.settings(), client_ca=both)
    )
    assert load_trust(inside, None, first).crls


def test_digest_is_of_all_contents_and_of_nothing_else(
    files: Files, authority: CertificateAuthority
) -> None:
    seen = {load_trust(settings(files)).digest}
    assert {load_trust(settings(files)).digest} == seen
    seen.add(load_trust(settings(files, "cn=x")).digest)
    files.put("ca-cert.pem", authority.cert_pem, b"\n")
    seen.add(load_trust(settings(files)).digest)
    seen.add(load_trust(settings(files, key_password=files.put("p", b"x"))).digest)
    assert len(seen) == 4


# ---------------------------------------------------------------- pre-shared keys


@pytest.mark.skipif(
    not hasattr(ssl.SSLContext, "set_psk_server_callback"),
    reason="pre-shared keys need Python 3.13",
)
def test_psk(tmp_path: Path) -> None:
    def load(text: str, before: Trust | None = None) -> Trust:
        path = tmp_path / "keys.psk"
        path.write_text(text)
        return load_trust(Settings("/up", TLSSettings(None, None, None, psk=path)), None, before)

    first = load(f"alice:{32 * 'a'}\nbob:{32 * 'b'}\n")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("PSK")
    context.set_psk_client_callback(  # type: ignore[attr-defined]
        lambda _: ("alice", bytes.fromhex(32 * "a"))
    )
    who = enter(first, context)
    assert who.psk == "alice"
    assert first.objection(who) is None
    assert first.objection(Identity()) is Refusal.NO_PSK
    assert load(f"alice:{32 * 'A'}\n", first).objection(who) is None  # the same bytes
    assert load(f"alice:{32 * 'c'}\n", first).objection(who) is Refusal.UNKNOWN_PSK
    assert load(f"bob:{32 * 'b'}\n", first).objection(who) is Refusal.UNKNOWN_PSK
    with pytest.raises(SettingsError, match=r"^--psk-file: .* no key"):
        load("")
