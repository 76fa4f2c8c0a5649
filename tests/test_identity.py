"""gateway.identity and gateway.dn: who a client is, and how that is compared and shown."""

from __future__ import annotations

import hashlib

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from gateway import dn
from gateway.identity import _ORDERS, Identity, link, shown
from tests.support.wrong_certs import authority, cases, der, twin_of, unreadable

CN, ORG = NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME
OU = NameOID.ORGANIZATIONAL_UNIT_NAME


def name(*attributes: tuple[x509.ObjectIdentifier, str]) -> x509.Name:
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in attributes])


def identity(subject: x509.Name, *san: x509.GeneralName) -> Identity:
    return Identity.of_chain((der(authority().leaf(subject, san=san)),))


# ---------------------------------------------------------------- out of a certificate


def test_what_a_certificate_says() -> None:
    everybody = authority()
    san = [
        x509.DNSName("vm1.example.com"),
        x509.UniformResourceIdentifier("spiffe://example.org/vm1"),
        x509.RFC822Name("vm1@example.com"),
        x509.DNSName("vm2.example.com"),
        x509.DirectoryName(name((CN, "other"))),
    ]
    leaf = everybody.leaf(name((ORG, "Disks"), (CN, "backup")), everybody.issuing, san=san)
    chain = (der(leaf), der(everybody.issuing.certificate), der(everybody.root.certificate))
    who = Identity.of_chain(chain)
    assert (who.common_name, who.common_names) == ("backup", ("backup",))
    assert who.subject == "CN=backup,O=Disks"  # RFC 4514: the last one first
    assert who.dns == ("vm1.example.com", "vm2.example.com")
    assert who.uris == ("spiffe://example.org/vm1",)
    assert who.emails == ("vm1@example.com",)
    assert who.sha256 == hashlib.sha256(der(leaf)).hexdigest()
    spki = everybody.key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert who.spki == hashlib.sha256(spki).hexdigest()
    assert (who.psk, who.uid, who.gid) == (None, None, None)
    assert who.chain == tuple(link(one) for one in chain)
    assert who.chain[0].serial == leaf.serial_number
    assert who.chain[0].issuer != who.chain[1].issuer == who.chain[2].issuer
    assert str(who) == f"CN=backup,O=Disks sha256:{who.sha256[:16]}"


def test_several_common_names_are_none() -> None:
    who = identity(name((CN, "first"), (CN, "second")))
    assert (who.common_name, who.common_names) == (None, ("first", "second"))


def test_no_names() -> None:
    assert identity(name((ORG, "Disks"))).common_name is None
    nobody = identity(name())
    assert (nobody.common_name, nobody.common_names, nobody.rdns) == (None, (), ())
    assert str(nobody).startswith("no subject sha256:")


@pytest.mark.parametrize(
    "one",
    [
        x509.DNSName._init_without_validation("\u212avm1.example"),
        x509.RFC822Name._init_without_validation("a@\u212a.example"),
        x509.UniformResourceIdentifier._init_without_validation("spiffe://\u212a.example/a"),
    ],
    ids=["dns", "email", "uri"],
)
def test_names_are_ascii(one: x509.GeneralName) -> None:
    """In lower case, the Kelvin sign is a k."""
    with pytest.raises(ValueError, match="that is not ASCII"):
        identity(name((CN, "a")), one)


def test_all_names_together_are_not_too_long() -> None:
    long = "https://a/" + "%41" * 5300
    with pytest.raises(ValueError, match="characters of them"):
        identity(name((CN, "a")), x509.UniformResourceIdentifier(long), x509.DNSName(200 * "ab."))
    identity(name((CN, "a")), x509.UniformResourceIdentifier(long))


def test_an_email_in_the_subject_is_no_san() -> None:
    assert identity(name((NameOID.EMAIL_ADDRESS, "a@example.com"))).emails == ()


@pytest.mark.parametrize("char", ["\0", "\n", "\x1b", "\x7f", "\x85"])
def test_control_characters(char: str) -> None:
    with pytest.raises(ValueError, match="control characters in its CN"):
        identity(name((CN, f"a{char}b")))


@pytest.mark.parametrize("evil", ["a\u2028b", "a\u202eb", "a\u200bb"])
def test_a_subject_stays_on_its_line(evil: str) -> None:
    text = str(identity(name((CN, evil))))
    assert text.isprintable()
    assert len(text.splitlines()) == 1


def test_a_long_subject_is_cut_in_the_log_only() -> None:
    who = identity(name(*((OU, 60 * letter) for letter in "abc")))
    assert len(who.subject) > 180
    assert len(str(who)) <= 80 + len(" sha256:") + 16
    assert "..." in str(who)


@pytest.mark.parametrize("encoded", [pytest.param(one, id=what) for what, one in unreadable()])
def test_what_cannot_be_read(encoded: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        Identity.of_chain((encoded,))


def test_no_certificate() -> None:
    with pytest.raises(ValueError, match="no certificate"):
        Identity.of_chain(())


def test_the_twin_of_a_certificate_is_known() -> None:
    """Whoever holds a certificate that ECDSA signed can turn its signature round."""
    leaf = authority().leaf()
    mine, twin = Identity.of_chain((der(leaf),)), Identity.of_chain((twin_of(leaf),))
    assert mine.sha256 != twin.sha256
    assert mine.sha256 in twin.twins
    assert twin.sha256 in mine.twins
    assert mine.sha256 not in mine.twins


def test_all_orders() -> None:
    curves = [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1(), ec.SECP256K1()]
    brainpool = [ec.BrainpoolP256R1(), ec.BrainpoolP384R1(), ec.BrainpoolP512R1()]
    assert {curve.group_order for curve in (*curves, *brainpool)} == set(_ORDERS)


# ---------------------------------------------------------------- otherwise


def test_pre_shared_keys_and_users() -> None:
    assert str(Identity()) == "anonymous"
    assert str(Identity.of_psk("vm1")) == "psk:vm1"
    assert str(Identity.of_psk("vm1\n")) == "psk:vm1?"
    both = Identity.of_psk("vm1").with_unix(1000, 100)
    assert (both.psk, both.uid, both.gid) == ("vm1", 1000, 100)
    assert str(both) == "psk:vm1 uid:1000"
    assert str(Identity().with_unix(0, 0)) == "uid:0"


def test_shown() -> None:
    assert shown("CN=Ren\u00e9, \u65e5\u672c") == "CN=Ren\u00e9, \u65e5\u672c"
    assert shown("a\0b\tc\nd") == "a?b?c?d"
    assert shown(80 * "x") == 80 * "x"
    assert shown(81 * "x") == 77 * "x" + "..."


# ---------------------------------------------------------------- distinguished names


@pytest.mark.parametrize(
    "text",
    [
        *("CN=vm1,O=Disks", "cn=vm1,o=Disks", "CN=vm1, O=Disks", " CN = vm1 ,O= Disks"),
        *("2.5.4.3=vm1,O=Disks", r"CN=\76m1,O=Disks", "CN=#0c03766d31,O=Disks"),
    ],
)
def test_spellings_of_one_name(text: str) -> None:
    assert dn.parse(text) == dn.parts_of(name((ORG, "Disks"), (CN, "vm1")))


@pytest.mark.parametrize(
    "text",
    [
        *("CN=VM1,O=Disks", "O=Disks,CN=vm1", "CN=vm1+O=Disks", "CN=vm1", "CN=vm1,O=Disks,C=DE"),
        *(r"CN=vm1\,O\=Disks", r"CN=vm1\ ,O=Disks", r"CN=\#0c03766d31,O=Disks", "OU=vm1,O=Disks"),
    ],
)
def test_other_names(text: str) -> None:
    assert dn.parse(text) != dn.parts_of(name((ORG, "Disks"), (CN, "vm1")))


@pytest.mark.parametrize(
    "text",
    [
        *("vm1", "CN=", "CN=vm1,", "=vm1", "XY=vm1", "CN=#zz", "CN=#0c01ff", r"CN=\ff", "CN=a;b"),
        *('CN="vm1"', "CN=vm*", "CN=vm1++", "2.5.=x", "CN=a\\"),
    ],
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        dn.parse(text)


def test_an_rdn_is_a_set() -> None:
    rdn = x509.RelativeDistinguishedName([x509.NameAttribute(CN, "a"), x509.NameAttribute(OU, "b")])
    assert dn.parse("CN=a+OU=b") == dn.parse("OU=b+CN=a") == dn.parts_of(x509.Name([rdn]))
    assert dn.parse(r"CN=a\+2.5.4.11\=b") != dn.parse("CN=a+OU=b")


TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12)
VALUES = st.one_of(TEXT, st.text('\\,+="#<>; a', min_size=1, max_size=8))
KINDS = st.sampled_from([CN, ORG, OU, NameOID.EMAIL_ADDRESS, x509.ObjectIdentifier("1.3.9950.1")])


@given(st.lists(st.tuples(KINDS, VALUES), min_size=1, max_size=4))
def test_what_is_shown_can_be_written_in_a_rule(attributes: list[tuple[object, str]]) -> None:
    subject = name(*attributes)  # type: ignore[arg-type]
    text = subject.rfc4514_string().replace("*", r"\*")
    assert dn.parse(text) == dn.parts_of(subject)


@given(*2 * [st.lists(st.tuples(KINDS, VALUES), max_size=3)])
def test_two_names_have_two_forms(
    one: list[tuple[object, str]], other: list[tuple[object, str]]
) -> None:
    first, second = name(*one), name(*other)  # type: ignore[arg-type]
    assert (dn.parts_of(first) == dn.parts_of(second)) == (first == second)


def test_no_case_is_read_in_two_ways() -> None:
    for case in cases().values():
        if case.reason == "":
            leaf = x509.load_pem_x509_certificates(case.chain)[0]
            who = Identity.of_chain((der(leaf),))
            assert dn.parts_of(leaf.subject) == who.rdns
