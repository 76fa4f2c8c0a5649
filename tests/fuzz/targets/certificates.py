"""Certificates that somebody has bent: whatever comes of one, it is an identity or a ValueError."""

from __future__ import annotations

import unicodedata

from cryptography import x509

from gateway.access import Rule
from gateway.identity import MAX_NAME_LENGTH, MAX_NAMES, Identity, link
from tests.fuzz.source import Source, require

_RULES = tuple(
    Rule.parse("--allow", text)
    for text in (
        "cn=*",
        "cn=vm1",
        "dn=CN=vm1,O=Example",
        "dns=*.example.org",
        "uri=spiffe://example.org/disks/*",
        "email=*@example.org",
        f"sha256={'ab' * 32}",
        f"spki={'ab' * 32}",
        "psk=*",
        "uid=0",
    )
)


def certificates(data: bytes) -> object:
    """A chain: the length of each in two bytes, and then its DER."""
    source = Source(data)
    ders = []
    while source.more and len(ders) < 4:
        ders.append(source.take(source.u16()))
    chain = tuple(ders)
    try:
        person = Identity.of_chain(chain)
    except ValueError as wrong:
        require(str(wrong), "no words")
        return None
    require(person.sha256 and person.spki, "a certificate without a name", person)
    require(len(person.chain) == len(chain), "a shorter chain", person)
    for der, one in zip(chain, person.chain, strict=True):
        require(link(der) == one, "another link", one)
    names = (*person.common_names, *person.dns, *person.uris, *person.emails)
    require(len(names) <= MAX_NAMES and sum(map(len, names)) <= MAX_NAME_LENGTH, "many names")
    for name in names:
        require(not any(unicodedata.category(char) == "Cc" for char in name), "control", name)
    require(person.sha256 not in person.twins, "its own twin", person)
    require(str(person).isprintable(), "not for a log", str(person))
    for rule in _RULES:
        require(rule.denies(person) or not rule.matches(person), "let in, not kept out", rule)
    subject = x509.load_der_x509_certificate(chain[0]).subject
    require(person.subject == subject.rfc4514_string(), "another subject", person)
    return person
