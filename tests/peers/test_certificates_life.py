"""What the `certs` commands issue, revoke and hand out, with real programs and every key type."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import ssl
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway import certs
from gateway.certs import Passwords
from gateway.certs.bundle import bundle_client, write_bundle
from gateway.certs.folder import issue_client, issue_server, opened, renew_crl, revoke
from gateway.certs.show import show
from gateway.pki import KeyType
from gateway.pki_keys import name_of
from tests.peers import certificates_rig
from tests.peers.certificates_rig import TIMEOUT_S, copy_for_client, fails, serving, succeeds
from tests.support.gateway import Gateway
from tests.support.peers import Nbdkit, find

server = certificates_rig.server

CLIENTS = {"nbdinfo": "nbdinfo", "qemu_img": "qemu-img", "nbd_client_list": "nbd-client"}


@pytest.fixture(scope="module", params=KeyType)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CA, server and clients "client", "good" and "bad", which is revoked, all with such keys."""
    folder = tmp_path_factory.mktemp("life") / "tls"
    certs.init(folder, key_type=request.param)
    for name in ("good", "bad"):
        issue_client(folder, name, key_type=request.param)
    revoke(folder, [folder / "clients/bad/client-cert.pem"])
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = tmp_path / "plain"
    certs.init(folder)
    return folder


# ---------------------------------------------------------------- NBD servers and clients


def judge(folder: Path, port: int, without: str = "") -> None:
    """Every client but the one `without` gets in as "good", and none as "bad"."""
    for client, name in CLIENTS.items():
        find(name)
        verdict = fails if name == without else succeeds
        verdict(getattr(certs.client_commands(folder / "clients/good", "localhost", port), client))
    bad = certs.client_commands(folder / "clients/bad", "localhost", port)
    fails(bad.nbdinfo)
    fails(bad.qemu_img)


def test_every_client_gets_in_and_who_is_revoked_does_not(
    server: tuple[str, Path], folder: Path
) -> None:
    """With the CRL in force: both servers take ca-crl.pem of their own accord.

    Between nbd-client, which speaks TLS 1.2, and a server that uses GnuTLS no Ed25519 certificate
    of a client is sent. The gateway gets it.
    """
    first = x509.load_pem_x509_certificate((folder / "client-cert.pem").read_bytes())
    ed25519 = name_of(first.public_key()) == KeyType.ED25519
    with serving(server, folder) as port:
        judge(folder, port, without="nbd-client" if ed25519 else "")


def test_so_does_the_gateway(folder: Path, tmp_path: Path) -> None:
    with (
        Nbdkit(tmp_path, "memory", "1M") as upstream,
        Gateway(
            *("--tls-dir", folder, "--socket", upstream.socket, "--listen", "127.0.0.1:0")
        ) as gateway,
    ):
        judge(folder, urlsplit(gateway.uri).port or 0)


def test_the_gateway_opens_an_encrypted_key(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("correct horse\n")
    folder = tmp_path / "tls"
    certs.init(folder, passwords=Passwords(b"of the CA", b"correct horse"))
    (tmp_path / "nbdkit").mkdir()
    with (
        Nbdkit(tmp_path / "nbdkit", "memory", "1M") as upstream,
        Gateway(
            *("--tls-dir", folder, "--key-password-file", tmp_path / "password"),
            *("--socket", upstream.socket, "--listen", "127.0.0.1:0"),
        ) as gateway,
    ):
        port = urlsplit(gateway.uri).port or 0
        succeeds(certs.client_commands(folder, "localhost", port).nbdinfo)


@pytest.mark.parametrize("client", CLIENTS)
def test_what_a_bundle_holds_is_all_that_a_client_needs(
    client: str, server: tuple[str, Path], plain: Path, tmp_path: Path
) -> None:
    find(CLIENTS[client])
    issue_client(plain, "vm1")
    write_bundle(tmp_path / "vm1.tar", bundle_client(plain, "vm1"), force=False)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    succeeds([find("tar"), "-xf", tmp_path / "vm1.tar", "-C", theirs])
    assert (theirs / "client-key.pem").stat().st_mode & 0o777 == 0o600
    with serving(server, plain) as port:
        succeeds(getattr(certs.client_commands(theirs, "localhost", port), client))


def test_a_renewed_server_is_accepted_by_the_clients_of_before(
    server: tuple[str, Path], plain: Path, tmp_path: Path
) -> None:
    theirs = copy_for_client(tmp_path / "theirs", plain)
    issue_server(plain, force=True)
    with serving(server, plain) as port:
        for client, name in CLIENTS.items():
            find(name)
            succeeds(getattr(certs.client_commands(theirs, "localhost", port), client))


@pytest.fixture
def two(plain: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Folders of two CAs while the one takes over from the other: each side has both CAs, and CRLs
    of both."""
    other = tmp_path / "other"
    certs.init(other)
    lists, trusted = [], []
    for one in (plain, other):
        issue_client(one, "bad")
        revoke(one, [one / "clients/bad/client-cert.pem"])
        lists.append((one / "ca-crl.pem").read_bytes())
        trusted.append((one / "ca-cert.pem").read_bytes())
    for one in (plain, other):
        (one / "ca-crl.pem").write_bytes(b"".join(lists))
        for folder in (one, one / "clients/bad"):
            (folder / "ca-cert.pem").write_bytes(b"".join(trusted))
        renew_crl(one)  # keeps the other's
    return plain, other


def judge_both(two: tuple[Path, Path], port: int) -> None:
    for one in two:
        succeeds(certs.client_commands(one, "localhost", port).nbdinfo)
        succeeds(certs.client_commands(one, "localhost", port).qemu_img)
        fails(certs.client_commands(one / "clients/bad", "localhost", port).nbdinfo)


def test_two_authorities_at_once(server: tuple[str, Path], two: tuple[Path, Path]) -> None:
    for served in two:
        with serving(server, served) as port:
            judge_both(two, port)


def test_two_authorities_at_the_gateway(two: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "nbdkit").mkdir()
    with Nbdkit(tmp_path / "nbdkit", "memory", "1M") as upstream:
        for served in two:
            arguments = ("--socket", upstream.socket, "--listen", "127.0.0.1:0")
            with Gateway("--tls-dir", served, *arguments) as gateway:
                judge_both(two, urlsplit(gateway.uri).port or 0)


def test_an_encrypted_key_opens_for_qemu(plain: Path, tmp_path: Path) -> None:
    find("qemu-img")
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    (tmp_path / "password").write_text("correct horse")
    handed = issue_client(plain, "vm1", passwords=Passwords(None, b"correct horse"))
    with serving((find("nbdkit"), disk), plain) as port:
        line = certs.client_commands(handed.folder, "localhost", port).qemu_img
        secret = f"--object secret,id=pw,file={shlex.quote(str(tmp_path / 'password'))}"
        fails(line)
        opened_line = line.replace("endpoint=client", "endpoint=client,passwordid=pw")
        succeeds(opened_line.replace("--object", f"{secret} --object", 1))


ODD = 'q"u+o;t<e>\\=#'
NAMES = {
    "CN alone": [(NameOID.COMMON_NAME, "vm1")],
    "CN with commas and blanks": [(NameOID.COMMON_NAME, "Jürgen, vm  1")],
    "a whole one": [
        (NameOID.COUNTRY_NAME, "GB"),
        (NameOID.STATE_OR_PROVINCE_NAME, "Lon don"),
        (NameOID.LOCALITY_NAME, ODD),
        (NameOID.ORGANIZATION_NAME, " Ex, Müller "),
        (NameOID.ORGANIZATIONAL_UNIT_NAME, "#hash"),
        (NameOID.SERIAL_NUMBER, "42"),
        (NameOID.DOMAIN_COMPONENT, "example"),
        (NameOID.USER_ID, "u1"),
        (NameOID.EMAIL_ADDRESS, "a@b.example"),
        (NameOID.GIVEN_NAME, "given"),
        (NameOID.SURNAME, "sur"),
        (NameOID.TITLE, "title"),
        (NameOID.STREET_ADDRESS, "street"),
        (NameOID.DN_QUALIFIER, "qualifier"),
        (NameOID.COMMON_NAME, "vm1"),
    ],
}


@pytest.mark.parametrize("case", NAMES)
def test_the_name_that_is_shown_for_qemu_is_the_one_that_it_compares(
    case: str, plain: Path, tmp_path: Path
) -> None:
    """`certs show` on a certificate from elsewhere, pasted into qemu-nbd's command line."""
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    with opened(plain) as folder:
        issuer = folder.authority
    name = x509.Name([x509.NameAttribute(*each) for each in NAMES[case]])
    builder = x509.CertificateBuilder(
        *(issuer.certificate.subject, name, key.public_key(), 7),
        *(now - timedelta(hours=1), now + timedelta(days=1)),
    )
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    made = builder.add_extension(usage, critical=False).sign(issuer.key, hashes.SHA256())
    theirs = copy_for_client(tmp_path / "theirs", plain)
    (theirs / "client-cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (theirs / "client-key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    text = show(theirs / "client-cert.pem", now)
    (identity,) = [line.strip() for line in text.splitlines() if "identity=" in line]
    for pasted, verdict in ((identity, succeeds), (identity + "x", fails)):
        authz = f"authz-simple,id=who,{pasted}"
        more = ("--object", authz, "--tls-authz", "who")
        with serving((find("qemu-nbd"), disk), plain, more=more) as port:
            verdict(certs.client_commands(theirs, "localhost", port).nbdinfo)


# ---------------------------------------------------------------- verifiers


def test_openssl_verifies_with_the_list(folder: Path) -> None:
    ca, crl = folder / "ca-cert.pem", folder / "ca-crl.pem"
    verify = [find("openssl"), "verify", "-x509_strict", "-crl_check", "-CAfile", ca]
    verify += ["-CRLfile", crl]
    succeeds([*verify, "-purpose", "sslserver", folder / "server-cert.pem"])
    succeeds([*verify, "-purpose", "sslclient", folder / "clients/good/client-cert.pem"])
    bad = fails([*verify, "-purpose", "sslclient", folder / "clients/bad/client-cert.pem"])
    assert "certificate revoked" in bad


def test_certtool_verifies_with_the_list(folder: Path) -> None:
    verify = [find("certtool"), "--verify", "--load-ca-certificate", folder / "ca-cert.pem"]
    verify += ["--load-crl", folder / "ca-crl.pem"]
    server_auth = ("--verify-purpose", "1.3.6.1.5.5.7.3.1", "--verify-hostname", "localhost")
    client_auth = ("--verify-purpose", "1.3.6.1.5.5.7.3.2")
    succeeds([*verify, *server_auth, "--infile", folder / "server-cert.pem"])
    succeeds([*verify, *client_auth, "--infile", folder / "clients/good/client-cert.pem"])
    bad = fails([*verify, *client_auth, "--infile", folder / "clients/bad/client-cert.pem"])
    assert "revoked" in bad
    verify_crl = [find("certtool"), "--verify-crl", "--infile", folder / "ca-crl.pem"]
    succeeds([*verify_crl, "--load-ca-certificate", folder / "ca-cert.pem"])


def test_every_key_can_be_read_elsewhere(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "ca/ca-key.pem", folder / "server-key.pem", folder / "client-key.pem"):
        succeeds([find("openssl"), "pkey", "-check", "-noout", "-in", path])
        succeeds([find("certtool"), "--key-info", "--infile", path])
    (tmp_path / "password").write_text("correct horse\n")
    for each in KeyType:
        name = f"locked-{each}"
        issue_client(folder, name, key_type=each, passwords=Passwords(None, b"correct horse"))
        key = folder / "clients" / name / "client-key.pem"
        password = f"file:{tmp_path / 'password'}"
        succeeds([find("openssl"), "pkey", "-noout", "-in", key, "-passin", password])
        wrong = [find("openssl"), "pkey", "-noout", "-in", key, "-passin", "pass:wrong"]
        fails(wrong)
        shutil.rmtree(key.parent)


# ---------------------------------------------------------------- handshakes


@contextlib.contextmanager
def handshakes(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """A TLS server of OpenSSL's that asks for a certificate; its port, and who came or why not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server-cert.pem", folder / "server-key.pem")
    context.load_verify_locations(folder / "ca-cert.pem")
    context.load_verify_locations(folder / "ca-crl.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT | ssl.VERIFY_CRL_CHECK_LEAF
    came: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT_S)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    plain, _ = listener.accept()
                    plain.settimeout(TIMEOUT_S)
                    try:
                        with context.wrap_socket(plain, server_side=True) as session:
                            certificate = session.getpeercert()
                            assert certificate is not None
                            came.append(str(certificate["subject"][0][0][1]))
                            session.recv(1)  # its end
                    except ssl.SSLCertVerificationError as error:
                        came.append(error.verify_message)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield listener.getsockname()[1], came
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT_S)


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_gnutls_cli_and_s_client_shake_hands(version: str, folder: Path) -> None:
    with handshakes(folder) as (port, came):
        for name in ("good", "bad"):
            theirs = folder / "clients" / name
            files = [theirs / f"{each}.pem" for each in ("ca-cert", "client-cert", "client-key")]
            ca, cert, key = map(str, files)
            priority = f"NORMAL:-VERS-ALL:+VERS-TLS{version}"
            gnutls = [find("gnutls-cli"), "--priority", priority, "--x509cafile", ca]
            gnutls += ["--x509certfile", cert, "--x509keyfile", key, "-p", str(port), "localhost"]
            openssl = [find("openssl"), "s_client", "-connect", f"localhost:{port}", "-brief"]
            openssl += ["-verify_return_error", "-CAfile", ca, "-cert", cert, "-key", key]
            openssl += ["-verify_hostname", "localhost", f"-tls{version.replace('.', '_')}"]
            for command in (gnutls, openssl):
                done = subprocess.run(
                    command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT_S
                )
                if name == "good":
                    assert done.returncode == 0, done
    assert came == ["good", "good", "certificate revoked", "certificate revoked"]


def test_the_tar_file_is_one_for_every_tar(plain: Path) -> None:
    """Bundles are made by Python's tarfile; GNU tar lists them alike."""
    write_bundle(plain / "x.tar", bundle_client(plain, "client"), force=False)
    listed = succeeds([find("tar"), "-tf", plain / "x.tar"]).split()
    with tarfile.open(plain / "x.tar") as archive:
        assert listed == archive.getnames()
