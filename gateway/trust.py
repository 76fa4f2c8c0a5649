"""Whom the gateway trusts, and with what: one immutable set, replaced as a whole."""

from __future__ import annotations

import enum
import functools
import hashlib
import operator
import ssl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from gateway import credentials, psk, tls
from gateway.access import Rules
from gateway.crls import CRL, revokes
from gateway.errors import Refusal, SettingsError, TLSRefused
from gateway.identity import Identity, Link
from gateway.settings import Settings, TLSSettings
from gateway.snapshot import Snapshot

_SOON: Final = timedelta(days=14)
_SOON_CRL: Final = timedelta(days=2)


@dataclass(frozen=True, slots=True, eq=False)
class Trust:
    """Everything that decides who may enter, as it was at one moment."""

    context: ssl.SSLContext | None  # None: no TLS
    rules: Rules
    digest: bytes = b""  # of the contents of all files, and of the rules
    parts: Mapping[str, bytes] = field(default_factory=dict, kw_only=True)  # the same, one by one
    own: credentials.Own | None = field(default=None, kw_only=True)
    # The CAs in --client-ca, by name and key; None: clients are not asked for a certificate.
    cas: frozenset[bytes] | None = field(default=None, kw_only=True)
    # All CA certificates of this set and those before it: SHA-256 to name and key. A CA's renewed
    # certificate vouches for whom its old one has vouched for.
    known_cas: Mapping[bytes, bytes] = field(default_factory=dict, kw_only=True)
    crls: tuple[CRL, ...] = field(default=(), kw_only=True)
    keys: psk.Keys | None = field(default=None, kw_only=True)

    def identify(self, sock: ssl.SSLSocket) -> Identity:
        """Who is at the other end of a finished handshake. Raises TLSRefused."""
        if self.keys is not None:
            assert self.context is not None
            name = psk.prove(self.context, sock)
            # Remembered in place of a certificate, to see whether it is the same key later.
            return replace(Identity.of_psk(name), chain=(_link(self.keys, name),))
        who = tls.identity(sock)
        if who is None and self.cas is not None:
            raise TLSRefused(Refusal.NO_CLIENT_CERT, "it has no client certificate")
        return who or Identity()

    def objection(self, identity: Identity) -> Refusal | None:
        """Why a client that proved this identity before could not enter now; None: it could."""
        if self.keys is not None:
            if identity.psk is None:
                return Refusal.NO_PSK
            if identity.psk not in self.keys.fingerprints:
                return Refusal.UNKNOWN_PSK
            if identity.chain != (_link(self.keys, identity.psk),):
                return Refusal.UNKNOWN_PSK
        elif self.cas is not None:
            if not identity.sha256 or not identity.chain:
                return Refusal.NO_CLIENT_CERT
            if any(revokes(self.crls, one.issuer, one.serial) for one in identity.chain):
                return Refusal.REVOKED
            if self.known_cas.get(identity.chain[-1].sha256) not in self.cas:
                return Refusal.UNKNOWN_CA
            if identity.expires <= datetime.now(UTC).timestamp():
                return Refusal.EXPIRED
            # Below its CA, every issuer has to have a CRL if any has: so OpenSSL sees it as well.
            listed = {one.issuer for one in self.crls}
            if listed and any(one.issuer not in listed for one in identity.chain[:-1]):
                return Refusal.NO_CRL
        return None if self.rules.grant(identity).may_enter else Refusal.NOT_ALLOWED

    def concerns(self, now: datetime) -> Iterator[str]:
        """What is allowed, and yet will keep clients out: for the log. `now` is aware."""
        if self.own is not None:
            begin, end = self.own.not_before, self.own.not_after
            if begin > now:
                yield (
                    f"our certificate is not valid before {begin:%Y-%m-%d %H:%M} UTC: clients will "
                    "refuse it; is the clock right?"
                )
            elif end <= now:
                yield f"our certificate expired on {end:%Y-%m-%d}: clients will refuse it"
            elif end - now < _SOON:
                yield f"our certificate expires on {end:%Y-%m-%d}: renew it"
            if wrong := credentials.disorder(self.own.chain):
                yield f"--cert: {wrong}"
        for crl in self.crls:
            if crl.next_update is not None and now < crl.next_update < now + _SOON_CRL:
                end = crl.next_update
                yield f"a CRL expires on {end:%Y-%m-%d}, and then nobody can enter: renew it"

    @property
    def names(self) -> tuple[str, ...]:
        """The DNS names and addresses in our certificate, if we have one."""
        return () if self.own is None else self.own.names


class Keeper:
    """Holds the set that new clients are measured by."""

    def __init__(self, trust: Trust) -> None:
        self.trust = trust

    def replace(self, trust: Trust) -> None:
        """Measure by this one from now on."""
        self.trust = trust


def load_trust(
    settings: Settings, files: Snapshot | None = None, before: Trust | None = None
) -> Trust:
    """The set of these files (read now if they were not before) and of the rules.

    Blocks. `before` is the set that this one is to take the place of, if there is one. Raises
    SettingsError that names the flag and the file.
    """
    if files is None:
        files = Snapshot.take(settings.tls)
    parts = parts_of(settings, files)
    digest = digest_of(parts)
    if settings.tls is None:
        trust = Trust(None, settings.rules, digest, parts=parts)
    elif files.psk is not None:
        tls.check_interpreter()
        keys = psk.parse(files.psk.path, files.psk.data)
        context = psk.context(keys, settings.tls.minimum)
        trust = Trust(context, settings.rules, digest, parts=parts, keys=keys)
    else:
        trust = _of_certificates(settings.tls, settings.rules, files, digest, parts)
    return trust if before is None else _successor(trust, before)


def parts_of(settings: Settings, files: Snapshot) -> Mapping[str, bytes]:
    """What the set is made of, each by its digest."""
    rules = hashlib.sha256(repr(settings.rules).encode(errors="surrogateescape")).digest()
    return {**files.digests, "rules": rules}


def digest_of(parts: Mapping[str, bytes]) -> bytes:
    """SHA-256 of all of it."""
    together = hashlib.sha256()
    for name, digest in sorted(parts.items()):
        together.update(b"%s\0%s" % (name.encode(), digest))
    return together.digest()


def _of_certificates(
    settings: TLSSettings, rules: Rules, files: Snapshot, digest: bytes, parts: Mapping[str, bytes]
) -> Trust:
    own = credentials.own(files)
    clients = credentials.clients(files, datetime.now(UTC))
    context = tls.context_of(own, clients, settings.minimum)
    if clients is None:
        return Trust(context, rules, digest, parts=parts, own=own)
    known = {_sha256(ca): _name_and_key(ca) for ca in clients.cas}
    return Trust(
        context,
        rules,
        digest,
        parts=parts,
        own=own,
        cas=frozenset(known.values()),
        known_cas=known,
        crls=clients.crls,
    )


def _successor(trust: Trust, before: Trust) -> Trust:
    """With what is remembered of the set before. Raises SettingsError where the new one would let
    in more than anybody can have meant."""
    if (trust.context is None) is not (before.context is None):
        raise SettingsError("--tls: TLS is switched on and off by a restart only")
    if (trust.keys is None) is not (before.keys is None):
        raise SettingsError("--psk-file: keys take the place of certificates by a restart only")
    if before.cas is not None and trust.cas is None:
        raise SettingsError("--client-ca is gone: anonymous clients enter after a restart only")
    check_guards(guards_of(before), trust)
    now = datetime.now(UTC)
    if trust.own is not None and before.own is not None and before.own.is_valid(now):
        if not trust.own.is_valid(now):
            raise SettingsError(
                "--cert: expired or not yet valid, so clients would refuse it, and the one in use "
                "is good"
            )
    return replace(trust, known_cas={**before.known_cas, **trust.known_cas})


class Guards(enum.IntFlag):
    """What keeps clients out that would enter if it was not there at all."""

    CRL = 1
    EXPORTS = 2
    ALLOW = 4
    ALLOW_FROM = 8


_GONE: Final = {
    Guards.CRL: "--crl is gone, and with it what was revoked",
    Guards.EXPORTS: "--config: the last [[export]] is gone",
    Guards.ALLOW: "--config: the last allow rule is gone",
    Guards.ALLOW_FROM: "--config: the last allow-from is gone",
}


def guards_of(trust: Trust) -> Guards:
    """Those of this set."""
    rules = trust.rules
    there = (
        (Guards.CRL, trust.crls),
        (Guards.EXPORTS, rules.exports),
        (Guards.ALLOW, rules.allow),
        (Guards.ALLOW_FROM, rules.allow_from),
    )
    return functools.reduce(operator.or_, (one for one, any_of in there if any_of), Guards(0))


def check_guards(before: Guards, trust: Trust) -> None:
    """Raises SettingsError for a set that has none any more of something that was there: a file
    that was cut off looks like that, and a restart is what says that it is meant."""
    gone = before & ~guards_of(trust)
    for one, words in _GONE.items():
        if one in gone:
            raise SettingsError(f"{words}; the gateway goes on without any only after a restart")


def _link(keys: psk.Keys, name: str) -> Link:
    return Link(b"", 0, keys.fingerprints[name])


def _sha256(certificate: x509.Certificate) -> bytes:
    return hashlib.sha256(certificate.public_bytes(Encoding.DER)).digest()


def _name_and_key(ca: x509.Certificate) -> bytes:
    name = hashlib.sha256(ca.subject.public_bytes()).digest()
    return name + hashlib.sha256(credentials.spki(ca)).digest()
