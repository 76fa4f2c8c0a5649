"""Distinguished names in the form in which rules compare them: parsed, not as text.

Two spellings of one name (blanks, escapes, the case of `cn=`, the order inside of `CN=a+OU=b`) are
one name here, and two names never have one form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from cryptography import x509

# What people write for the types, RFC 4514 and OpenSSL alike. Others are written as numbers.
_TYPES: Final = {
    "c": "2.5.4.6",
    "cn": "2.5.4.3",
    "dc": "0.9.2342.19200300.100.1.25",
    "dnqualifier": "2.5.4.46",
    "e": "1.2.840.113549.1.9.1",
    "email": "1.2.840.113549.1.9.1",
    "emailaddress": "1.2.840.113549.1.9.1",
    "givenname": "2.5.4.42",
    "gn": "2.5.4.42",
    "l": "2.5.4.7",
    "o": "2.5.4.10",
    "ou": "2.5.4.11",
    "serialnumber": "2.5.4.5",
    "sn": "2.5.4.4",
    "st": "2.5.4.8",
    "street": "2.5.4.9",
    "surname": "2.5.4.4",
    "title": "2.5.4.12",
    "uid": "0.9.2342.19200300.100.1.1",
}
# DER string types whose content is ASCII or UTF-8, for values in hexadecimal: UTF8String,
# PrintableString, IA5String.
_STRING_TAGS: Final = frozenset({0x0C, 0x13, 0x16})
_PAIR: Final = re.compile(r"\\([0-9A-Fa-f]{2}|[ \"#+,;<=>\\*])")
_SPECIAL: Final = frozenset('"+,;<>\\')


def parts_of(name: x509.Name) -> tuple[str, ...]:
    """The form of a certificate's name: a string for each RDN, in the certificate's order."""
    return tuple(
        _joined([(attribute.oid.dotted_string, attribute.value) for attribute in rdn])
        for rdn in name.rdns
    )


def parse(text: str) -> tuple[str, ...]:
    """The form of a name written as in RFC 4514, most specific RDN first: `CN=vm1,O=Example`.

    Raises ValueError that says what is wrong.
    """
    rdns = []
    for rdn in _split(text, ","):
        attributes = []
        for attribute in _split(rdn, "+"):
            kind, equals, value = attribute.partition("=")
            if not equals:
                raise ValueError(f"not TYPE=VALUE: {attribute.strip()!r}; write CN=vm1,O=Example")
            attributes.append((_oid(kind.strip()), _value(value)))
        rdns.append(_joined(attributes))
    return tuple(reversed(rdns))


def _split(text: str, separator: str) -> list[str]:
    """At each separator that no backslash stands before."""
    pieces = [""]
    position = 0
    while position < len(text):
        step = 2 if text[position] == "\\" else 1
        if text[position] == separator:
            pieces.append("")
        else:
            pieces[-1] += text[position : position + step]
        position += step
    return pieces


def _oid(kind: str) -> str:
    if re.fullmatch(r"[0-2](\.(0|[1-9][0-9]*))+", kind):
        return kind
    try:
        return _TYPES[kind.lower()]
    except KeyError:
        raise ValueError(f"no type of attribute: {kind!r}; a dotted number is one too") from None


def _value(text: str) -> str | bytes:
    text = text.lstrip(" ")
    # Blanks at the end do not count, unless escaped.
    while text.endswith(" ") and not re.search(r"(?<!\\)(\\\\)*\\ $", text):
        text = text[:-1]
    if text.startswith("#"):
        return _of_hex(text[1:])
    raw = bytearray()  # escapes in hexadecimal are of UTF-8, byte by byte
    position = 0
    while position < len(text):
        if pair := _PAIR.match(text, position):
            what = pair[1]
            raw += bytes.fromhex(what) if len(what) == 2 else what.encode()
            position = pair.end()
        elif text[position] == "*":
            raise ValueError("no * in dn=; where it is part of the name: \\*")
        elif text[position] in _SPECIAL:
            raise ValueError(f"{text[position]} needs a \\ before it")
        else:
            raw += text[position].encode()
            position += 1
    if not raw:
        raise ValueError("an attribute without a value")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise ValueError(f"escapes that are not UTF-8, in {text!r}") from None


def _of_hex(digits: str) -> str | bytes:
    try:
        der = bytes.fromhex(digits)
    except ValueError:
        raise ValueError(f"not hexadecimal behind #: {digits!r}") from None
    if len(der) >= 2 and der[0] in _STRING_TAGS and der[1] == len(der) - 2 < 128:
        return der[2:].decode()  # UnicodeDecodeError is a ValueError
    return der


def _joined(attributes: list[tuple[str, str | bytes]]) -> str:
    return joined(f"{oid}={_escaped(value)}" for oid, value in attributes)


def joined(attributes: Iterable[str]) -> str:
    """One RDN, which is a set: sorted."""
    return "+".join(sorted(attributes))


def attributes_of(rdn: str) -> list[str]:
    """What was `joined`."""
    return _split(rdn, "+")


def _escaped(value: str | bytes) -> str:
    if isinstance(value, bytes):
        return "#" + value.hex()
    return re.sub(r"([\\+]|^#)", r"\\\1", value)
