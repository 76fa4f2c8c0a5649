"""One rule about identities: `KIND=VALUE`."""

from __future__ import annotations

import difflib
import functools
import pwd
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

from gateway import dn
from gateway.errors import SettingsError
from gateway.identity import Identity, shown

KINDS: Final = ("cn", "dn", "dns", "uri", "email", "sha256", "spki", "psk", "uid")
_ANY: Final = "*"
ANYBODY: Final = "anybody"  # the kind of `Rule.anybody`, which no text has
_WHOLE: Final = frozenset({"cn", "psk"})  # kinds in which a lone `*` is all there can be
_SEPARATORS: Final = frozenset({"", ".", "/", "?", "#", "//", "@"})
_MAX_UID: Final = (1 << 32) - 2  # Linux: the one above stands for "no user"

_HOST: Final = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
_SEGMENT: Final = r"[A-Za-z0-9._~!$&'()+,;=:@-]+"
# The values that a rule with a `*` looks at. Others say two things at once to those who read them
# in different ways: user@ and :port before a host's end, %2F, a `*` of the certificate's own.
_PLAIN: Final = {
    "dns": re.compile(rf"{_HOST}\.?"),
    "email": re.compile(rf"[A-Za-z0-9!#$%&'+/=?^_`{{|}}~.-]+@{_HOST}"),
    "uri": re.compile(
        rf"[A-Za-z][A-Za-z0-9+.-]*:(?://(?:{_HOST})?(?=/|\Z))?(?:/?{_SEGMENT}(?:/{_SEGMENT})*/?)?"
    ),
    "cn": re.compile(r"[^*]+"),
    "psk": re.compile(r"[^*]+"),
}
_KEPT: Final = 1024  # names in the form in which they are denied; it takes time to make
_IGNORABLE: Final = (
    *(range(0x34F, 0x350), range(0x115F, 0x1161), range(0x17B4, 0x17B6), range(0x180B, 0x1810)),
    *(range(0x3164, 0x3165), range(0xFE00, 0xFE10), range(0xFFA0, 0xFFA1)),
    range(0xE0000, 0xE1000),
)
_DOTS: Final = re.compile(r"/\.\.?(?:/|\Z)")  # segments by which a path is walked out of


@dataclass(frozen=True, slots=True)
class Rule:
    """Something that an identity is or is not. Compared by meaning.

    `*` stands for one whole part: a label of a DNS name, of an email's or a URI's host; what is
    before an email's `@`; a segment of a URI's path; what is between dots in a CN or PSK name, or
    all of it. Never for a piece of one: what looks like a prefix is easily a wider gate than it
    was meant to be.

    A rule that lets in is read to the letter (`matches`), one that keeps out in the widest sense
    (`denies`).
    """

    kind: str
    parts: tuple[str, ...]  # with the separators between them, in the form in which they compare
    text: str = field(compare=False)  # as it was written

    @classmethod
    def parse(cls, flag: str, text: str) -> Rule:
        """Raises SettingsError that begins with `flag`."""
        kind, equals, value = text.partition("=")
        if kind not in KINDS or not equals:
            near = difflib.get_close_matches(kind.strip().lower(), KINDS, 1, 0.5)
            hint = f"did you mean {near[0]}=?" if near else f"kinds are {', '.join(KINDS)}"
            raise SettingsError(f"{flag} {shown(text)}: a rule is KIND=VALUE; {hint}")
        try:
            return cls(kind, _pattern(kind, value), text)
        except ValueError as wrong:
            raise SettingsError(f"{flag} {shown(text)}: {wrong}") from None

    @classmethod
    def anybody(cls) -> Rule:
        """Whoever may enter. Only for lists of those to whom an export is open."""
        return cls(ANYBODY, (_ANY,), _ANY)

    def matches(self, identity: Identity) -> bool:
        """Whether this client is meant, beyond doubt."""
        if self.kind == ANYBODY:
            return True
        if self.kind == "dn":
            return self.parts == identity.rdns
        values = _values(self.kind, identity)
        if self.parts == (_ANY,) and self.kind in _WHOLE:
            return bool(values)
        if _ANY in self.parts:
            values = tuple(value for value in values if _is_plain(self.kind, value))
        return any(_fits(self.parts, _parts(self.kind, value)) for value in values)

    def denies(self, identity: Identity) -> bool:
        """Whether this client may be meant: by any CN of several, in another case or spelling, by
        a wildcard of its certificate, with its certificate signed in the other way.
        """
        if self.matches(identity):
            return True
        match self.kind:
            case "sha256":
                return self.parts[0] in identity.twins
            case "dn":
                mine, theirs = _fold_all(self.parts), _fold_all(identity.rdns)
                return bool(theirs) and mine in (theirs, theirs[::-1])  # or read from the wrong end
            case "cn" if self.parts == (_ANY,):
                return bool(identity.common_names)
            case "cn":
                values = identity.common_names
            case "dns" | "uri" | "email":
                values = _values(self.kind, identity)
            case _:
                return False
        mine = _loose_parts(self.kind, "".join(self.parts))
        return any(_may_fit(mine, _loose_parts(self.kind, value)) for value in values)

    def __str__(self) -> str:
        return self.text


# ---------------------------------------------------------------- to the letter


def _values(kind: str, identity: Identity) -> tuple[str, ...]:
    """All that a client is in this respect; `dn` apart."""
    match kind:
        case "dns":
            return identity.dns
        case "email":
            return identity.emails
        case "uri":
            return identity.uris
        case "cn":
            one = identity.common_name
        case "sha256":
            one = identity.sha256
        case "spki":
            one = identity.spki
        case "psk":
            one = identity.psk
        case _:
            one = None if identity.uid is None else str(identity.uid)
    return (one,) if one else ()


def _parts(kind: str, value: str) -> tuple[str, ...]:
    """What `*` may stand for one of, with the separators, in the form in which it compares."""
    match kind:
        case "dns":
            return tuple(re.split(r"(\.)", value.lower().removesuffix(".")))
        case "email":
            local, at, host = value.rpartition("@")
            return (local, at, *re.split(r"(\.)", host.lower()))
        case "uri":
            scheme, colon, rest = value.partition(":")
            parts = [scheme.lower() + colon]
            if rest.startswith("//"):
                host = re.split(r"[/?#]", rest[2:], maxsplit=1)[0]
                rest = rest[2 + len(host) :]
                user, at, host = host.rpartition("@")  # of which only the host has no case
                parts += ["//", *re.split(r"(\.)", user + at + host.lower())]
            return (*parts, *re.split(r"([/?#])", rest))
        case "cn" | "psk":
            return tuple(re.split(r"(\.)", value))
        case _:
            return (value,)


def _is_plain(kind: str, value: str) -> bool:
    if kind == "uri" and _DOTS.search(value):
        return False
    return _PLAIN[kind].fullmatch(value) is not None


def _fits(pattern: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    return len(pattern) == len(parts) and all(
        one == other or (one == _ANY and other not in _SEPARATORS)
        for one, other in zip(pattern, parts, strict=True)
    )


# ---------------------------------------------------------------- in the widest sense


def _fold(text: str) -> str:
    """One form for what X.500 and people take for the same name: case, blanks, widths."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    seen = (char for char in folded if not _has_no_width(char))
    return " ".join("".join(seen).split())


def _has_no_width(char: str) -> bool:
    """Unicode: format characters, and others that are "default ignorable"."""
    return unicodedata.category(char) == "Cf" or any(ord(char) in one for one in _IGNORABLE)


def _fold_all(rdns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(dn.joined(_fold(one) for one in dn.attributes_of(rdn)) for rdn in rdns)


@functools.lru_cache(_KEPT)
def _loose_parts(kind: str, value: str) -> tuple[str, ...]:
    if kind == "uri":
        value = "".join(_walked(unquote(value)))
    folded = _fold(value)
    if kind != "cn":
        folded = folded.rstrip(".")
    return _parts(kind, folded)


def _walked(uri: str) -> Iterator[str]:
    """A URI without user, port, query and fragment, its path walked to the end."""
    scheme, colon, rest = uri.replace("\\", "/").partition(":")
    yield scheme + colon
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    if rest.startswith("//"):
        host, _, rest = rest[2:].partition("/")
        host = host.rpartition("@")[2]
        yield "//" + re.sub(r":[0-9]*$", "", host).rstrip(".")
    path: list[str] = []
    for segment in rest.split("/"):
        if segment == "..":
            del path[-1:]
        elif segment not in ("", "."):
            path.append(segment)
    yield "".join("/" + segment for segment in path)


def _may_fit(pattern: tuple[str, ...], parts: tuple[str, ...]) -> bool:
    return len(pattern) == len(parts) and all(
        one in (_ANY, other) or (_ANY in other and _may_stand_for(other, one))
        for one, other in zip(pattern, parts, strict=True)
    )


def _may_stand_for(wild: str, part: str) -> bool:
    """Whether a label of a certificate that has a `*` in it may be read as this part."""
    before, after = wild.split(_ANY)[0], wild.split(_ANY)[-1]
    return part not in _SEPARATORS and part.startswith(before) and part.endswith(after)


# ---------------------------------------------------------------- a rule's text


def _pattern(kind: str, value: str) -> tuple[str, ...]:
    """A rule's value, checked and in parts. Raises ValueError.

    What no client can have is refused: such a rule would deny nobody, and nobody would notice.
    """
    if not value:
        raise ValueError("nothing behind the =")
    if value != value.strip():
        raise ValueError("blanks around the value")
    if not value.isprintable():
        raise ValueError("characters in it that cannot be seen")
    match kind:
        case "dn":
            return dn.parse(value)
        case "sha256" | "spki":
            value = value.replace(":", "").lower()
            if not re.fullmatch(r"[0-9a-f]{64}", value):
                raise ValueError("not a SHA-256: 64 hexadecimal digits, colons or not")
        case "uid":
            value = _uid(value)
        case _:
            _check_value(kind, value)
    parts = _parts(kind, value)
    if any(_ANY in part and part != _ANY for part in parts):
        raise ValueError("* stands for a whole label or path segment, not for a piece of one")
    if _ANY in parts and not _is_plain(kind, value.replace(_ANY, "x")):
        raise ValueError("no * beside %, user, port, query, empty or dotted segments")
    return parts


def _check_value(kind: str, value: str) -> None:
    """Raises ValueError for what is no name of this kind, `*` apart."""
    named = value.replace(_ANY, "x")
    match kind:
        case "dns":
            _check_host(named)
        case "email":
            local, _, host = named.rpartition("@")
            if not re.fullmatch(r"[!-?A-~]+", local):
                raise ValueError("not an email address: local@host")
            _check_host(host)
        case "uri":
            if not named.isascii() or " " in named:
                raise ValueError("not a URI: only ASCII without blanks, the rest as %XX")
            if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", value):
                raise ValueError("not a URI: no scheme, as in spiffe://example.org/disks/*")


def _check_host(name: str) -> None:
    if not name.isascii():
        raise ValueError("give an international name as its A-label (xn--...)")
    labels = name.removesuffix(".").split(".")
    if len(name) > 254 or not all(re.fullmatch(r"[A-Za-z0-9_-]{1,63}", one) for one in labels):
        raise ValueError("not a DNS name: letters, digits, hyphens and single dots")
    if labels[-1].isdigit():
        raise ValueError("an address is no name: see --allow-from and --deny-from")


def _uid(value: str) -> str:
    if value.isascii() and value.isdigit():
        if len(value) > 10 or int(value) > _MAX_UID:
            raise ValueError("larger than a user's number can be")
        return str(int(value))
    if _ANY in value:
        raise ValueError("no * in uid=")
    try:
        return str(pwd.getpwnam(value).pw_uid)
    except KeyError:
        raise ValueError("neither a number nor a user of this machine") from None
