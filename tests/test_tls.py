"""gateway.tls: the policy, in real handshakes, and what a failed one is called."""

from __future__ import annotations

import contextlib
import socket
import ssl
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import CertificateBuilder, Name
from cryptography.x509.oid import ExtendedKeyUsageOID

from gateway import tls
from gateway.errors import SettingsError, TLSRefused
from gateway.pki import CertificateAuthority, Credential
from gateway.settings import TLSSettings
from gateway.tls import identity, refusal, server_context, server_names

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
BOTH_VERSIONS = pytest.mark.parametrize("version", [V12, V13], ids=["TLS1.2", "TLS1.3"])


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create("test CA")


@pytest.fixture(scope="module")
def client(authority: CertificateAuthority) -> Credential:
    return authority.issue_client("backup")


@dataclass(frozen=True)
class Files:
    """A server's files, and contexts that use them."""

    folder: Path

    def put(self, name: str, *pems: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(b"".join(pems))
        return path

    def settings(self, *, anonymous: bool = False, **more: object) -> TLSSettings:
        return TLSSettings(
            self.folder / "server-cert.pem",
            self.folder / "server-key.pem",
            None if anonymous else self.folder / "ca-cert.pem",
            **more,  # type: ignore[arg-type]
        )

    def client_context(
        self, credential: Credential | None = None, version: ssl.TLSVersion | None = None
    ) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.folder / "ca-cert.pem")
        if credential is not None:
            pem = self.put("a-client.pem", credential.cert_pem, credential.key_pem)
            context.load_cert_chain(pem)
        if version is not None:
            context.minimum_version = context.maximum_version = version
        return context


@pytest.fixture
def files(tmp_path: Path, authority: CertificateAuthority) -> Files:
    files = Files(tmp_path)
    server = authority.issue_server(["disks.example.com", "localhost"])
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", server.key_pem)
    files.put("ca-cert.pem", authority.cert_pem)
    return files


class Shake:
    """One handshake over a socket pair, both ends in turns, until each is done or has failed."""

    def __init__(
        self,
        server: ssl.SSLContext,
        client: ssl.SSLContext,
        session: ssl.SSLSession | None = None,
    ) -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        later = {"do_handshake_on_connect": False, "suppress_ragged_eofs": False}
        self.server = server.wrap_socket(ours, server_side=True, **later)
        self.client = client.wrap_socket(
            theirs, server_hostname="localhost", session=session, **later
        )
        self.server_error: ssl.SSLError | None = None
        self.client_error: ssl.SSLError | None = None
        open_ends = {self.client, self.server}
        while open_ends:
            for end in (self.client, self.server):
                if end in open_ends and self._step(end):
                    open_ends.remove(end)

    def _step(self, end: ssl.SSLSocket) -> bool:
        """Whether this end is through."""
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as error:
            if end is self.server:
                self.server_error = error
            else:
                self.client_error = error
            end.shutdown(socket.SHUT_WR)
        return True

    def __enter__(self) -> Shake:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.client.close()

    @property
    def reason(self) -> str:
        """What the gateway calls the failure. The words behind it are one line for a person."""
        assert self.server_error is not None, "the handshake succeeded"
        refused = refusal(self.server_error)
        assert refused.reason.replace("_", "").isalpha()
        assert str(refused).isprintable()
        assert len(str(refused)) > 10
        return refused.reason

    @property
    def alert(self) -> str:
        """What the client gets to see: under TLS 1.3 not before it reads."""
        if self.client_error is None:
            with pytest.raises(ssl.SSLError) as failed:
                self.client.read(1)
            self.client_error = failed.value
        return self.client_error.reason or ""


def shake(server: ssl.SSLContext, client: ssl.SSLContext) -> str:
    with Shake(server, client) as handshake:
        return handshake.reason


# ---------------------------------------------------------------- policy


@BOTH_VERSIONS
def test_both_versions_are_spoken(
    files: Files, client: Credential, version: ssl.TLSVersion
) -> None:
    context = server_context(files.settings())
    with Shake(context, files.client_context(client, version)) as handshake:
        assert handshake.server_error is None
        assert handshake.server.version() == version.name.replace("_", ".")
        assert identity(handshake.server) is not None


def test_1_3_is_preferred(files: Files, client: Credential) -> None:
    with Shake(server_context(files.settings()), files.client_context(client)) as handshake:
        assert handshake.server.version() == "TLSv1.3"


def test_minimum_1_3_refuses_1_2(files: Files, client: Credential) -> None:
    context = server_context(files.settings(minimum="1.3"))
    with Shake(context, files.client_context(client, V12)) as handshake:
        assert handshake.reason == "tls_version"
        assert "PROTOCOL_VERSION" in handshake.alert
    with Shake(context, files.client_context(client)) as handshake:
        assert handshake.server.version() == "TLSv1.3"


@pytest.mark.parametrize("old", ["TLSv1", "TLSv1_1"])
def test_older_versions_are_refused(old: str, files: Files, client: Credential) -> None:
    context = files.client_context(client)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[old]
    with Shake(server_context(files.settings()), context) as handshake:
        assert handshake.reason == "tls_version"
        assert "PROTOCOL_VERSION" in handshake.alert


def test_ciphers_are_forward_secret_and_authenticated(files: Files) -> None:
    offered = {one["name"]: one for one in server_context(files.settings()).get_ciphers()}
    assert len(offered) >= 6
    for name, cipher in offered.items():
        assert cipher["aead"], name
        assert cipher["protocol"] == "TLSv1.3" or name.startswith("ECDHE-"), name
        assert cipher["strength_bits"] >= 128, name


@pytest.mark.parametrize(
    "ciphers", ["ECDHE-ECDSA-AES128-SHA256", "ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-AES128-CCM8"]
)
def test_other_ciphers_are_refused(ciphers: str, files: Files, client: Credential) -> None:
    context = files.client_context(client, V12)
    context.set_ciphers(f"{ciphers}:@SECLEVEL=0")
    assert shake(server_context(files.settings()), context) == "no_shared_cipher"


def test_the_server_chooses_the_cipher(files: Files, client: Credential) -> None:
    context = files.client_context(client, V12)
    context.set_ciphers("ECDHE+CHACHA20:ECDHE+AESGCM")
    with Shake(server_context(files.settings()), context) as handshake:
        cipher = handshake.server.cipher()
        assert cipher is not None
        assert "AES" in cipher[0]


def test_keys_are_not_logged(
    files: Files, client: Credential, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ssl.create_default_context` would obey this."""
    log = files.folder / "keys.log"
    monkeypatch.setenv("SSLKEYLOGFILE", str(log))
    context = server_context(files.settings())
    with Shake(context, files.client_context(client)) as handshake:
        assert handshake.server_error is None
    assert not log.exists()
    assert context.keylog_filename is None


@BOTH_VERSIONS
def test_no_tickets(files: Files, client: Credential, version: ssl.TLSVersion) -> None:
    context = server_context(files.settings())
    with Shake(context, files.client_context(client, version)) as handshake:
        handshake.server.write(b"x")
        assert handshake.client.read(1) == b"x"  # under TLS 1.3 tickets come with the data
        session = handshake.client.session
        assert session is not None
        assert not session.has_ticket


def test_session_of_1_3_cannot_be_resumed(files: Files, client: Credential) -> None:
    context = server_context(files.settings())
    theirs = files.client_context(client, V13)
    with Shake(context, theirs) as first:
        first.server.write(b"x")
        first.client.read(1)
        session = first.client.session
    with Shake(context, theirs, session) as second:
        assert not second.server.session_reused
        assert identity(second.server) is not None


def test_session_of_1_2_is_resumed_by_openssl_and_refused_by_us(
    files: Files, client: Credential
) -> None:
    """OpenSSL keeps sessions by id, and `ssl` has no switch: the CRL would not be looked at."""
    context = server_context(files.settings())
    theirs = files.client_context(client, V12)
    with Shake(context, theirs) as first:
        assert identity(first.server) is not None
        session = first.client.session
        with contextlib.suppress(ssl.SSLWantReadError):
            first.server.unwrap()  # without a proper end OpenSSL forgets the session by itself
    with Shake(context, theirs, session) as second:
        assert second.server_error is None
        if second.server.session_reused:
            with pytest.raises(TLSRefused) as refused:
                identity(second.server)
            assert refused.value.reason == "resumed"
        else:
            assert identity(second.server) is not None
    with Shake(context, theirs) as third:
        assert identity(third.server) is not None, "who shakes hands in full still enters"


# ---------------------------------------------------------------- who is there


@BOTH_VERSIONS
def test_identity(files: Files, client: Credential, version: ssl.TLSVersion) -> None:
    context = server_context(files.settings())
    with Shake(context, files.client_context(client, version)) as handshake:
        who = identity(handshake.server)
    assert who is not None
    assert who.common_name == "backup"
    assert who.sha256 == client.sha256


def test_anonymous_clients_have_no_identity(files: Files, client: Credential) -> None:
    """Nor are they asked: a certificate that nobody verifies would be worth nothing."""
    context = server_context(files.settings(anonymous=True))
    for credential in (None, client):
        with Shake(context, files.client_context(credential)) as handshake:
            assert handshake.server_error is None
            assert identity(handshake.server) is None


def test_certificate_that_openssl_takes_and_cryptography_does_not(
    files: Files, client: Credential, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_certificate(_: bytes) -> None:
        raise ValueError("negative serial number")

    monkeypatch.setattr(tls.Identity, "of_certificate", of_certificate)
    with Shake(server_context(files.settings()), files.client_context(client)) as handshake:
        with pytest.raises(TLSRefused, match="negative serial number") as refused:
            identity(handshake.server)
    assert refused.value.reason == "bad_certificate"


# ---------------------------------------------------------------- who is refused


def wrong_clients(authority: CertificateAuthority) -> Iterator[tuple[str, Credential | None, str]]:
    """What the client shows, what the gateway calls it, what the client's TLS prints."""
    other = CertificateAuthority.create("another CA")
    namesake = CertificateAuthority.create("test CA")
    yield "no_client_cert", None, "CERTIFICATE_REQUIRED|HANDSHAKE_FAILURE"
    yield (
        "expired",
        authority.issue_client("x", not_before=NOW - 9 * DAY, not_after=NOW - DAY),
        "CERTIFICATE_EXPIRED",
    )
    yield (
        "not_yet_valid",
        authority.issue_client("x", not_before=NOW + DAY, not_after=NOW + 9 * DAY),
        "BAD_CERTIFICATE",
    )
    yield "unknown_ca", other.issue_client("x"), "UNKNOWN_CA"
    yield "unknown_ca", namesake.issue_client("x"), "UNKNOWN_CA"
    yield "unknown_ca", other, "UNKNOWN_CA"  # self-signed
    yield (
        "wrong_eku",
        authority.issue_client("x", usages=[ExtendedKeyUsageOID.SERVER_AUTH]),
        "UNSUPPORTED_CERTIFICATE",
    )
    yield "wrong_eku", authority.issue_server(["localhost"]), "UNSUPPORTED_CERTIFICATE"


@BOTH_VERSIONS
@pytest.mark.parametrize("case", range(8))
def test_reasons(
    case: int, version: ssl.TLSVersion, files: Files, authority: CertificateAuthority
) -> None:
    reason, credential, alert = list(wrong_clients(authority))[case]
    context = server_context(files.settings())
    with Shake(context, files.client_context(credential, version)) as handshake:
        assert handshake.reason == reason
        assert any(one in handshake.alert for one in alert.split("|")), handshake.alert


def test_leaf_of_a_leaf(files: Files, client: Credential) -> None:
    """A client's certificate signs nothing, whatever its holder does with the key."""
    key = ec.generate_private_key(ec.SECP256R1())
    leaf = (
        CertificateBuilder()
        .subject_name(Name([]))
        .issuer_name(client.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .sign(client.key, hashes.SHA256())
    )
    context = files.client_context()
    pem = Credential(leaf, key)
    chain = files.put("chain.pem", pem.cert_pem, client.cert_pem, pem.key_pem)
    context.load_cert_chain(chain)
    assert shake(server_context(files.settings()), context) in ("unknown_ca", "bad_certificate")


@pytest.mark.parametrize(
    "first",
    [b"GET / HTTP/1.1\r\n\r\n", b"IHAVEOPT\0\0\0\x07\0\0\0\0", bytes(64)],
    ids=["HTTP", "NBD option", "zeroes"],
)
def test_plaintext(files: Files, first: bytes) -> None:
    ours, theirs = socket.socketpair()
    context = server_context(files.settings())
    with theirs, context.wrap_socket(ours, server_side=True, do_handshake_on_connect=False) as end:
        theirs.sendall(first)
        with pytest.raises(ssl.SSLError) as failed:
            end.do_handshake()
    assert refusal(failed.value).reason == "not_tls"


def test_client_that_leaves(files: Files) -> None:
    ours, theirs = socket.socketpair()
    context = server_context(files.settings())
    with context.wrap_socket(ours, server_side=True, do_handshake_on_connect=False) as end:
        theirs.close()
        with pytest.raises(ssl.SSLError) as failed:
            end.do_handshake()
    assert refusal(failed.value).reason == "eof"


@BOTH_VERSIONS
def test_client_that_does_not_know_our_ca(
    files: Files, client: Credential, version: ssl.TLSVersion
) -> None:
    context = files.client_context(client, version)
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.minimum_version = stranger.maximum_version = version
    other = files.put("other-ca.pem", CertificateAuthority.create("another CA").cert_pem)
    stranger.load_verify_locations(other)
    ours = server_context(files.settings())
    with Shake(ours, stranger) as handshake:
        assert handshake.reason == "client_rejected_us"
        assert handshake.server_error is not None
        assert "give it our ca-cert.pem" in str(refusal(handshake.server_error))
    with Shake(ours, context) as handshake:
        assert handshake.server_error is None


def test_client_that_asked_for_another_host(
    files: Files, client: Credential, authority: CertificateAuthority
) -> None:
    """The client here asks for localhost."""
    server = authority.issue_server(["disks.example.com"])
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", server.key_pem)
    ours = server_context(files.settings())
    with Shake(ours, files.client_context(client)) as handshake:
        assert handshake.reason == "client_rejected_us"


def test_client_that_finds_our_certificate_expired(
    files: Files, client: Credential, authority: CertificateAuthority
) -> None:
    server = authority.issue_server(["localhost"], not_before=NOW - 9 * DAY, not_after=NOW - DAY)
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", server.key_pem)
    with Shake(server_context(files.settings()), files.client_context(client)) as handshake:
        assert handshake.reason == "client_rejected_us"
        assert handshake.server_error is not None
        assert "expired" in str(refusal(handshake.server_error))


def test_reasons_that_are_not_known() -> None:
    alert = ssl.SSLError(1, "[SSL: TLSV1_ALERT_NEWS] news")
    alert.reason = "TLSV1_ALERT_NEWS"
    assert refusal(alert).reason == "client_alert"
    assert "TLSV1_ALERT_NEWS" in str(refusal(alert))
    fault = ssl.SSLError(1, "something else")
    fault.reason = ""
    assert refusal(fault).reason == "tls_error"


# ---------------------------------------------------------------- revocation


def with_crl(files: Files, crl: bytes) -> ssl.SSLContext:
    return server_context(files.settings(crl=files.put("ca-crl.pem", crl)))


@BOTH_VERSIONS
def test_revoked(
    files: Files, authority: CertificateAuthority, client: Credential, version: ssl.TLSVersion
) -> None:
    revoked = authority.issue_client("lost laptop")
    context = with_crl(files, authority.revoke_list([revoked.certificate.serial_number]))
    with Shake(context, files.client_context(revoked, version)) as handshake:
        assert handshake.reason == "revoked"
        assert "CERTIFICATE_REVOKED" in handshake.alert
    with Shake(context, files.client_context(client, version)) as handshake:
        assert handshake.server_error is None


def test_crl_inside_the_ca_file(
    files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    crl = authority.revoke_list([client.certificate.serial_number])
    files.put("ca-cert.pem", authority.cert_pem, crl)
    assert shake(server_context(files.settings()), files.client_context(client)) == "revoked"


def test_stale_crl_lets_nobody_in(
    files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    context = with_crl(files, authority.revoke_list([], NOW - 60 * DAY))
    with Shake(context, files.client_context(client)) as handshake:
        assert handshake.reason == "crl_expired"
        assert handshake.server_error is not None
        assert "renew" in str(refusal(handshake.server_error))


def test_crl_of_the_future_lets_nobody_in(
    files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    context = with_crl(files, authority.revoke_list([], NOW + DAY))
    assert shake(context, files.client_context(client)) == "crl_not_yet_valid"


def test_crl_of_another_ca_lets_nobody_in(files: Files, client: Credential) -> None:
    context = with_crl(files, CertificateAuthority.create("another CA").revoke_list([]))
    assert shake(context, files.client_context(client)) == "no_crl"


@pytest.mark.parametrize("content", [b"", b"no CRL", None])
def test_crl_that_cannot_be_used(content: bytes | None, files: Files) -> None:
    path = files.folder / "ca-crl.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"^ca-crl\.pem: .*/ca-crl\.pem"):
        server_context(files.settings(crl=path))


# ---------------------------------------------------------------- files


def test_more_than_one_ca(files: Files, authority: CertificateAuthority) -> None:
    other = CertificateAuthority.create("another CA")
    files.put("ca-cert.pem", authority.cert_pem, other.cert_pem)
    context = server_context(files.settings())
    for each in (authority, other):
        with Shake(context, files.client_context(each.issue_client("x"))) as handshake:
            assert handshake.server_error is None


def test_key_of_the_old_pem_format(files: Files, authority: CertificateAuthority) -> None:
    """BEGIN EC PRIVATE KEY, which older tools write."""
    server = authority.issue_server(["localhost"])
    key = server.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )
    files.put("server-cert.pem", server.cert_pem)
    files.put("server-key.pem", key)
    server_context(files.settings())


@pytest.mark.parametrize(
    "form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL]
)
def test_key_with_a_passphrase(
    form: serialization.PrivateFormat, files: Files, authority: CertificateAuthority
) -> None:
    key = authority.issue_server(["localhost"]).key.private_bytes(
        serialization.Encoding.PEM, form, serialization.BestAvailableEncryption(b"secret")
    )
    files.put("server-key.pem", key)
    with pytest.raises(SettingsError, match=r"^--key: the private key is encrypted"):
        server_context(files.settings())


def test_certificate_and_key_in_one_file(files: Files, authority: CertificateAuthority) -> None:
    server = authority.issue_server(["localhost"])
    both = files.put("both.pem", server.key_pem, server.cert_pem)
    server_context(TLSSettings(both, both, files.folder / "ca-cert.pem"))


def test_names_of_the_server(files: Files, authority: CertificateAuthority) -> None:
    names = ["disks.example.com", "192.0.2.1", "*.example.org", "2001:db8::1"]
    path = files.put("named.pem", authority.issue_server(names).cert_pem, authority.cert_pem)
    assert server_names(path) == (
        *("disks.example.com", "*.example.org"),
        *("192.0.2.1", "2001:db8::1"),
    )


def test_server_without_names(files: Files, authority: CertificateAuthority) -> None:
    assert server_names(files.put("nameless.pem", authority.cert_pem)) == ()


def test_python_that_takes_plaintext_for_tls_data(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before CVE-2023-40217: `wrap_socket` looks at no data that has come before TLS."""

    class Trusting(ssl.SSLSocket):
        def recv(self, buflen: int = 1024, flags: int = 0) -> bytes:
            return b""

    monkeypatch.setattr(tls, "_Probe", Trusting)
    with pytest.raises(SettingsError, match="CVE-2023-40217"):
        server_context(files.settings())
