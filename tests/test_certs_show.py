"""gateway.certs.show: what is printed about files, and what is said to end soon."""

from __future__ import annotations

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from gateway import certs
from gateway.access import Rule
from gateway.certs.folder import issue_client, revoke
from gateway.certs.show import expiring, qemu_dn, rules_for, show
from gateway.identity import Identity
from gateway.pki import CertificateAuthority, PkiError, general_name

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never write to it."""
    folder = tmp_path_factory.mktemp("made") / "tls"
    certs.init(folder, ["gw.example"], now=NOW)
    sans = ["spiffe://x/vm1", "me@example.com", "dns=vm1.example", "ip=::1"]
    issue_client(folder, "vm1", sans=sans, now=NOW)
    revoke(folder, serials=[0xABC], now=NOW)
    return folder


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create("test CA", now=NOW)


def identity(certificate: x509.Certificate) -> Identity:
    return Identity.of_chain((certificate.public_bytes(Encoding.DER),))


# ---------------------------------------------------------------- show


def test_a_client(folder: Path) -> None:
    path = folder / "clients/vm1/client-cert.pem"
    certificate = x509.load_pem_x509_certificate(path.read_bytes())
    text = show(path, NOW + 40 * DAY)
    assert text.startswith(f"{path}: certificate\n")
    for line in (
        "subject  CN=vm1",
        "names    URI spiffe://x/vm1, email me@example.com, DNS vm1.example, IP ::1",
        "for      clientAuth (a TLS client)",
        "valid    2030-01-02 02:04 UTC to 2030-04-02 03:04 UTC, 50 days left",
        "key      ec-p256",
        f"serial   {certificate.serial_number:#x}",
        "  identity=CN=vm1",
    ):
        assert f"\n  {line}\n" in text
    rules = re.findall(r"^    ((?:sha256|spki|cn|dns|uri|email|dn)=.*)$", text, re.MULTILINE)
    assert [rule.partition("=")[0] for rule in rules] == [
        *("sha256", "spki", "cn", "dns", "uri", "email", "dn")
    ]
    assert all(Rule.parse("--allow", rule).matches(identity(certificate)) for rule in rules)


def test_a_server_an_authority_and_a_list(folder: Path) -> None:
    server = show(folder / "server-cert.pem", NOW)
    assert "  names    DNS gw.example, DNS localhost, IP 127.0.0.1, IP ::1\n" in server
    assert "  for      serverAuth (a TLS server)\n" in server
    ca = show(folder / "ca-cert.pem", NOW)
    assert "  for      signing certificates (a CA)\n" in ca
    assert "  names    none\n" in ca
    crl = show(folder / "ca-crl.pem", NOW + 29 * DAY)
    for line in (
        "ca-crl.pem: CRL",
        "valid    2030-01-02 02:04 UTC to 2030-02-01 03:04 UTC, 1 day left",
        "revoked  1",
        "0xabc since 2030-01-02 03:04 UTC",
    ):
        assert line in crl


@pytest.mark.parametrize(
    ("when", "said"),
    [
        (NOW - 2 * HOUR, "NOT YET VALID"),
        (NOW + 90 * DAY - 5 * HOUR, "5 hours left"),
        (NOW + 90 * DAY - timedelta(minutes=90), "1 hour left"),
        (NOW + 90 * DAY, "EXPIRED 0 hours ago"),
        (NOW + 92 * DAY, "EXPIRED 2 days ago"),
    ],
)
def test_how_long_it_lasts(when: datetime, said: str, folder: Path) -> None:
    assert f", {said}\n" in show(folder / "client-cert.pem", when)


def test_a_key_is_named_and_never_printed(folder: Path, tmp_path: Path) -> None:
    key = folder / "client-key.pem"
    secret = key.read_text().splitlines()[1]
    assert show(key, NOW) == f"{key}: private key\n  ec-p256, not encrypted\n"
    both = tmp_path / "both.pem"
    both.write_bytes((folder / "client-cert.pem").read_bytes() + key.read_bytes())
    text = show(both, NOW)
    assert "certificate 1 of 2" in text
    assert "private key 2 of 2" in text
    assert secret not in text
    certs.init(tmp_path / "locked", passwords=certs.Passwords(b"a", b"b"))
    assert "encrypted private key\n  encrypted\n" in show(tmp_path / "locked/server-key.pem", NOW)


def test_chains(folder: Path, authority: CertificateAuthority, tmp_path: Path) -> None:
    def said(*names: str) -> str:
        path = tmp_path / "chain.pem"
        path.write_bytes(b"".join((folder / name).read_bytes() for name in names))
        return show(path, NOW).splitlines()[-1]

    assert said("server-cert.pem", "ca-cert.pem").startswith("A chain:")
    wrong = said("ca-cert.pem", "server-cert.pem")
    assert wrong == "NOT a chain: certificate 1 is not signed by the one behind it."
    assert "set of CAs" in said("ca-cert.pem", "ca-cert.pem")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no PEM in it"),
        (b"\x30\x82", "no PEM in it"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n", "cut off or damaged"),
        (b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END X509 CRL-----\n", "cut off or damaged"),
        (b"-----BEGIN CERTIFICATE-----\nTm8=\n-----END CERTIFICATE-----\n", "number 1 in it"),
        (b"-----BEGIN X509 CRL-----\nTm8=\n-----END X509 CRL-----\n", "number 1 in it, X509 CRL"),
        (None, "No such file or directory"),
    ],
)
def test_files_that_cannot_be_shown(content: bytes | None, why: str, tmp_path: Path) -> None:
    path = tmp_path / "file.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PkiError, match=f"{path}: .*{why}") as caught:
        show(path, NOW)
    assert "\n" not in str(caught.value)


def hostile(authority: CertificateAuthority, *names: x509.NameAttribute) -> x509.Certificate:
    """A certificate as no tool of ours would make it."""
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder(
        *(authority.certificate.subject, x509.Name(names), key.public_key(), 5),
        *(NOW - DAY, NOW + DAY),
    )
    return builder.sign(authority.key, hashes.SHA256())


def test_names_that_would_disturb_a_terminal(
    authority: CertificateAuthority, tmp_path: Path
) -> None:
    names = [x509.NameAttribute(NameOID.COMMON_NAME, "a\x1b[2J\nidentity=CN=root\u202e")]
    path = tmp_path / "hostile.pem"
    path.write_bytes(hostile(authority, *names).public_bytes(Encoding.PEM))
    text = show(path, NOW)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert "\n  the gateway refuses it: control characters in its CN" in text
    assert "identity=" not in [line.strip()[:9] for line in text.splitlines()]


def test_a_damaged_extension_is_said(authority: CertificateAuthority, tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateBuilder(
        *(authority.certificate.subject, x509.Name([]), key.public_key(), 5),
        *(NOW - DAY, NOW + DAY),
    )
    broken = x509.UnrecognizedExtension(x509.ExtensionOID.SUBJECT_ALTERNATIVE_NAME, b"\xff")
    certificate = builder.add_extension(broken, False).sign(authority.key, hashes.SHA256())
    path = tmp_path / "broken.pem"
    path.write_bytes(certificate.public_bytes(Encoding.PEM))
    assert "\n  cannot be read: " in show(path, NOW)


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("name", ["vm1", "Jürgen, vm 1", 'a="b"', "a=b+c", "#1", "a\\b"])
def test_each_rule_means_this_client_and_no_other(
    name: str, authority: CertificateAuthority
) -> None:
    sans = [general_name(text) for text in ("uri=urn:a:b", "dns=a.example", "a@b.example")]
    this = identity(authority.issue_client(name, sans=sans).certificate)
    other = identity(authority.issue_client("other").certificate)
    rules = rules_for(this)
    assert [rule.partition("=")[0] for rule in rules] == [
        *("sha256", "spki", "cn", "dns", "uri", "email", "dn")
    ]
    for rule in rules:
        parsed = Rule.parse("--allow", rule)
        assert parsed.matches(this)
        assert not parsed.matches(other)


def test_a_name_with_an_asterisk_is_no_rule(authority: CertificateAuthority) -> None:
    """It would let in others, or be refused as a rule."""
    server = authority.issue_server(["*.example.com", "a.example.com"]).certificate
    rules = [rule.partition("=") for rule in rules_for(identity(server))]
    assert {kind: value for kind, _, value in rules}.keys() == {"sha256", "spki", "dns"}
    assert [value for kind, _, value in rules if kind == "dns"] == ["a.example.com"]


def test_a_name_as_qemu_has_it() -> None:
    """Held against QEMU itself in tests/peers."""
    made = [
        (NameOID.COUNTRY_NAME, "GB"),
        (NameOID.ORGANIZATION_NAME, "Ex, Müller"),
        (NameOID.EMAIL_ADDRESS, "a@b"),
        (NameOID.COMMON_NAME, "vm1"),
    ]
    name = x509.Name([x509.NameAttribute(*each) for each in made])
    assert qemu_dn(name) == "C=GB,O=Ex\\, Müller,EMAIL=a@b,CN=vm1"
    odd = x509.NameAttribute(x509.ObjectIdentifier("1.2.3"), "x")
    assert qemu_dn(x509.Name([odd])) is None


# ---------------------------------------------------------------- expiring


def ending(path: Path, days: float, now: datetime = NOW, crl_days: float = 0) -> list[str]:
    found = expiring([path], timedelta(days=days), timedelta(days=crl_days), now)
    return [each.line(now) for each in found]


def test_nothing_ends_soon(folder: Path) -> None:
    assert ending(folder, 89.9, crl_days=29.9) == []


def test_what_ends_within_the_time(folder: Path) -> None:
    """The soonest first. What was handed out counts too; the CA's many copies count once."""
    assert ending(folder, 90, crl_days=30) == [
        f"2030-02-01 expires in 30 days: {folder}/ca-crl.pem: CRL of {ca_name(folder)} "
        "(`certs crl` renews it)",
        f"2030-04-02 expires in 90 days: {folder}/client-cert.pem: certificate CN=client",
        f"2030-04-02 expires in 90 days: {folder}/clients/vm1/client-cert.pem: certificate CN=vm1",
    ]
    everything = ending(folder, 36500)
    assert [re.sub(r".*: certificate ", "", line) for line in everything] == [
        *("CN=client", "CN=vm1", "CN=gw.example"),
        ca_name(folder),
    ]


def ca_name(folder: Path) -> str:
    certificate = x509.load_pem_x509_certificate((folder / "ca-cert.pem").read_bytes())
    return certificate.subject.rfc4514_string()


def test_what_has_expired_is_still_said(folder: Path) -> None:
    lines = ending(folder / "client-cert.pem", 0, NOW + 100 * DAY)
    path = folder / "client-cert.pem"
    assert lines == [f"2030-04-02 expired 10 days ago: {path}: certificate CN=client"]
    assert ending(folder / "ca-crl.pem", 0, NOW + 31 * DAY) != []


def test_every_certificate_of_a_chain_counts(folder: Path, tmp_path: Path) -> None:
    chain = tmp_path / "chain.pem"
    names = ("server-cert.pem", "client-cert.pem")
    chain.write_bytes(b"".join((folder / name).read_bytes() for name in names))
    assert len(ending(chain, 100)) == 1
    assert len(ending(chain, 400)) == 2


def test_links_are_followed_and_what_they_left_behind_is_not(tmp_path: Path) -> None:
    """As Kubernetes lays out a mounted secret."""
    for version, days in (("..1", 1), ("..2", 50)):
        certs.init(tmp_path / "made" / version, client_days=days, now=NOW)
        mounted = tmp_path / "mount" / version
        mounted.mkdir(parents=True)
        (tmp_path / "made" / version / "client-cert.pem").rename(mounted / "tls.pem")
    (tmp_path / "mount/..data").symlink_to("..2")
    (tmp_path / "mount/tls.pem").symlink_to("..data/tls.pem")
    (tmp_path / "mount/loop").symlink_to(".")
    assert ending(tmp_path / "mount", 40) == []
    assert len(ending(tmp_path / "mount", 50)) == 1
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/linked").symlink_to(tmp_path / "mount")
    assert len(ending(tmp_path / "elsewhere", 50)) == 1


def test_silence_never_comes_from_looking_at_nothing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/only-key.pem").write_bytes(b"not even looked at")
    (tmp_path / "empty/.x.pem.new").write_bytes(b"of another run")
    (tmp_path / "dangling").mkdir()
    (tmp_path / "dangling/x.pem").symlink_to("nowhere")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/x.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    for path, why in (
        (tmp_path / "empty", "no certificate in it and no CRL: nothing to watch"),
        (folder / "client-key.pem", "nothing to watch"),
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "dangling", r"x\.pem: No such file"),
        (tmp_path / "damaged", r"x\.pem: a block in it is cut off"),
    ):
        with pytest.raises(PkiError, match=why):
            expiring([folder, path], DAY, DAY, NOW)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(0)
    (tmp_path / "ca.pem").write_bytes((folder / "ca-cert.pem").read_bytes())
    with pytest.raises(PkiError, match="closed: Permission denied"):
        expiring([tmp_path], DAY, DAY, NOW)
