"""gateway.check: rules that can never match, or add nothing."""

from __future__ import annotations

import itertools
import re

import pytest

from gateway.access import ExportRules, Mode, Rule, Rules, parse_network
from gateway.check.report import Level, Report
from gateway.check.rules import check_rules, covers, denies, overlap
from gateway.identity import Identity

SUM = "none void or there twice"


def rules(text: str) -> tuple[Rule, ...]:
    return tuple(Rule.parse("", one) for one in text.split())


def networks(text: str) -> tuple[object, ...]:
    return tuple(parse_network("", one) for one in text.split())


def said(
    allow: str = "",
    deny: str = "",
    allow_from: str = "",
    deny_from: str = "",
    exports: tuple[ExportRules, ...] = (),
) -> list[str]:
    report = Report()
    made = Rules(
        rules(allow),
        rules(deny),
        networks(allow_from),  # type: ignore[arg-type]
        networks(deny_from),  # type: ignore[arg-type]
        exports,
    )
    check_rules(report, made)
    return [str(one) for one in report.verdicts]


def export(name: str = "a", write: str = "", read: str = "", deny: str = "") -> ExportRules:
    return ExportRules(name, rules(write), rules(read), rules(deny))


def test_no_rules_are_nothing_to_speak_of() -> None:
    assert said() == []


def test_good_rules() -> None:
    assert said("cn=a dns=*.example.com", "cn=b", "10.0.0.0/8", "10.1.0.0/16") == [
        f"ok    rules: 5 in all, {SUM}"
    ]
    assert said("cn=*", exports=(export("a", "cn=a", "cn=b", "cn=c"), export("b"))) == [
        f"ok    rules: 4 in all and 2 exports, {SUM}"
    ]


GLOBAL: list[tuple[str, str, str]] = [
    ("cn=a cn=b cn=a", "", "warn  allow cn=a: there twice"),
    ("sha256=" + "AB:" * 31 + "ab sha256=" + "ab" * 32, "", "warn  allow .*: there twice"),
    ("", "cn=a cn=a", "warn  deny cn=a: there twice"),
    ("cn=a cn=*", "", r"warn  allow cn=a: adds nothing to cn=\*: which of them is meant\?"),
    ("dns=a.b.c dns=*.b.c", "", r"warn  allow dns=a.b.c: adds nothing to dns=\*.b.c"),
    ("cn=a cn=b", "cn=a", "warn  allow cn=a: void: deny cn=a takes all of it back"),
    ("dns=a.b.c cn=b", "dns=*.b.c", r"warn  allow dns=a.b.c: void: deny dns=\*.b.c takes"),
    ("cn=a", "cn=a", "bad   allow: every rule is denied again: nobody can enter"),
    ("cn=a cn=b", "cn=*", "bad   allow: every rule is denied again"),
    ("", "cn=*", r"warn  deny cn=\*: whoever has a cn is denied: is it meant\?"),
    ("cn=a cn=b", "cn=A", "warn  allow cn=a: void: deny cn=A takes"),  # read in the widest sense
    ("cn=*.a cn=b", "cn=*.*", r"warn  allow cn=\*.a: void: deny cn=\*.\* takes"),
    ("dn=CN=a,O=b cn=b", "dn=CN=A,O=B", "warn  allow dn=CN=a,O=b: void"),
    ("uri=s://h/a cn=b", "uri=S://H:1/b/../a", "warn  allow uri=s://h/a: void"),
    ("psk=a psk=b", "psk=a", "warn  allow psk=a: void"),
    ("spki=" + "ab" * 32 + " cn=b", "spki=" + "AB" * 32, "warn  allow spki=.*: void"),
    ("sha256=" + "ab" * 32 + " cn=b", "sha256=" + "ab" * 32, "warn  allow sha256=.*: void"),
    ("uid=1 uid=2", "uid=1", "warn  allow uid=1: void"),
    ("email=u@h.d cn=b", "email=*@h.d", r"warn  allow email=u@h.d: void: deny email=\*@h.d"),
]


@pytest.mark.parametrize(("allow", "deny", "line"), GLOBAL)
def test_global_rules(allow: str, deny: str, line: str) -> None:
    found = said(allow, deny)
    assert any(re.match(line, one) for one in found), found
    assert not any(SUM in one for one in found)


@pytest.mark.parametrize(
    ("allow", "deny"),
    [
        ("dns=*.b.c", "dns=a.b.c"),
        ("cn=a", "dns=a"),
        ("cn=a", "dns=*"),
        ("dns=a.b", "dns=*"),  # a name of one label, whatever it is
        ("cn=*.a", "cn=*.b"),
        ("uri=s://h/*", "uri=s://h/"),
    ],
)
def test_rules_that_have_an_effect(allow: str, deny: str) -> None:
    assert said(allow, deny) == [f"ok    rules: 2 in all, {SUM}"]


EXPORTS: list[tuple[ExportRules, str, str, str]] = [
    (export(write="cn=a cn=a"), "", "", 'warn  export "a" read-write cn=a: there twice'),
    (export(read="cn=a cn=*"), "", "", 'warn  export "a" read-only cn=a: adds nothing to cn=*'),
    (export("x", "cn=a", deny="cn=a"), "", "", 'bad   export "x": nobody can open it: all its'),
    (export(write="cn=a"), "", "cn=a", 'warn  export "a" read-write cn=a: void: deny cn=a takes'),
    (export(write="cn=a"), "", "cn=*", 'bad   export "a": nobody can open it'),
    (export(write="cn=a", read="dns=x"), "", "cn=a", 'warn  export "a" read-write cn=a: void'),
    (export(write="cn=*", read="cn=a"), "", "", 'warn  export "a" read-only cn=a: void: read-wr'),
    (export(write="cn=a"), "cn=b", "", 'warn  export "a" read-write cn=a: void: no allow rule'),
    (export(write="cn=a"), "cn=b", "", 'bad   export "a": nobody can open it: all its rules'),
    (export(), "cn=b", "cn=b", 'bad   export "a": nobody can open it: nobody can enter'),
    (export(deny="cn=a"), "", "cn=a", 'warn  export "a" deny cn=a: adds nothing: it is denied'),
    (export(deny="cn=a cn=a"), "", "", 'warn  export "a" deny cn=a: there twice'),
]


@pytest.mark.parametrize(("table", "allow", "deny", "line"), EXPORTS)
def test_exports(table: ExportRules, allow: str, deny: str, line: str) -> None:
    found = said(allow, deny, exports=(table, export("good")))
    assert any(one.startswith(line) for one in found), found


@pytest.mark.parametrize(
    ("table", "allow"),
    [
        (export(write="cn=a"), "cn=*"),
        (export(write="cn=*.b"), "cn=a.*"),
        (export(write="dns=a.b"), "dns=c.d"),  # one certificate may have both
        (export(write="cn=a"), "dns=c.d"),
        (export(write="cn=a", read="cn=*"), ""),
        (export(write="uid=1000"), "cn=a"),  # a certificate, over a Unix socket
    ],
)
def test_exports_that_can_be_opened(table: ExportRules, allow: str) -> None:
    found = said(allow, exports=(table,))
    assert len(found) == 1, found
    assert SUM in found[0]


ADDRESSES: list[tuple[str, str, str]] = [
    ("10.0.0.0/8 10.0.0.0/8", "", "warn  allow-from 10.0.0.0/8: there twice"),
    ("10.0.0.0/8 10.1.0.0/16", "", "warn  allow-from 10.1.0.0/16: adds nothing"),
    ("", "::/64 ::1", "warn  deny-from ::1/128: adds nothing"),
    ("10.1.0.0/16 ::1", "10.0.0.0/8", "warn  allow-from 10.1.0.0/16: void: deny-from"),
    ("10.0.0.0/8 ::1", "10.0.0.0/9 10.128.0.0/9", "warn  allow-from 10.0.0.0/8: void"),
    ("10.1.0.0/16", "10.0.0.0/8", "bad   allow-from: every network is denied again: nobody"),
    ("", "0.0.0.0/0 ::/0", "bad   deny-from: denies every address: nobody can connect by TCP"),
    ("", "0.0.0.0/1 128.0.0.0/1 ::/0", "bad   deny-from: denies every address"),
    ("", "::/0", "warn  deny-from: denies every IPv6 address: is it meant?"),
]


@pytest.mark.parametrize(("allow", "deny", "line"), ADDRESSES)
def test_addresses(allow: str, deny: str, line: str) -> None:
    found = said(allow_from=allow, deny_from=deny)
    assert any(one.startswith(line) for one in found), found


@pytest.mark.parametrize(
    ("allow", "deny"),
    [("10.0.0.0/8", "10.1.0.0/16"), ("10.0.0.0/8", "::/0"), ("::/0", "0.0.0.0/0")],
)
def test_addresses_that_have_an_effect(allow: str, deny: str) -> None:
    found = said(allow_from=allow, deny_from=deny)
    assert found == [f"ok    rules: 2 in all, {SUM}"]


# ---------------------------------------------------------------- held against the rules themselves

TEXTS = [
    *("cn=a", "cn=b", "cn=*", "cn=*.b", "cn=a.*", "cn=a.b", "cn=*.*"),
    *("dns=a.b", "dns=*.b", "dns=*", "dns=A.B", "email=u@h.d", "email=*@h.d", "email=*@*.d"),
    *("uri=s://h/a", "uri=s://h/*", "uri=s://*/a", "uri=s://h/a/", "uri=s://h/a/b", "uid=1"),
]
NAMES = ("a", "b", "a.b", "b.b", "a.a", "x", "*", ".b", "a.")
HOSTS = ("a.b", "c.b", "b", "a.b.b")
PEOPLE = [
    *(Identity(common_name=name, common_names=(name,)) for name in NAMES),
    *(Identity(dns=(one, other)) for one in HOSTS for other in HOSTS),
    *(Identity(emails=(one,)) for one in ("u@h.d", "v@h.d", "u@x.d")),
    *(Identity(uris=(f"s://{one}",)) for one in ("h/a", "h/b", "h/a/", "x/a", "h/a/b", "h/")),
    *(Identity(common_name="a", common_names=("a",), uid=uid) for uid in (1, 2)),
    *(Identity(common_names=(one, "a")) for one in ("a", "b")),
]


@pytest.mark.parametrize(("one", "other"), [*itertools.product(TEXTS, TEXTS)])
def test_covers_and_overlap_say_what_the_rules_do(one: str, other: str) -> None:
    wide, rule = Rule.parse("", one), Rule.parse("", other)
    for person in PEOPLE:
        if covers(wide, rule) and rule.matches(person):
            assert wide.matches(person), person
        if denies(wide, rule) and rule.matches(person):
            assert wide.denies(person), person
        if not overlap(wide, rule):
            assert not (wide.matches(person) and rule.matches(person)), person


def test_what_is_bad_is_what_nobody_can_open() -> None:
    """Every pair of rules in every place, against what each person is granted."""
    few = ("cn=a", "cn=b", "cn=*", "dns=a.b", "dns=*.b")
    for allow, deny, write, barred in itertools.product(("", *few), repeat=4):
        table = export("a", write, deny=barred)
        report = Report()
        made = Rules(rules(allow), rules(deny), exports=(table,))
        check_rules(report, made)
        if report.count(Level.BAD):
            for person in PEOPLE:
                assert not made.grant(person).may_enter, (allow, deny, write, barred, person)


def test_read_only_that_is_void_writes() -> None:
    table = export("a", "cn=*", "cn=b")
    assert table.mode(Identity(common_name="b", common_names=("b",))) is Mode.READ_WRITE
