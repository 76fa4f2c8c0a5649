"""Who is refused, what the client's own program prints then, and what the gateway's log says.

And nobody gets through to the upstream, not even to its socket, before TLS and the certificate.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.peers.bench import Bench, Front
from tests.support.peers import Client, check, run, said


@pytest.fixture
def front(bench: Bench) -> Front:
    return bench.gateway(bench.nbdkit("memory", "1M"))


@pytest.fixture
def without_our_ca(pki: Path, other_pki: Path, tmp_path: Path) -> Path:
    """A right certificate, but no CA that could vouch for the gateway."""
    directory = tmp_path / "without-our-ca"
    shutil.copytree(pki, directory, ignore=lambda *_: ["ca"])
    other_ca = (other_pki / "ca-cert.pem").read_text().partition("-----END CERTIFICATE-----")
    (directory / "ca-cert.pem").write_text("".join(other_ca[:2]) + "\n")
    return directory


@dataclass(frozen=True)
class Words:
    """What has to be in the output of each program, and in the log."""

    nbdinfo: str
    qemu_img: str
    nbd_client: str
    log: str


def refused(front: Front, client: Client, words: Words) -> None:
    for command, expected in (
        (["nbdinfo", client.uri], words.nbdinfo),
        (["qemu-img", "info", *client.qemu()], words.qemu_img),
        ([*client.nbd_client("-N", client.export), "-nonetlink", "/dev/null"], words.nbd_client),
    ):
        logged = len(front.gateway.log())
        done = run(*command)
        assert done.returncode != 0, f"{command[0]} got in: {said(done)}"
        assert expected in said(done), f"{command[0]} says:\n{said(done)}"
        front.gateway.wait_log(words.log, after=logged)
        front.gateway.wait_log(": closed: ", after=logged)


def test_plaintext_client(front: Front) -> None:
    hint = "this server speaks NBD over TLS only: use nbds://, tls-creds= or -certfile"
    words = Words(
        nbdinfo="opt_go request: Operation not supported",  # libnbd 1.14 prints no server's text
        qemu_img=f"TLS negotiation required before option 7 (go)\n"
        f"Did you forget a valid tls-creds?\nserver reported: {hint}",
        nbd_client=hint,
        log="closed: plaintext client",
    )
    refused(front, front.plain_client(), words)


def test_client_without_a_certificate(front: Front, no_certificate: Path) -> None:
    client = front.client(certificates=no_certificate)
    words = Words(
        nbdinfo="A TLS fatal alert has been received",
        qemu_img="Cannot read from TLS channel",
        nbd_client="client-cert.pem",  # it wants the file before it asks anybody
        log="closed: TLS handshake failed",
    )
    refused(front, client, words)
    assert "no_client_cert: it has no client certificate" in front.gateway.log()


def test_client_with_a_certificate_of_another_ca(front: Front, other_pki: Path) -> None:
    words = Words(
        nbdinfo="A TLS fatal alert has been received",
        qemu_img="Cannot read from TLS channel",
        nbd_client="Negotiation: ..",  # then it fails in one way or another: it takes no alert
        log="closed: TLS handshake failed .unknown_ca: its certificate is of another CA",
    )
    refused(front, front.client(certificates=other_pki), words)


def test_client_that_does_not_know_our_ca(front: Front, without_our_ca: Path) -> None:
    """It is the client that refuses, and the log says so."""
    client = front.client(certificates=without_our_ca)
    done = run("nbdinfo", client.uri)
    assert "Error in the certificate verification" in said(done)
    front.gateway.wait_log(r"TLS handshake failed .*does it know the CA of our certificate\?")


def test_gateway_under_a_name_that_its_certificate_lacks(bench: Bench) -> None:
    """127.0.0.2 is no address of the certificate. The client sees that, whatever we say."""
    front = bench.gateway(bench.nbdkit("memory", "1M"), listen="127.0.0.2:0")
    assert "Error in the certificate verification" in said(run("nbdinfo", front.client().uri))
    done = run("qemu-img", "info", *front.client().qemu())
    assert "does not match the hostname 127.0.0.2" in said(done)
    front.gateway.wait_log("closed: ")
    assert ": open: " not in front.gateway.log()


def test_unknown_export(front: Front) -> None:
    words = Words(
        nbdinfo="No such file or directory for export: nope",
        qemu_img="Requested export not available\n"
        "server reported: no such export here, or it is not yours to open",
        nbd_client="no such export here, or it is not yours to open",
        log="export 'nope': no such export here, or it is not yours to open",
    )
    refused(front, front.client("nope"), words)


def missing(front: Front) -> None:
    front.server.kill()
    front.server.socket.unlink()


def dead(front: Front) -> None:
    front.server.kill()


def no_socket(front: Front) -> None:
    missing(front)
    front.server.socket.write_text("not a socket")


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (missing, "no such socket: is the NBD server running?"),
        (dead, "connection refused: nobody listens on this socket any more"),
        (no_socket, "connection refused: nobody listens on this socket any more"),
    ],
)
def test_upstream_that_cannot_be_reached(
    front: Front, break_it: Callable[[Front], None], reason: str
) -> None:
    break_it(front)
    words = Words(
        nbdinfo="for the default export",
        qemu_img="server reported: the NBD server behind this gateway cannot be reached",
        nbd_client="the NBD server behind this gateway cannot be reached",
        log=f"WARNING .*upstream unavailable: {front.server.socket}: {reason[:-1]}",
    )
    refused(front, front.client(), words)


def test_upstream_that_starts_after_the_gateway(front: Front) -> None:
    missing(front)
    assert run("nbdinfo", front.client().uri).returncode != 0
    front.server.start()
    check("nbdinfo", front.client().uri)


def test_nothing_is_dialled_before_tls_and_certificate(
    bench: Bench, no_certificate: Path, other_pki: Path, tmp_path: Path
) -> None:
    # CVE-2019-14850
    log = tmp_path / "nbdkit.log"
    front = bench.gateway(bench.nbdkit("--filter=log", "memory", "1M", f"logfile={log}"))
    clients = [
        front.plain_client(),
        front.client(certificates=no_certificate),
        front.client(certificates=other_pki),
    ]
    commands = [
        command
        for client in clients
        for command in (
            ["nbdinfo", client.uri],
            ["nbdinfo", "--list", client.uri],
            ["nbdcopy", client.uri, "-"],
            ["nbdinfo", "--map", client.uri],
            ["qemu-img", "info", *client.qemu()],
            ["qemu-io", *client.qemu_object(), "-c", "read 0 512", *client.qemu()[-2:]],
            client.nbd_client("-l"),
        )
    ]
    assert len(commands) > 20
    for command in commands:
        assert run(*command).returncode != 0, command
    front.gateway.wait_log(rf"\[{len(commands)}\] .*closed: ")
    assert "connect" not in log.read_text().lower(), log.read_text()
    assert ": open: " not in front.gateway.log()
    check("nbdinfo", front.client().uri)
    assert log.read_text().count("...Preconnect ") == 1


def test_anonymous_clients_are_let_in_if_told_so(bench: Bench, no_certificate: Path) -> None:
    server = bench.nbdkit("memory", "1M")
    pem: list[str | Path] = [
        "--cert",
        bench.pki / "server-cert.pem",
        "--key",
        bench.pki / "server-key.pem",
    ]
    front = bench.gateway(server, *pem, "--allow-anonymous")
    check("nbdinfo", front.client(certificates=no_certificate).uri)
    assert run("nbdinfo", front.plain_client().uri).returncode != 0
    front.gateway.wait_log("WARNING .*anonymous")
    front.gateway.wait_log("open: .*, anonymous, ")


@pytest.mark.parametrize("oldest", ["1.2", "1.3"])
def test_tls_versions(bench: Bench, oldest: str) -> None:
    """nbd-client speaks no more than TLS 1.2, libnbd takes the best there is."""
    front = bench.gateway(bench.nbdkit("memory", "1M"), "--tls-min", oldest)
    check("nbdinfo", front.client().uri)
    front.gateway.wait_log("open: .*TLSv1.3")
    done = run(*front.client().nbd_client("-l"))
    assert (done.returncode == 0) is (oldest == "1.2"), said(done)
    if oldest == "1.3":
        front.gateway.wait_log("TLS handshake failed .tls_version: ")
