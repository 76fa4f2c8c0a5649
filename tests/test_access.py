"""gateway.access and gateway.rule: what a rule means, and what tries to pass by it."""

from __future__ import annotations

import os
import pwd

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from gateway import rule as rule_module
from gateway.access import KINDS, Rule, Rules, parse_network
from gateway.errors import SettingsError
from gateway.identity import Identity, shown
from tests.support.wrong_certs import authority, der, twin_of

FIELDS = {"dns": "dns", "uri": "uris", "email": "emails"}


def rule(text: str) -> Rule:
    return Rule.parse("--allow", text)


def client(kind: str, value: str) -> Identity:
    """A client of whom this is known and nothing else."""
    match kind:
        case "cn":
            return Identity(common_name=value, common_names=(value,))
        case "uid":
            return Identity(uid=int(value), gid=100)
        case "dns" | "uri" | "email":
            return Identity(**{FIELDS[kind]: (value,)})  # type: ignore[arg-type]
        case _:
            return Identity(**{kind: value})  # type: ignore[arg-type]


# ---------------------------------------------------------------- to let in: to the letter

LETS_IN = [
    ("cn=vm1", "vm1"),
    ("cn=*", "vm1"),
    ("cn=*", "a.b"),
    ("cn=*.example.com", "vm1.example.com"),
    ("cn=Dr. No", "Dr. No"),
    ("dns=vm1.Example.com", "VM1.example.COM"),
    ("dns=vm1.example.com.", "vm1.example.com"),
    ("dns=vm1.example.com", "vm1.example.com."),
    ("dns=*.example.com", "vm1.example.com"),
    ("dns=a.*.example.com", "a.b.example.com"),
    ("dns=*", "localhost"),
    ("email=Me@Example.com", "Me@example.COM"),
    ("email=*@example.com", "a.b+c@example.com"),
    ("email=me@*.example.com", "me@a.example.com"),
    ("uri=SPIFFE://Example.org/a", "spiffe://example.ORG/a"),
    ("uri=spiffe://example.org/*/db", "spiffe://example.org/ns/db"),
    ("uri=spiffe://*.example.org/a", "spiffe://x.example.org/a"),
    ("uri=urn:disks:a", "urn:disks:a"),
    ("uri=urn:*", "urn:disks:a"),
    ("psk=vm1", "vm1"),
    ("psk=*", "vm1"),
    ("psk=*.a", "x.a"),
    ("uid=0", "0"),
    ("uid=01000", "1000"),
]


@pytest.mark.parametrize(("text", "value"), LETS_IN)
def test_meant(text: str, value: str) -> None:
    one = rule(text)
    assert one.matches(client(one.kind, value))
    assert one.denies(client(one.kind, value))
    others = [kind for kind in KINDS if kind not in (one.kind, "dn", "uid")]
    assert not any(one.matches(client(kind, value)) for kind in others)
    assert not any(one.denies(client(kind, value)) for kind in others)
    assert str(one) == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[
            ("cn=vm1", value)
            for value in ("VM1", "vm1 ", " vm1", "vm10", "vm", "vm1.", "vm\u200b1")
        ],
        *[("cn=*.a", value) for value in (".a", "x.y.a", "a", "*.a", "x.A")],
        *[
            ("dns=vm1.a", value)
            for value in ("vm1.a..", ".vm1.a", "vm1..a", "*.a", "vm1.a.b", "vm1")
        ],
        *[
            ("dns=*.a", value)
            for value in (".a", "..a", "x.y.a", "*.a", "x*.a", "a", "x/.a", "x@.a")
        ],
        *[("dns=*", value) for value in ("x.y", "", ".", "*", "a..")],
        *[("email=me@a", value) for value in ("ME@a", "me@b", "me@a.", "me@x.a", "x@me@a", "me")],
        *[
            ("email=*@a", value)
            for value in ("@a", "x@b@a", '"x@b"@a', "*@a", "a", "x y@a", "x@a.a")
        ],
        *[
            ("uri=s://h/a", value)
            for value in ("s://h/A", "s://h/%61", "s://h/a/", "s://h//a", "t://h/a")
        ],
        *[
            ("uri=s://h/a", value)
            for value in ("s://h:1/a", "s://u@h/a", "s://h/a?", "s://h/a#", "s:/h/a")
        ],
        *[
            ("uri=s://h/*", value)
            for value in ("s://h/", "s://h", "s://h/a/b", "s://h/a%2Fb", "s://h/..")
        ],
        *[
            ("uri=s://h/*", value)
            for value in ("s://h/.", "s://h/%2e%2e", "s://h/a?b", "s://h/*", "s://h/a\\b")
        ],
        *[
            ("uri=s://h/*/a", value)
            for value in ("s://h/../a", "s://h//a", "s://h/x/../a", "s://h/?/a")
        ],
        ("uri=s://h.*/a", "s://h.x:1@evil/a"),
        ("uri=s://h.*/a", "s://h.x@evil/a"),
        ("uri=s://*.h/a", "s://evil#.h/a"),
        ("uri=s://*.h/a", "s://evil%2f.h/a"),
        ("uri=s://*/a", "s:///a"),
        ("psk=vm1", "VM1"),
        ("psk=*.a", ".a"),
        ("uid=1", "10"),
    ],
)
def test_not_meant_beyond_doubt(text: str, value: str) -> None:
    one = rule(text)
    assert not one.matches(client(one.kind, value))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dn"])
def test_nobody_matches_nothing(kind: str) -> None:
    values = {"sha256": 64 * "0", "spki": 64 * "0", "uid": "0", "uri": "s:*", "email": "*@a"}
    one = rule(f"{kind}={values.get(kind, '*')}")
    assert not one.matches(Identity())
    assert not one.denies(Identity())
    if kind in ("dns", "cn"):
        assert not one.matches(client(kind, ""))


def test_one_of_several_names_is_enough() -> None:
    who = Identity(dns=("a", "b"), uris=("s:a", "s:b"), emails=("a@a", "b@b"))
    for text in ("dns=b", "uri=s:b", "email=b@b"):
        assert rule(text).matches(who)


# ---------------------------------------------------------------- to keep out: in any sense


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("cn=vm1", value) for value in ("VM1", " vm1 ", "vm\u200b1", "\uff56m1", "*")],
        *[("dns=vm1.a", value) for value in ("vm1.a..", "*.a", "VM1.a", "v*.a", "*1.a", "vm1*.a")],
        *[("email=me@a", value) for value in ("ME@A", "me@a.")],
        *[
            ("uri=s://h/a", value)
            for value in ("s://H/A", "s://h/%61", "s://h/a/", "s://h//a", "s://h:1/a")
        ],
        *[
            ("uri=s://h/a", value)
            for value in ("s://u@h/a", "s://h/a?x", "s://h./a", "s://h/b/../a", "s://h/./a")
        ],
        *[("uri=s://h/a", value) for value in ("s://h\\a", "s://h/a#x", "s://h/%2E/a")],
        ("uri=s://h/*", "s://h/%2E%2E/a"),
        ("email=*@a", '"x y"@a'),
    ],
)
def test_denied_in_any_spelling(text: str, value: str) -> None:
    one = rule(text)
    assert one.denies(client(one.kind, value))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("cn=vm1", value) for value in ("vm2", "vm10", "vm1.a", "")],
        *[("dns=vm1.a", value) for value in ("vm2.a", "x.vm1.a", "*.b", "x*.a", "*.*.a", "*")],
        *[("uri=s://h/a", value) for value in ("s://h/b", "s://h/a/b", "s://x/a", "t://h/a")],
        ("email=me@a", "you@a"),
        ("psk=vm1", "VM1"),
        ("dns=*.a", "x.y.a"),
    ],
)
def test_others_are_not_denied(text: str, value: str) -> None:
    one = rule(text)
    assert not one.denies(client(one.kind, value))


def test_a_second_common_name_is_no_way_out() -> None:
    who = Identity(common_names=("vm1", "evil"))
    for text in ("cn=evil", "cn=*"):
        assert rule(text).denies(who)
        assert not rule(text).matches(who)


def test_a_certificate_turned_round_is_no_way_out() -> None:
    leaf = authority().leaf()
    issued, turned = Identity.of_chain((der(leaf),)), Identity.of_chain((twin_of(leaf),))
    one = rule(f"sha256={issued.sha256}")
    assert (one.matches(issued), one.denies(issued)) == (True, True)
    assert (one.matches(turned), one.denies(turned)) == (False, True)
    assert rule(f"spki={issued.spki}").matches(turned)


def test_names_in_full() -> None:
    def named(*attributes: tuple[x509.ObjectIdentifier, str]) -> Identity:
        subject = x509.Name([x509.NameAttribute(*one) for one in attributes])
        return Identity.of_chain((der(authority().leaf(subject)),))

    org, cn = NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME
    right = named((org, "Disks"), (cn, "vm1"))
    one = rule("dn=CN=vm1, O=Disks")
    assert one.matches(right)
    for other in (named((org, "disks"), (cn, "VM1")), named((cn, "vm1"), (org, "Disks"))):
        assert not one.matches(other)
        assert one.denies(other)
    for other in (
        named((cn, "vm1")),
        named((org, "Disks"), (cn, "vm1"), (cn, "vm1")),
        named((cn, "vm1,O=Disks")),
        Identity(),
    ):
        assert not one.matches(other)
        assert not one.denies(other)


# ---------------------------------------------------------------- a rule's text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cm=x", r"did you mean cn=\?"),
        ("CN=x", r"did you mean cn=\?"),
        ("ip=192.0.2.1", "kinds are cn, dn"),
        ("vm1", "KIND=VALUE"),
        ("*", "KIND=VALUE"),
        ("", "KIND=VALUE"),
        ("cn=", "nothing behind"),
        ("cn= vm1", "blanks"),
        ("dns=vm1.a ", "blanks"),
        ("cn=a\0b", "cannot be seen"),
        ("cn=a\u200bb", "cannot be seen"),
        ("cn=vm*", "piece"),
        ("dns=vm*.a", "piece"),
        ("dns=**.a", "piece"),
        ("dns=a..b", "DNS name"),
        ("dns=.", "DNS name"),
        ("dns=.a", "DNS name"),
        ("dns=a b", "DNS name"),
        ("dns=b\u00fccher.example", "xn--"),
        ("dns=192.0.2.1", "allow-from"),
        ("email=*", "local@host"),
        ("email=a", "local@host"),
        ("email=@a", "local@host"),
        ("email=a@b@c", "local@host"),
        ("email=a@", "DNS name"),
        ("uri=*", "scheme"),
        ("uri=//a/b", "scheme"),
        ("uri=*://a/b", "scheme"),
        ("uri=s://a/\u00fc", "ASCII"),
        ("uri=s://a/vm*", "piece"),
        ("uri=s://a:1/*", "no \\* beside"),
        ("uri=s://a/../*", "no \\* beside"),
        ("uri=s://a//*", "no \\* beside"),
        ("uri=s://a/*?b", "no \\* beside"),
        ("sha256=*", "64 hexadecimal"),
        ("sha256=" + 63 * "0", "64 hexadecimal"),
        ("spki=" + 63 * "0" + "g", "64 hexadecimal"),
        ("dn=vm1", "TYPE=VALUE"),
        ("dn=CN=*", "no \\*"),
        ("uid=*", "no \\*"),
        ("uid=-1", "neither a number"),
        ("uid=4294967295", "larger"),
        ("uid=" + 5000 * "9", "larger"),
        ("uid=\u0661", "neither a number"),
        ("uid=no such user", "neither a number"),
    ],
)
def test_what_is_no_rule(text: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as wrong:
        rule(text)
    message = str(wrong.value)  # with the text in it, but on one line, and not too much of it
    assert message.startswith(f"--allow {shown(text)}")
    assert message.isprintable()


def test_rules_are_compared_by_meaning() -> None:
    digits = "0a" * 32
    colons = ":".join(["0A"] * 32)
    for one, other in (
        (f"sha256={digits}", f"sha256={colons}"),
        ("dns=A.b", "dns=a.b."),
        ("dn=CN=a,O=b", "dn=cn=a, o=b"),
        ("uid=7", "uid=007"),
        ("email=a@B", "email=a@b"),
    ):
        assert rule(one) == rule(other)
        assert len({rule(one), rule(other)}) == 1
    assert rule("cn=a") != rule("cn=A")
    assert rule("cn=a") != rule("psk=a")


def test_users_by_name() -> None:
    me = pwd.getpwuid(os.getuid())
    assert rule(f"uid={me.pw_name}") == rule(f"uid={me.pw_uid}")


@given(st.sampled_from(KINDS), st.text(max_size=30))
def test_any_text_is_a_rule_or_an_error(kind: str, value: str) -> None:
    try:
        one = rule(f"{kind}={value}")
    except SettingsError:
        return
    for other in ("cn", "dns", "uri", "email", "psk"):
        who = client(other, value)
        assert one.denies(who) >= one.matches(who)


# ---------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("allow", "deny", "address", "admitted"),
    [
        ("", "", "192.0.2.1", True),
        ("192.0.2.0/24", "", "192.0.2.255", True),
        ("192.0.2.0/24", "", "192.0.3.0", False),
        ("192.0.2.0/24", "", "::ffff:192.0.2.1", True),
        ("::ffff:192.0.2.0/120", "", "192.0.2.1", True),
        ("", "192.0.2.1", "::ffff:192.0.2.1", False),
        ("", "192.0.2.1", "::ffff:c000:201", False),
        ("", "::ffff:192.0.2.1", "192.0.2.1", False),
        ("192.0.2.0/24", "192.0.2.1", "192.0.2.1", False),
        ("192.0.2.1", "192.0.2.0/24", "192.0.2.1", False),
        ("::/0", "", "192.0.2.1", False),
        ("::/0", "", "::ffff:192.0.2.1", False),
        ("0.0.0.0/0", "", "::1", False),
        ("fe80::/64", "", "fe80::1%eth0", True),
        ("", "fe80::1", "fe80::1%eth0", False),
        ("", "2001:db8::/32", "2001:DB8::1", False),
    ],
)
def test_addresses(allow: str, deny: str, address: str, admitted: bool) -> None:
    networks = [tuple(parse_network("--x", one) for one in text.split()) for text in (allow, deny)]
    assert Rules(allow_from=networks[0], deny_from=networks[1]).admits(address) == admitted


@pytest.mark.parametrize(
    "text",
    ["", "x", "192.0.2.1/24", "192.0.2.0/33", "010.0.0.1", "fe80::1%eth0", "fe80::/64%1", "1", "*"],
)
def test_what_is_no_network(text: str) -> None:
    with pytest.raises(SettingsError, match=f"^--deny-from {text.replace('*', '.')}"):
        parse_network("--deny-from", text)


@pytest.mark.parametrize("address", ["", "x", "192.0.2", "/run/socket"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Rules().admits(address)


# ---------------------------------------------------------------- spellings that pass for others


@pytest.mark.parametrize("filler", ["\u034f", "\ufe0f", "\u3164", "\u200b", "\U000e0020"])
def test_what_cannot_be_seen_does_not_escape_a_deny(filler: str) -> None:
    evil = f"vm{filler}1"
    who = Identity(common_name=evil, common_names=(evil,))
    assert rule("cn=vm1").denies(who)
    assert not rule("cn=vm1").matches(who)


def test_order_of_an_rdn_does_not_escape_a_deny() -> None:
    who = Identity(rdns=("2.5.4.10=x", "2.5.4.3=B+2.5.4.3=a"))
    assert rule("dn=CN=b+CN=a,O=x").denies(who)
    assert rule("dn=CN=A+CN=B,O=x").denies(who)


def test_user_of_a_uri_has_a_case() -> None:
    who = Identity(uris=("https://alice@Example.org/x",))
    assert rule("uri=https://alice@example.org/x").matches(who)
    assert not rule("uri=https://Alice@example.org/x").matches(who)
    assert rule("uri=https://Alice@example.org/x").denies(who)


def test_a_name_is_made_loose_once_for_all_rules() -> None:
    """A certificate's name costs its time once, however many rules there are."""
    looks_up = rule_module._loose_parts
    before = looks_up.cache_info().misses
    value = "https://a.example/" + "%41" * 1000
    who = Identity(uris=(value,))
    denies = [rule(f"uri=https://a.example/{n}") for n in range(200)]
    for _ in range(3):
        assert not any(one.denies(who) for one in denies)
    assert looks_up.cache_info().misses - before <= len(denies) + 1


def test_everybody_is_said_by_no_rule() -> None:
    assert Rule.anybody().matches(Identity())
    assert str(Rule.anybody()) == "*"
    for text in ("*", "anybody", "anybody=", "anybody=*"):
        with pytest.raises(SettingsError):
            rule(text)
