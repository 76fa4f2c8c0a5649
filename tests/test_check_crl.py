"""gateway.check: verdicts about revocation lists."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.check_rig import CA_USAGE, DAY, Folder, Pair, make, make_ca, make_crl

OTHER = ec.generate_private_key(ec.SECP256R1())
DELTA = x509.DeltaCRLIndicator(6)
PART = x509.IssuingDistributionPoint(
    full_name=[x509.UniformResourceIdentifier("http://ca.example/crl")],
    relative_name=None,
    only_contains_user_certs=True,
    only_contains_ca_certs=False,
    only_some_reasons=None,
    indirect_crl=False,
    only_contains_attribute_certs=False,
)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "tls")


def test_none_is_said(folder: Folder) -> None:
    assert folder.check().has("ok", "--crl: there is none: a certificate is good until it expires")


def test_a_good_one(folder: Folder) -> None:
    folder.write(folder.crl, make_crl(folder.ca, [make("gone", folder.ca).certificate]))
    found = folder.check()
    assert found.code == 0, str(found)
    assert found.has("ok", r"crl: CRL 7, 1 entry, of CN=ca: until \d{4}-\d\d-\d\d, 29 days")


Content = Callable[[Folder], list[bytes]]
LISTS: list[tuple[str, Content, str, str]] = [
    ("empty", lambda f: [b""], "bad", "no CRL in PEM format"),
    ("certificates", lambda f: [f.ca.pem], "bad", "no CRL in PEM format"),
    ("cut off", lambda f: [make_crl(f.ca)[:-20]], "bad", "or one that is cut off"),
    ("second cut off", lambda f: [make_crl(f.ca), make_crl(f.ca)[:99]], "bad", "cut off"),
    (
        "broken",
        lambda f: [b"-----BEGIN X509 CRL-----\nMAAA\n-----END X509 CRL-----\n"],
        "bad",
        "CRL 1 of 1 is broken",
    ),
    (
        "stale",
        lambda f: [make_crl(f.ca, begin=-9 * DAY, end=-timedelta(seconds=1))],
        "bad",
        r"ended on .*, and nobody can enter: issue a new one \(nbd-gateway certs crl\)",
    ),
    (
        "future",
        lambda f: [make_crl(f.ca, begin=DAY)],
        "bad",
        "not valid before .*, and until then nobody can enter: is the clock right",
    ),
    ("ends soon", lambda f: [make_crl(f.ca, begin=-24 * DAY, end=6 * DAY)], "warn", "in [56] days"),
    ("short-lived", lambda f: [make_crl(f.ca, begin=-DAY, end=2 * DAY)], "ok", "until .*, 1 days"),
    (
        "short-lived, ends soon",
        lambda f: [make_crl(f.ca, begin=-4 * DAY, end=DAY)],
        "warn",
        "in [01] days: issue",
    ),
    ("foreign", lambda f: [make_crl(make_ca("other"))], "bad", "of CN=other, which is none of the"),
    (
        "forged",
        lambda f: [make_crl(f.ca, key=OTHER)],
        "bad",
        "says that it is of CN=ca, and is not signed with the key of that CA",
    ),
    (
        "second forged",
        lambda f: [make_crl(f.ca), make_crl(f.ca, key=OTHER)],
        "bad",
        "is not signed with the key of that CA",
    ),
    (
        "two",
        lambda f: [make_crl(f.ca), make_crl(f.ca)],
        "warn",
        "several CRLs of CN=ca: only",
    ),
    (
        "an old one too",
        lambda f: [make_crl(f.ca, begin=-9 * DAY, end=-DAY), make_crl(f.ca)],
        "ok",
        "CRL 7, 0 entries, of CN=ca: until",
    ),
    (
        "own certificate",
        lambda f: [make_crl(f.ca, [f.server.certificate])],
        "bad",
        "CN=server, which is in use here, was revoked on .*: replace it",
    ),
    ("no number", lambda f: [make_crl(f.ca, extra=())], "ok", "CRL without a number, 0 entries,"),
    ("delta", lambda f: [make_crl(f.ca, extra=[DELTA])], "bad", "a delta CRL"),
    ("partial", lambda f: [make_crl(f.ca, extra=[PART])], "bad", "about some certificates only"),
]


@pytest.mark.parametrize(
    ("content", "level", "text"), [pytest.param(*one[1:], id=one[0]) for one in LISTS]
)
def test_crl(content: Content, level: str, text: str, folder: Folder) -> None:
    folder.write(folder.crl, *content(folder))
    found = folder.check()
    assert found.has(level, text), str(found)
    if level == "ok":
        assert found.code == 0, str(found)


def test_missing(folder: Folder) -> None:
    found = folder.check(tls={"crl": folder.crl})
    assert found.has("bad", "crl: cannot be read: No such file or directory"), str(found)


def test_one_for_each_ca(folder: Folder) -> None:
    other = make_ca("other")
    folder.write(folder.client_ca, folder.ca.pem, other.pem)
    folder.write(folder.crl, make_crl(folder.ca))
    assert folder.check().has("bad", "no CRL of CN=other, a CA of --client-ca: none of its clients")
    folder.write(folder.crl, make_crl(folder.ca), make_crl(other))
    found = folder.check()
    assert found.code == 0, str(found)
    assert found.has("ok", "CRL 7, 0 entries, of CN=other")


def test_among_the_cas(folder: Folder) -> None:
    """OpenSSL takes lists from there too, and they count for all CAs then."""
    folder.write(folder.client_ca, folder.ca.pem, make_crl(folder.ca))
    found = folder.check()
    assert found.has("ok", "ca: CRL 7, 0 entries, of CN=ca"), str(found)
    folder.write(folder.client_ca, folder.ca.pem, make_crl(folder.ca, end=-timedelta(seconds=1)))
    assert folder.check().has("bad", "ca: CRL 7, .* nobody can enter")


def test_ca_that_may_not_sign_lists(folder: Folder) -> None:
    ca = make_ca("ca", usage=[one for one in CA_USAGE if one != "crl_sign"])
    folder.write(folder.client_ca, ca.pem)
    folder.write(folder.crl, make_crl(ca))
    assert folder.check().has("bad", "CN=ca may not sign CRLs")


def test_ca_without_key_usage_signs_lists(folder: Folder) -> None:
    ca = make_ca("ca", usage=None)
    folder.write(folder.client_ca, ca.pem)
    folder.write(folder.crl, make_crl(ca))
    assert folder.check().has("ok", "CRL 7, 0 entries, of CN=ca")


def test_ca_whose_key_is_no_point_of_its_curve(folder: Folder) -> None:
    public = folder.ca.certificate.public_key()
    point = public.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    der = folder.ca.certificate.public_bytes(Encoding.DER).replace(point, b"\4" + bytes(64))
    folder.write(folder.client_ca, x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM))
    folder.write(folder.crl, make_crl(folder.ca))
    found = folder.check()
    assert found.has("bad", "crl: .*is not signed with the key of that CA"), str(found)
    assert found.has("bad", "ca: cannot be judged: ValueError"), str(found)
    assert found.has("bad", "^bad   start: ")


def test_an_intermediate_ca_that_is_revoked(folder: Folder) -> None:
    middle: Pair = make_ca("middle", folder.ca)
    folder.write(folder.client_ca, folder.ca.pem, middle.pem)
    folder.write(folder.crl, make_crl(folder.ca, [middle.certificate]), make_crl(middle))
    assert folder.check().has("bad", "CN=middle, which is in use here, was revoked on")


def test_the_same_serial_of_another_ca_is_not_ours(folder: Folder) -> None:
    other = make_ca("other")
    folder.write(folder.client_ca, folder.ca.pem, other.pem)
    lists = make_crl(folder.ca), make_crl(other, [folder.server.certificate])
    folder.write(folder.crl, *lists)
    found = folder.check()
    assert found.code == 0, str(found)
