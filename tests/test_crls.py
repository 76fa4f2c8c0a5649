"""gateway.crls: which lists are taken, and whom they keep out. What is odd is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtensionOID, NameOID

from gateway.errors import Refusal, SettingsError
from gateway.pki import CertificateAuthority, Credential
from gateway.settings import Settings
from gateway.trust import Trust, load_trust
from tests import tls_rig
from tests.tls_rig import BOTH_VERSIONS, DAY, NOW, Files, Shake, shake

authority, client, files = tls_rig.authority, tls_rig.client, tls_rig.files  # the fixtures

Change = Callable[[x509.CertificateRevocationListBuilder], x509.CertificateRevocationListBuilder]


def load(files: Files, *crls: bytes) -> Trust:
    return load_trust(Settings("/up", files.settings(crl=files.put("ca-crl.pem", *crls))))


def crl_of(
    ca: Credential,
    change: Change = lambda builder: builder,
    begin: datetime = NOW - DAY,
    end: datetime = NOW + DAY,
    *,
    key: ec.EllipticCurvePrivateKey | None = None,
) -> bytes:
    builder = x509.CertificateRevocationListBuilder().issuer_name(ca.certificate.subject)
    builder = change(builder.last_update(begin).next_update(end))
    crl = builder.sign(key or ca.key, hashes.SHA256())  # type: ignore[arg-type]
    return crl.public_bytes(serialization.Encoding.PEM)


def entry(serial: int, *extensions: tuple[x509.ExtensionType, bool]) -> x509.RevokedCertificate:
    builder = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(NOW - DAY)
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    return builder.build()


class Line:
    """A root, a CA below it, and a client of that one."""

    def __init__(self) -> None:
        self.keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(3)]
        self.root = self._issue("root", 0, 0)
        self.middle = self._issue("middle", 1, 0)
        self.client = self._issue("deep", 2, 1)

    def _issue(self, name: str, key: int, signer: int) -> Credential:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        usage = dict.fromkeys(
            (
                *("digital_signature", "content_commitment", "key_encipherment"),
                *("data_encipherment", "key_agreement", "encipher_only", "decipher_only"),
            ),
            False,
        )
        is_ca = name != "deep"
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(name))
            .issuer_name(named(["root", "middle"][signer]))
            .public_key(self.keys[key].public_key())
            .serial_number(1000 + key)
            .not_valid_before(NOW - DAY)
            .not_valid_after(NOW + DAY)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if is_ca:
            signs = x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage)
            builder = builder.add_extension(signs, critical=True)
        return Credential(builder.sign(self.keys[signer], hashes.SHA256()), self.keys[key])


@pytest.fixture(scope="module")
def line() -> Line:
    return Line()


# ---------------------------------------------------------------- the chain


@BOTH_VERSIONS
def test_chain_is_looked_at(files: Files, line: Line, version: object) -> None:
    """Who has a CA below the root revoked has all its clients revoked."""
    files.put("client-ca.pem", line.root.cert_pem, line.middle.cert_pem)
    context = files.client_context(version=version)  # type: ignore[arg-type]
    chain = (line.client.cert_pem, line.middle.cert_pem, line.client.key_pem)
    context.load_cert_chain(files.put("chain.pem", *chain))

    def load(*revoked: int) -> Trust:
        crls = [
            crl_of(ca, lambda builder: _with(builder, revoked)) for ca in (line.root, line.middle)
        ]
        tls = files.settings(crl=files.put("ca-crl.pem", *crls))
        object.__setattr__(tls, "client_ca", files.folder / "client-ca.pem")
        return load_trust(Settings("/up", tls))

    def _with(
        builder: x509.CertificateRevocationListBuilder, revoked: tuple[int, ...]
    ) -> x509.CertificateRevocationListBuilder:
        for serial in revoked:
            builder = builder.add_revoked_certificate(entry(serial))
        return builder

    good = load()
    assert good.context is not None
    with Shake(good.context, context) as handshake:
        assert handshake.server_error is None, handshake.reason
        who = good.identify(handshake.server)
    assert len(who.chain) == 3
    assert load(77).objection(who) is None
    for serial in (1001, 1002):
        revoked = load(serial)
        assert revoked.objection(who) is Refusal.REVOKED
        assert revoked.context is not None
        assert shake(revoked.context, context) == "revoked"


def test_ca_that_the_client_brings_along_needs_a_crl(files: Files, line: Line) -> None:
    """Only the root is known here, so it is not known that the other's list is missing."""
    files.put("client-ca.pem", line.root.cert_pem)
    tls = files.settings(crl=files.put("ca-crl.pem", crl_of(line.root)))
    object.__setattr__(tls, "client_ca", files.folder / "client-ca.pem")
    context = files.client_context()
    chain = (line.client.cert_pem, line.middle.cert_pem, line.client.key_pem)
    context.load_cert_chain(files.put("chain.pem", *chain))
    ours = load_trust(Settings("/up", tls)).context
    assert ours is not None
    assert shake(ours, context) == "no_crl"


# ---------------------------------------------------------------- several


def test_one_for_each_ca(files: Files, authority: CertificateAuthority, client: Credential) -> None:
    other = CertificateAuthority.create("another CA")
    theirs = other.issue_client("theirs")
    files.put("ca-cert.pem", authority.cert_pem, other.cert_pem)
    with pytest.raises(SettingsError, match=r"no CRL of CN=another CA, a CA of --client-ca"):
        load(files, authority.revoke_list([]))
    trust = load(
        files, authority.revoke_list([]), other.revoke_list([theirs.certificate.serial_number])
    )
    assert trust.context is not None
    assert shake(trust.context, files.client_context(theirs)) == "revoked"
    with Shake(trust.context, files.client_context(client)) as handshake:
        assert handshake.server_error is None


@pytest.mark.parametrize("order", [1, -1])
def test_of_several_of_one_ca_the_latest_counts(
    order: int, files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    """In the handshake and for those who are in. A list that has expired does no harm behind it."""
    serial = client.certificate.serial_number
    lists = [
        authority.revoke_list([], NOW - 60 * DAY),
        authority.revoke_list([], NOW - timedelta(hours=2)),
        authority.revoke_list([serial], NOW - timedelta(hours=1)),
    ]
    trust = load(files, *lists[::order])
    assert trust.context is not None
    assert len(trust.crls) == 1
    assert shake(trust.context, files.client_context(client)) == "revoked"
    trust = load(files, *lists[:2][::order])
    assert trust.context is not None
    with Shake(trust.context, files.client_context(client)) as handshake:
        assert handshake.server_error is None


def test_two_of_the_same_moment(files: Files, authority: CertificateAuthority) -> None:
    one, two = (
        crl_of(authority, lambda b, n=n: b.add_revoked_certificate(entry(n)))  # type: ignore[misc]
        for n in (1, 2)
    )
    with pytest.raises(SettingsError, match="two CRLs of CN=test CA of the same time and number"):
        load(files, one, two)
    load(files, one, one)


# ---------------------------------------------------------------- what is refused


def other_extension(*, critical: bool) -> Change:
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\0")
    return lambda builder: builder.add_extension(unknown, critical)


def point(**given: bool) -> Change:
    where = [x509.UniformResourceIdentifier("http://example.com/ca.crl")]
    names = (
        "only_contains_user_certs",
        "only_contains_ca_certs",
        "indirect_crl",
        "only_contains_attribute_certs",
    )
    value = x509.IssuingDistributionPoint(
        full_name=where,
        relative_name=None,
        only_some_reasons=None,
        **{name: given.get(name, False) for name in names},
    )
    return lambda builder: builder.add_extension(value, critical=True)


CHANGED: dict[str, tuple[Change, str]] = {
    "delta": (
        lambda builder: builder.add_extension(x509.DeltaCRLIndicator(3), critical=True),
        " delta CRL: give the complete list",
    ),
    "users only": (point(only_contains_user_certs=True), "some certificates only"),
    "CAs only": (point(only_contains_ca_certs=True), "some certificates only"),
    "indirect": (point(indirect_crl=True), "some certificates only"),
    "unknown critical": (other_extension(critical=True), r"critical extension .*: 1\.2\.3\.4$"),
    "entry of another CA": (
        lambda builder: builder.add_revoked_certificate(
            entry(1, (x509.CertificateIssuer([x509.DNSName("x")]), True))
        ),
        "an entry about another CA's certificate",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_lists_that_are_not_complete(
    case: str, files: Files, authority: CertificateAuthority
) -> None:
    change, why = CHANGED[case]
    with pytest.raises(SettingsError, match=rf"^--crl: .*/ca-crl\.pem holds a.*{why}"):
        load(files, crl_of(authority, change))


@pytest.mark.parametrize("change", [other_extension(critical=False), point()])
def test_lists_that_say_more_and_are_complete(
    change: Change, files: Files, authority: CertificateAuthority
) -> None:
    load(files, crl_of(authority, change))


def test_reasons_do_not_matter(
    files: Files, authority: CertificateAuthority, client: Credential
) -> None:
    held = entry(
        client.certificate.serial_number,
        (x509.CRLReason(x509.ReasonFlags.certificate_hold), False),
        (x509.InvalidityDate(NOW.replace(tzinfo=None)), False),
    )
    trust = load(files, crl_of(authority, lambda builder: builder.add_revoked_certificate(held)))
    assert trust.context is not None
    assert shake(trust.context, files.client_context(client)) == "revoked"


def test_stale_and_of_the_future(files: Files, authority: CertificateAuthority) -> None:
    with pytest.raises(SettingsError, match=r"CRL of CN=test CA that expired on .*certs crl\)$"):
        load(files, authority.revoke_list([], NOW - 60 * DAY))
    with pytest.raises(SettingsError, match=r"that is not valid before .*is the clock right\?$"):
        load(files, authority.revoke_list([], NOW + DAY))


def test_foreign(files: Files, authority: CertificateAuthority) -> None:
    with pytest.raises(SettingsError, match=r"a CRL of CN=another CA, which is none of the CAs"):
        load(files, CertificateAuthority.create("another CA").revoke_list([]))
    with pytest.raises(SettingsError, match=r"is not signed with that CA's key$"):
        load(files, CertificateAuthority.create("test CA").revoke_list([]))
    forged = crl_of(authority, key=ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(SettingsError, match=r"is not signed with that CA's key$"):
        load(files, forged)


def test_foreign_one_inside_the_ca_file(files: Files, authority: CertificateAuthority) -> None:
    foreign = CertificateAuthority.create("another CA").revoke_list([])
    files.put("ca-cert.pem", authority.cert_pem, foreign)
    with pytest.raises(SettingsError, match=r"^--client-ca: .* holds a CRL of CN=another CA"):
        load_trust(Settings("/up", files.settings()))


def test_version_that_nobody_knows(files: Files, authority: CertificateAuthority) -> None:
    good = x509.load_pem_x509_crl(authority.revoke_list([])).public_bytes(
        serialization.Encoding.DER
    )
    at = good.index(b"\x02\x01\x01")  # version 2
    der = good[: at + 2] + b"\x07" + good[at + 3 :]
    pem = b"-----BEGIN X509 CRL-----\n%s-----END X509 CRL-----\n" % base64.encodebytes(der)
    with pytest.raises(SettingsError, match="holds a CRL that cannot be used"):
        load(files, pem)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_half_written(share: float, files: Files, authority: CertificateAuthority) -> None:
    whole = authority.revoke_list([1, 2, 3])
    for content in (whole, authority.cert_pem + whole):
        with pytest.raises(SettingsError, match=r"^--crl: "):
            load(files, content[: int(len(content) * share)])


def test_ca_that_may_not_sign_lists(files: Files) -> None:
    """OpenSSL would let none of its clients in."""
    ca = CertificateAuthority.create("weak CA")
    usage = ca.certificate.extensions.get_extension_for_oid(ExtensionOID.KEY_USAGE).value
    assert isinstance(usage, x509.KeyUsage)
    builder = (
        x509.CertificateBuilder()
        .subject_name(ca.certificate.subject)
        .issuer_name(ca.certificate.subject)
        .public_key(ca.key.public_key())
        .serial_number(1)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
        .add_extension(
            x509.KeyUsage(
                key_cert_sign=True,
                crl_sign=False,
                **dict.fromkeys(
                    (
                        *("digital_signature", "content_commitment", "key_encipherment"),
                        *("data_encipherment", "key_agreement", "encipher_only", "decipher_only"),
                    ),
                    False,
                ),
            ),
            critical=True,
        )
    )
    certificate = builder.sign(ca.key, hashes.SHA256())  # type: ignore[arg-type]
    files.put("ca-cert.pem", certificate.public_bytes(serialization.Encoding.PEM))
    with pytest.raises(SettingsError, match="no keyUsage cRLSign"):
        load(files, ca.revoke_list([]))


def test_many_entries(files: Files, authority: CertificateAuthority) -> None:
    trust = load(files, authority.revoke_list(range(1, 20_001)))
    assert len(trust.crls[0].serials) == 20_000
