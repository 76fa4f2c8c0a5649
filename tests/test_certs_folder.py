"""gateway.certs.folder: what is issued and revoked in a folder that `init` made."""

from __future__ import annotations

import shutil
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from gateway import certs
from gateway.certs import Passwords
from gateway.certs.folder import Revocations, issue_client, issue_server, renew_crl, revoke
from gateway.pki import CertificateAuthority, KeyType, PkiError
from gateway.pki_keys import name_of
from tests.test_certs import LOCAL, snapshot

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read it, never write to it."""
    folder = tmp_path_factory.mktemp("made") / "tls"
    certs.init(folder, ["gw.example"], now=NOW)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "tls")
    return tmp_path / "tls"


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def san(path: Path) -> list[str]:
    kind = x509.SubjectAlternativeName
    try:
        found = certificate(path).extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return []
    return [str(each.value) for each in found]


def crls(folder: Path) -> list[x509.CertificateRevocationList]:
    pems = (folder / "ca-crl.pem").read_bytes().split(b"-----END X509 CRL-----\n")
    return [x509.load_pem_x509_crl(pem + b"-----END X509 CRL-----\n") for pem in pems[:-1]]


def serials(folder: Path) -> set[int]:
    (crl,) = crls(folder)
    return {each.serial_number for each in crl}


def number(crl: x509.CertificateRevocationList) -> int:
    return crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


# ---------------------------------------------------------------- issue


def test_a_client_gets_a_folder_of_its_own(folder: Path) -> None:
    handed = issue_client(folder, "vm 1", now=NOW)
    assert handed.folder == folder / "clients/vm 1"
    assert sorted(snapshot(handed.folder)) == ["ca-cert.pem", "client-cert.pem", "client-key.pem"]
    assert (handed.folder / "ca-cert.pem").read_bytes() == (folder / "ca-cert.pem").read_bytes()
    issued = certificate(handed.pair.cert)
    issued.verify_directly_issued_by(certificate(folder / "ca-cert.pem"))
    assert issued.subject.rfc4514_string() == "CN=vm 1"
    assert issued.not_valid_after_utc == NOW + 90 * DAY
    assert not handed.cut
    key = serialization.load_pem_private_key(handed.pair.key.read_bytes(), None)
    assert key.public_key() == issued.public_key()
    modes = [path.stat().st_mode & 0o777 for path in (handed.folder, handed.pair.key)]
    assert modes == [0o700, 0o600]


def test_names_key_type_lifetime_and_place(folder: Path, tmp_path: Path) -> None:
    handed = issue_client(
        folder,
        "a/b",
        sans=["spiffe://x/vm1", "me@example.com", "dns=vm1.example"],
        days=7,
        key_type=KeyType.ED25519,
        out=tmp_path / "out",
        now=NOW,
    )
    assert handed.folder == tmp_path / "out"
    assert san(handed.pair.cert) == ["spiffe://x/vm1", "me@example.com", "vm1.example"]
    assert list(handed.names) == san(handed.pair.cert)
    issued = certificate(handed.pair.cert)
    assert name_of(issued.public_key()) == "ed25519"
    assert issued.not_valid_after_utc == NOW + 7 * DAY


@pytest.mark.parametrize("name", ["a/b", "../x", ".", "..", ".hidden", "/etc", "", "a\nb", "a\0b"])
def test_a_clients_name_never_leads_out_of_the_folder(name: str, folder: Path) -> None:
    before = snapshot(folder.parent)
    with pytest.raises(PkiError, match="name"):
        issue_client(folder, name)
    assert snapshot(folder.parent) == before


def test_nothing_is_replaced_without_force(folder: Path) -> None:
    first = issue_client(folder, "vm1", now=NOW)
    before = snapshot(folder)
    with pytest.raises(PkiError, match=r"already has client-key\.pem.*--force"):
        issue_client(folder, "vm1")
    with pytest.raises(PkiError, match=r"already has server-key\.pem.*--force"):
        issue_server(folder)
    assert snapshot(folder) == before
    second = issue_client(folder, "vm1", force=True, now=NOW)
    assert second.pair.sha256 != first.pair.sha256
    changed = {name for name, content in snapshot(folder).items() if before[name] != content}
    assert changed == {"clients/vm1/client-cert.pem", "clients/vm1/client-key.pem"}


def test_the_first_client_is_renewed_in_the_folder_itself(folder: Path) -> None:
    before = snapshot(folder)
    issue_client(folder, "client", out=folder, force=True, now=NOW)
    changed = {name for name, content in snapshot(folder).items() if before[name] != content}
    assert changed == {"client-cert.pem", "client-key.pem"}


def test_a_server_certificate_is_renewed_with_its_names(folder: Path) -> None:
    issue_server(folder, ["a.example"], sans=["uri=spiffe://x/gw"], force=True, now=NOW)
    former = certificate(folder / "server-cert.pem")
    names = ["a.example", *LOCAL, "spiffe://x/gw"]
    assert san(folder / "server-cert.pem") == names
    handed = issue_server(folder, days=10, key_type=KeyType.EC_P384, force=True, now=NOW)
    assert san(handed.pair.cert) == names
    renewed = certificate(handed.pair.cert)
    assert renewed.not_valid_after_utc == NOW + 10 * DAY
    assert renewed.public_key() != former.public_key()
    assert name_of(renewed.public_key()) == "ec-p384"


def test_a_server_elsewhere(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PkiError, match="needs a name"):
        issue_server(folder, out=tmp_path / "two")
    handed = issue_server(folder, ["two.example"], out=tmp_path / "two", now=NOW)
    assert sorted(snapshot(handed.folder)) == ["ca-cert.pem", "server-cert.pem", "server-key.pem"]
    assert san(handed.pair.cert) == ["two.example", *LOCAL]


def test_a_former_server_certificate_without_names(folder: Path) -> None:
    shutil.copy(folder / "client-cert.pem", folder / "server-cert.pem")
    with pytest.raises(PkiError, match="no names to take over"):
        issue_server(folder, force=True)


def test_a_certificate_that_ends_with_its_ca_says_so(folder: Path) -> None:
    handed = issue_client(folder, "vm1", days=5000, now=NOW)
    assert handed.cut
    assert handed.pair.not_after == NOW + 3650 * DAY


def test_passphrases(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    certs.init(folder, passwords=Passwords(b"ca", b"server"))
    before = snapshot(folder)
    for wrong, why in (
        (None, "is encrypted: give the passphrase with --ca-password-file"),
        (b"x", "--ca-password-file: not the passphrase of"),
    ):
        with pytest.raises(PkiError, match=why):
            issue_client(folder, "vm1", passwords=Passwords(wrong))
        with pytest.raises(PkiError, match=why):
            renew_crl(folder, password=wrong)
    assert snapshot(folder) == before
    handed = issue_client(folder, "vm1", passwords=Passwords(b"ca", b"client"))
    serialization.load_pem_private_key(handed.pair.key.read_bytes(), b"client")
    renew_crl(folder, password=b"ca")


# ---------------------------------------------------------------- a folder that is not as it should


def test_the_authoritys_key_is_elsewhere(folder: Path) -> None:
    shutil.rmtree(folder / "ca")
    for make in (lambda: issue_client(folder, "c"), lambda: issue_server(folder, force=True)):
        with pytest.raises(PkiError, match=r"ca/ca-key\.pem is not there.*--dir"):
            make()
    with pytest.raises(PkiError, match=r"ca/ca-key\.pem is not there"):
        renew_crl(folder)
    assert "ca-crl.pem" not in snapshot(folder)


def test_the_authoritys_certificate_is_of_another(folder: Path, tmp_path: Path) -> None:
    shutil.copy(certs.init(tmp_path / "other").ca.cert, folder)
    with pytest.raises(PkiError, match=r"ca-cert\.pem has no certificate of the key in"):
        issue_client(folder, "c")
    (folder / "ca-cert.pem").unlink()
    with pytest.raises(PkiError, match=r"ca-cert\.pem: No such file"):
        issue_client(folder, "c")
    shutil.copy(folder / "client-cert.pem", folder / "ca-cert.pem")
    shutil.copy(folder / "client-key.pem", folder / "ca/ca-key.pem")
    with pytest.raises(PkiError, match=r"ca-cert\.pem: not the certificate of a CA"):
        issue_client(folder, "c")


def test_with_two_authorities_the_one_of_the_key_signs(folder: Path, tmp_path: Path) -> None:
    """As while one takes over from the other: whom to trust is both, in either order."""
    other = certs.init(tmp_path / "other").ca.cert.read_bytes()
    own = (folder / "ca-cert.pem").read_bytes()
    for both in (own + other, other + own):
        (folder / "ca-cert.pem").write_bytes(both)
        handed = issue_client(folder, "vm1", force=True, now=NOW)
        (tmp_path / "own.pem").write_bytes(own)
        authority = certificate(tmp_path / "own.pem")
        certificate(handed.pair.cert).verify_directly_issued_by(authority)
        assert (handed.folder / "ca-cert.pem").read_bytes() == both


# ---------------------------------------------------------------- revoke


def test_the_first_list_is_empty(folder: Path) -> None:
    done = renew_crl(folder, now=NOW)
    assert isinstance(done, Revocations)
    (crl,) = crls(folder)
    assert (len(crl), len(done.entries), done.added) == (0, 0, ())
    assert done.next_update == crl.next_update_utc == NOW + 30 * DAY
    assert (folder / "ca-crl.pem").stat().st_mode & 0o777 == 0o644


def test_what_is_revoked_stays_revoked(folder: Path) -> None:
    """With its date and its name, whatever comes after; and the number rises each time."""
    numbers = []
    entries = []
    for day, name in enumerate(("vm1", "vm2", "vm3")):
        handed = issue_client(folder, name, now=NOW)
        done = revoke(folder, [handed.pair.cert], now=NOW + day * DAY)
        (added,) = done.added
        assert added.whose == f"CN={name}"
        assert added.serial == certificate(handed.pair.cert).serial_number
        entries.append(added)
        assert list(done.entries) == entries
        numbers.append(done.number)
        (crl,) = crls(folder)
        assert {each.serial_number: each.revocation_date_utc for each in crl} == {
            each.serial: each.since for each in entries
        }
        assert number(crl) == done.number
    again = revoke(folder, [handed.pair.cert], now=NOW + 9 * DAY)
    renewed = renew_crl(folder, now=NOW + 9 * DAY)
    backwards = renew_crl(folder, now=NOW - 9 * DAY)  # the clock was set back
    for done in (again, renewed, backwards):
        assert done.added == ()
        assert list(done.entries) == entries
        numbers.append(done.number)
    assert numbers == sorted(set(numbers))


def test_several_at_once_by_file_and_by_serial_number(folder: Path) -> None:
    file = folder / "client-cert.pem"
    done = revoke(folder, [file, file], [77, 77, certificate(file).serial_number], now=NOW)
    assert serials(folder) == {77, certificate(file).serial_number}
    assert len(done.added) == len(done.entries) == 2


def test_a_list_lasts_as_long_as_the_one_before(folder: Path) -> None:
    def lasts(done: Revocations, since: datetime) -> timedelta:
        return done.next_update - since

    assert lasts(renew_crl(folder, now=NOW, days=100), NOW) == 100 * DAY
    assert lasts(renew_crl(folder, now=NOW + DAY), NOW + DAY) == 100 * DAY
    assert lasts(revoke(folder, serials=[5], now=NOW), NOW) == 100 * DAY
    assert lasts(revoke(folder, serials=[6], now=NOW, days=3), NOW) == 3 * DAY
    assert lasts(renew_crl(folder, now=NOW), NOW) == 3 * DAY


@pytest.mark.parametrize("lost", ["ca/revoked", "ca-crl.pem"])
def test_either_record_makes_up_for_the_other(lost: str, folder: Path) -> None:
    revoke(folder, [folder / "client-cert.pem"], now=NOW)
    revoke(folder, serials=[5], now=NOW + DAY)
    before = {each.serial_number: each.revocation_date_utc for each in crls(folder)[0]}
    (folder / lost).unlink()
    done = renew_crl(folder, now=NOW + 2 * DAY)
    assert {each.serial_number: each.revocation_date_utc for each in crls(folder)[0]} == before
    assert {each.serial: each.since for each in done.entries} == before
    assert {each.serial: each.since for each in renew_crl(folder).entries} == before


def test_revocations_at_the_same_time_are_all_kept(folder: Path) -> None:
    threads = [
        threading.Thread(target=revoke, args=(folder, [], [serial])) for serial in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert serials(folder) == set(range(1, 9))


@pytest.fixture
def other(tmp_path: Path) -> certs.Issued:
    return certs.init(tmp_path / "other", now=NOW)


def test_only_what_this_authority_issued_can_be_revoked(
    folder: Path, other: certs.Issued, tmp_path: Path
) -> None:
    renew_crl(folder, now=NOW)
    before = snapshot(folder)
    (tmp_path / "text").write_text("no PEM")
    for path, why in (
        (other.client.cert, "was not issued by the CA in"),
        (folder / "ca-cert.pem", r"is a CA: take it out of ca-cert\.pem instead"),
        (folder / "client-key.pem", "no certificate in it"),
        (tmp_path / "text", "no PEM in it"),
        (tmp_path / "nowhere", "No such file"),
    ):
        with pytest.raises(PkiError, match=why):
            revoke(folder, [folder / "client-cert.pem", path])
    own = certificate(folder / "ca-cert.pem").serial_number
    for serial in (0, -1, own):
        with pytest.raises(PkiError, match="not that of a certificate that the CA issued"):
            revoke(folder, [], [5, serial])
    assert snapshot(folder) == before


def test_a_namesake_of_the_authority_is_another(folder: Path, tmp_path: Path) -> None:
    own = certificate(folder / "ca-cert.pem").subject.rfc4514_string().removeprefix("CN=")
    namesake = CertificateAuthority.create(own)
    (tmp_path / "c.pem").write_bytes(namesake.issue_client("c").cert_pem)
    with pytest.raises(PkiError, match="was not issued by the CA in"):
        revoke(folder, [tmp_path / "c.pem"])
    (folder / "ca-crl.pem").write_bytes(namesake.revoke_list([]))
    with pytest.raises(PkiError, match="in the name of this CA that it did not sign"):
        renew_crl(folder)


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("0x5 CN=vm1", "line 2"),
        ("5 2030-01-02T03:04:05Z", "line 2"),
        ("0x5", "line 2"),
        ("0xg 2030-01-02T03:04:05Z", "line 2"),
        ("0x5 2030-13-02T03:04:05Z", "line 2"),
        ("0x5 2030-01-02T03:04:05", "line 2"),
        ("# fine\n\n0x7 2030-01-02T03:04:05Z CN=x\n<<<<<<< mine", "line 5"),
    ],
)
def test_a_record_that_is_not_understood_is_an_error(line: str, where: str, folder: Path) -> None:
    """What was passed over would be good again."""
    (folder / "ca/revoked").write_text(f"# Revoked\n{line}\n")
    before = snapshot(folder)
    with pytest.raises(PkiError, match=f"ca/revoked, {where}: not a serial number"):
        renew_crl(folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("content", [b"", b"text", b"-----BEGIN X509 CRL-----\nAAAA\n"])
def test_a_list_that_is_not_understood_is_an_error(content: bytes, folder: Path) -> None:
    (folder / "ca-crl.pem").write_bytes(content)
    before = snapshot(folder)
    with pytest.raises(PkiError, match=r"ca-crl\.pem: "):
        revoke(folder, serials=[5])
    assert snapshot(folder) == before


# ---------------------------------------------------------------- two authorities


def test_the_list_of_another_authority_is_kept_while_it_is_trusted(
    folder: Path, other: certs.Issued
) -> None:
    renew_crl(other.directory, now=NOW)
    theirs = (other.directory / "ca-crl.pem").read_bytes()
    with (folder / "ca-cert.pem").open("ab") as file:
        file.write(other.ca.cert.read_bytes())
    done = renew_crl(folder, now=NOW)
    assert done.missing == (f"CN={other.ca.name}",)
    with (folder / "ca-crl.pem").open("ab") as file:
        file.write(theirs)
    done = revoke(folder, serials=[5], now=NOW)
    assert (done.missing, done.dropped) == ((), ())
    ours, kept = crls(folder)
    assert kept.public_bytes(serialization.Encoding.PEM) == theirs
    assert [each.serial_number for each in ours] == [5]
    # Appended anew after it was renewed: the later one is kept, wherever it stands.
    latest = renew_crl(other.directory, now=NOW + DAY).number
    with (folder / "ca-crl.pem").open("ab") as file:
        file.write((other.directory / "ca-crl.pem").read_bytes())
        file.write(theirs)
    renew_crl(folder, now=NOW)
    assert [number(crl) for crl in crls(folder)[1:]] == [latest]


def test_the_list_of_an_authority_that_is_gone_is_left_out(
    folder: Path, other: certs.Issued
) -> None:
    renew_crl(other.directory, now=NOW)
    shutil.copy(other.directory / "ca-crl.pem", folder)
    done = renew_crl(folder, now=NOW)
    assert done.dropped == (f"CN={other.ca.name}",)
    assert len(crls(folder)) == 1
