"""Part of `check`: private key and password, and pre-shared keys."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)

from gateway import psk
from gateway.access import Rules
from gateway.check.certs import Certificates, spki_of
from gateway.check.files import read
from gateway.check.report import Report, some
from gateway.identity import Identity, shown
from gateway.settings import TLSSettings

_KEY: Final = re.compile(
    rb"-----BEGIN ([A-Z ]*)PRIVATE KEY-----(?:(?!-----).)*-----END \1PRIVATE KEY-----", re.DOTALL
)


def check_key(report: Report, tls: TLSSettings, chain: Certificates) -> None:
    assert tls.key is not None
    keys = list(_KEY.finditer(read(tls.key)))
    if len(keys) != 1:
        how_many = f"{len(keys)} private keys: leave" if keys else "no private key: put"
        report.bad(tls.key, f"{how_many} the one that is meant, in PEM format")
        return
    (found,) = keys
    encrypted = found[1] == b"ENCRYPTED " or b"Proc-Type: 4,ENCRYPTED" in found[0]
    password = None
    if tls.key_password is not None:
        with report.part(tls.key_password):
            password = _password(report, tls.key_password)
        if password is None:
            return
        if not encrypted:
            report.warn(tls.key_password, f"not needed: the key in {tls.key} is not encrypted")
    elif encrypted:
        report.bad(tls.key, "the key is encrypted: name its password's file, --key-password-file")
        return
    try:
        key = load_pem_private_key(found[0], password if encrypted else None)
    except (ValueError, TypeError):
        what = f"the password in {tls.key_password} does not open it" if encrypted else "broken"
        report.bad(tls.key, f"no usable private key: {what}")
        return
    ours = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    places = [i for i, one in enumerate(chain, 1) if spki_of(one) == ours]
    sealed = ", and its password fits" if encrypted else ""
    if not chain:
        report.ok(tls.key, f"a private key{sealed}; whose, is not known without a certificate")
    elif 1 in places:
        report.ok(tls.key, f"the key of the certificate in {tls.cert}{sealed}")
    elif places:
        report.bad(
            tls.key, f"the key of certificate {places[0]} in {tls.cert}: that one has to be first"
        )
    else:
        report.bad(tls.key, f"not the key of the certificate in {tls.cert}: they belong together")


def _password(report: Report, path: Path) -> bytes | None:
    """The first line, without its end."""
    line = read(path).split(b"\n", 1)[0].removesuffix(b"\r")
    if not line:
        report.bad(path, "its first line is empty: the password of the key goes there")
        return None
    return line


def check_psk(report: Report, path: Path, rules: Rules) -> None:
    """The keys that clients share with us, and whether the rules are about any of them."""
    with report.part(path):
        prints = psk.parse(path, read(path)).fingerprints
        twins = [name for name, mark in prints.items() if [*prints.values()].count(mark) > 1]
        if twins:
            report.warn(path, f"one key under several names: {some(tuple(map(shown, twins)))}")
        report.ok(path, f"{len(prints)} pre-shared {'key' if len(prints) == 1 else 'keys'}")
        clients = [Identity.of_psk(name) for name in prints]
        named = [*rules.allow, *rules.deny]
        for export in rules.exports:
            named += [*export.read_write, *export.read_only, *export.deny]
        for rule in dict.fromkeys(named):
            if rule.kind == "psk" and not any(map(rule.matches, clients)):
                report.warn(path, f"has no key for the rule {rule}: it never matches")
