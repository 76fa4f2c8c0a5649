"""What `certs init` issues is accepted by the programs that it is for, and nothing else is."""

from __future__ import annotations

import shutil
import socket
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from gateway import certs, pki
from tests.peers import certificates_rig
from tests.peers.certificates_rig import (
    copy_for_client,
    fails,
    lay_out,
    serving,
    succeeds,
)
from tests.support.modern import Modern
from tests.support.peers import find as program

pytestmark = pytest.mark.peers

issued, server = certificates_rig.issued, certificates_rig.server

DNS_NAMES = ("gateway.test", "localhost")
ADDRESSES = ("192.0.2.7", "2001:db8::7", "127.0.0.1", "::1")

# argv: the folder, then server names. Both sides check the other's chain, strictly.
STRICT_HANDSHAKES = """
import ssl, sys
folder, *names = sys.argv[1:]

def context(protocol, role):
    made = ssl.SSLContext(protocol)
    made.verify_flags |= ssl.VERIFY_X509_STRICT
    made.load_verify_locations(folder + "/ca-cert.pem")
    made.load_cert_chain(folder + f"/{role}-cert.pem", folder + f"/{role}-key.pem")
    made.verify_mode = ssl.CERT_REQUIRED
    return made

def handshake(client_context, server_context, name):
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context.wrap_bio(to_client, to_server, server_hostname=name)
    server = server_context.wrap_bio(to_server, to_client, server_side=True)
    waiting = [client, server]
    while waiting:
        side = waiting.pop(0)
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            waiting.append(side)
    return server.getpeercert()

client_context = context(ssl.PROTOCOL_TLS_CLIENT, "client")
server_context = context(ssl.PROTOCOL_TLS_SERVER, "server")
for name in names:
    assert handshake(client_context, server_context, name)["subject"] == ((("commonName", "vm1"),),)
refused = [
    (client_context, server_context, "other.test", "mismatch"),
    # The one's certificate in the other's place.
    (context(ssl.PROTOCOL_TLS_CLIENT, "server"), server_context, names[0], "purpose"),
    (client_context, context(ssl.PROTOCOL_TLS_SERVER, "client"), names[0], "purpose"),
]
for client, server, name, why in refused:
    try:
        handshake(client, server, name)
    except ssl.SSLCertVerificationError as error:
        assert why in str(error), error
    else:
        raise AssertionError(f"not refused: {why}")
"""


# ---------------------------------------------------------------- NBD servers and clients


@pytest.mark.parametrize("client", ["nbdinfo", "qemu_img", "nbd_client_list"])
def test_the_printed_lines_work(
    client: str, server: tuple[str, Path], issued: certs.Issued, tmp_path: Path
) -> None:
    program({"qemu_img": "qemu-img", "nbd_client_list": "nbd-client"}.get(client, client))
    three = copy_for_client(tmp_path / "the client's", issued.directory)
    with serving(server, issued.directory) as port:
        for folder in (issued.directory, three):
            for host in ("localhost", "127.0.0.1"):
                output = succeeds(getattr(certs.client_commands(folder, host, port), client))
                expected = {"nbdinfo": "with TLS", "qemu_img": "1 MiB", "nbd_client_list": ""}
                assert expected[client] in output


# No nbdinfo here: with an address in brackets libnbd 1.14 sends it as the server name (SNI), which
# the standard forbids and GnuTLS, so both these servers, refuses.
@pytest.mark.parametrize("client", ["qemu_img", "nbd_client_list"])
def test_the_printed_lines_work_over_ipv6(
    client: str, server: tuple[str, Path], issued: certs.Issued
) -> None:
    program({"qemu_img": "qemu-img", "nbd_client_list": "nbd-client"}[client])
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 loopback address: {error}")
    with serving(server, issued.directory, "::1") as port:
        succeeds(getattr(certs.client_commands(issued.directory, "::1", port), client))


def test_nbd_client_gets_as_far_as_the_kernel(
    server: tuple[str, Path], issued: certs.Issued
) -> None:
    """Attaching needs a kernel with NBD; the line's syntax and its TLS show before that."""
    program("nbd-client")
    with serving(server, issued.directory) as port:
        line = certs.client_commands(issued.directory, "localhost", port).nbd_client
        nowhere = line.replace("/dev/nbd0", "/dev/null")
        assert "size = 1MB" in fails(nowhere)


@pytest.mark.parametrize("client", ["nbdinfo", "qemu_img", "nbd_client_list"])
def test_a_server_of_another_authority_is_refused(
    client: str, server: tuple[str, Path], issued: certs.Issued, tmp_path: Path
) -> None:
    program({"qemu_img": "qemu-img", "nbd_client_list": "nbd-client"}.get(client, client))
    wrong = copy_for_client(tmp_path / "wrong", issued.directory)
    shutil.copy(certs.init(tmp_path / "other").ca.cert, wrong)
    with serving(server, issued.directory) as port:
        fails(getattr(certs.client_commands(wrong, "localhost", port), client))
        succeeds(getattr(certs.client_commands(issued.directory, "localhost", port), client))


@pytest.mark.parametrize("client", ["nbdinfo", "qemu_img", "nbd_client_list"])
def test_a_server_of_another_name_is_refused(
    client: str, server: tuple[str, Path], tmp_path: Path
) -> None:
    program({"qemu_img": "qemu-img", "nbd_client_list": "nbd-client"}.get(client, client))
    authority = pki.CertificateAuthority.create("nbd-gateway CA test")
    folder = lay_out(tmp_path / "tls", authority, "server", authority.issue_server(["gw.test"]))
    lay_out(folder, authority, "client", authority.issue_client("vm1"))
    with serving(server, folder) as port:
        line = getattr(certs.client_commands(folder, "localhost", port), client)
        fails(line)
        if client == "nbd_client_list":  # the one of the three that can be told another name
            succeeds(line.replace("-tlshostname localhost", "-tlshostname gw.test"))


@pytest.mark.parametrize("client", ["nbdinfo", "qemu_img"])
def test_a_client_of_another_authority_or_none_is_refused(
    client: str, server: tuple[str, Path], issued: certs.Issued, tmp_path: Path
) -> None:
    program({"qemu_img": "qemu-img"}.get(client, client))
    other = certs.init(tmp_path / "other").directory
    shutil.copy(issued.directory / "ca-cert.pem", other)
    none = copy_for_client(tmp_path / "none", issued.directory, certificate=False)
    with serving(server, issued.directory) as port:
        for folder in (other, none):
            fails(getattr(certs.client_commands(folder, "localhost", port), client))
        succeeds(getattr(certs.client_commands(issued.directory, "localhost", port), client))


def test_a_revoked_client_is_refused(server: tuple[str, Path], tmp_path: Path) -> None:
    program("nbdinfo")
    authority = pki.CertificateAuthority.create("nbd-gateway CA test")
    host = authority.issue_server(["localhost"])
    good, bad = authority.issue_client("good"), authority.issue_client("bad")
    folder = lay_out(tmp_path / "server", authority, "server", host)
    (folder / "ca-crl.pem").write_bytes(authority.revoke_list([bad.certificate.serial_number]))
    with serving(server, folder) as port:
        for name, credential, verdict in (("bad", bad, fails), ("good", good, succeeds)):
            theirs = lay_out(tmp_path / name, authority, "client", credential)
            verdict(certs.client_commands(theirs, "localhost", port).nbdinfo)


# ---------------------------------------------------------------- verifiers


def test_certtool_verifies(issued: certs.Issued, tmp_path: Path) -> None:
    certtool = program("certtool")
    verify = [certtool, "--verify", "--load-ca-certificate", issued.ca.cert, "--infile"]
    server_auth = ("--verify-purpose", "1.3.6.1.5.5.7.3.1")
    client_auth = ("--verify-purpose", "1.3.6.1.5.5.7.3.2")
    for name in (*DNS_NAMES, "any.wild.test"):
        succeeds([*verify, issued.server.cert, "--verify-hostname", name, *server_auth])
    succeeds([*verify, issued.client.cert, *client_auth])
    fails([*verify, issued.server.cert, "--verify-hostname", "other.test", *server_auth])
    fails([*verify, issued.server.cert, *client_auth])
    fails([*verify, issued.client.cert, *server_auth])
    other = certs.init(tmp_path / "other")
    fails([*verify, other.client.cert, *client_auth])


def test_openssl_verifies(issued: certs.Issued, tmp_path: Path) -> None:
    verify = [program("openssl"), "verify", "-x509_strict", "-CAfile", issued.ca.cert]
    for name in (*DNS_NAMES, "any.wild.test"):
        succeeds([*verify, "-purpose", "sslserver", "-verify_hostname", name, issued.server.cert])
    for address in ADDRESSES:
        succeeds([*verify, "-purpose", "sslserver", "-verify_ip", address, issued.server.cert])
    succeeds([*verify, "-purpose", "sslclient", issued.client.cert])
    mismatch = fails([*verify, "-verify_hostname", "two.levels.wild.test", issued.server.cert])
    assert "hostname mismatch" in mismatch
    for purpose, cert in (("sslclient", issued.server.cert), ("sslserver", issued.client.cert)):
        # OpenSSL 1.1 wrote "unsupported", 3.0 writes "unsuitable certificate purpose".
        assert "certificate purpose" in fails([*verify, "-purpose", purpose, cert])
    other = certs.init(tmp_path / "other")
    assert "unable to get local issuer" in fails([*verify, other.server.cert])


def test_openssl_reads_the_revocation_list(tmp_path: Path) -> None:
    openssl = program("openssl")
    authority = pki.CertificateAuthority.create("nbd-gateway CA test")
    good, bad = authority.issue_client("good"), authority.issue_client("bad")
    stale = authority.revoke_list([], datetime.now(UTC) - timedelta(days=2), 1)
    for name, content in (
        ("ca.pem", authority.cert_pem),
        ("good.pem", good.cert_pem),
        ("bad.pem", bad.cert_pem),
        ("crl.pem", authority.revoke_list([bad.certificate.serial_number])),
        ("stale.pem", stale),
    ):
        (tmp_path / name).write_bytes(content)
    verify = [openssl, "verify", "-x509_strict", "-crl_check", "-CAfile", tmp_path / "ca.pem"]
    current, expired = (["-CRLfile", tmp_path / name] for name in ("crl.pem", "stale.pem"))
    succeeds([*verify, *current, tmp_path / "good.pem"])
    assert "certificate revoked" in fails([*verify, *current, tmp_path / "bad.pem"])
    assert "CRL has expired" in fails([*verify, *expired, tmp_path / "good.pem"])


STRICT_NAMES = (*DNS_NAMES, "any.wild.test", *ADDRESSES)


def test_python_verifies_strictly(issued: certs.Issued) -> None:
    script = ["-W", "error", "-c", STRICT_HANDSHAKES]
    succeeds([sys.executable, *script, str(issued.directory), *STRICT_NAMES])


def test_newer_python_verifies_strictly(modern: Modern, issued: certs.Issued) -> None:
    """From 3.13 on, Python's default context checks with VERIFY_X509_STRICT."""
    folder = shutil.copytree(issued.directory, modern.place / "strict")
    script = ["-W", "error", "-c", STRICT_HANDSHAKES]
    succeeds([*modern.python, *script, modern.seen(Path(folder)), *STRICT_NAMES])
