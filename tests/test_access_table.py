"""gateway.access: identities x rules x exports, against a table and against naive models."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access import ExportRules, Grant, Mode, Rule, Rules
from gateway.identity import Identity

RW, RO = Mode.READ_WRITE, Mode.READ_ONLY
SHA = {name: 32 * f"{number:02x}" for number, name in enumerate(("vm1", "vm2", "backup", "admin"))}


def certificate(name: str, team: str) -> Identity:
    return Identity(
        common_name=name,
        common_names=(name,),
        subject=f"CN={name},O={team}",
        rdns=(f"2.5.4.10={team}", f"2.5.4.3={name}"),
        dns=(f"{name}.{team}.example",),
        uris=(f"spiffe://example/{team}/{name}",),
        emails=(f"{name}@{team}.example",),
        sha256=SHA[name],
        spki=SHA[name][::-1],
    )


IDENTITIES = {
    "vm1": certificate("vm1", "disks"),
    "vm2": certificate("vm2", "disks"),
    "backup": certificate("backup", "tapes"),
    "admin": certificate("admin", "staff").with_unix(1000, 1000),
    "key": Identity.of_psk("vm1"),
    "user": Identity().with_unix(1000, 1000),
    "root": Identity().with_unix(0, 0),
    "nobody": Identity(),
}

# Each kind of rule, and all whom it means.
MEANT = {
    "cn=vm1": {"vm1"},
    "cn=*": {"vm1", "vm2", "backup", "admin"},
    "dn=CN=vm2,O=disks": {"vm2"},
    "dns=*.disks.example": {"vm1", "vm2"},
    "dns=backup.tapes.example": {"backup"},
    "uri=spiffe://example/*/vm1": {"vm1"},
    "uri=spiffe://example/*/*": {"vm1", "vm2", "backup", "admin"},
    "email=*@staff.example": {"admin"},
    "email=vm2@*.example": {"vm2"},
    f"sha256={SHA['backup']}": {"backup"},
    f"spki={SHA['admin'][::-1]}": {"admin"},
    "psk=vm1": {"key"},
    "psk=*": {"key"},
    "uid=1000": {"admin", "user"},
    "uid=0": {"root"},
}
RULES = {text: Rule.parse("--allow", text) for text in MEANT}
EVERYBODY = set(IDENTITIES)


@pytest.mark.parametrize("text", MEANT)
def test_each_rule(text: str) -> None:
    assert {who for who, one in IDENTITIES.items() if RULES[text].matches(one)} == MEANT[text]
    assert {who for who, one in IDENTITIES.items() if RULES[text].denies(one)} == MEANT[text]


def test_no_rules() -> None:
    assert all(Rules().grant(one) == Grant(True) for one in IDENTITIES.values())


@pytest.mark.parametrize("text", MEANT)
def test_one_allow_and_one_deny(text: str) -> None:
    """Every rule with every other, in both roles; deny wins."""
    for other in MEANT:
        rules = Rules((RULES[text],), (RULES[other],))
        entered = {who for who, one in IDENTITIES.items() if rules.grant(one).may_enter}
        assert entered == MEANT[text] - MEANT[other]
        rules = Rules((RULES[text], RULES[other]))
        entered = {who for who, one in IDENTITIES.items() if rules.grant(one).may_enter}
        assert entered == MEANT[text] | MEANT[other]
    rules = Rules(deny=(RULES[text],))
    entered = {who for who, one in IDENTITIES.items() if rules.grant(one).may_enter}
    assert entered == EVERYBODY - MEANT[text]


def export(name: str, rw: str = "", ro: str = "", deny: str = "") -> ExportRules:
    lists = [
        (Rule.anybody(),) if one == "anybody" else tuple(RULES[text] for text in one.split())
        for one in (rw, ro, deny)
    ]
    return ExportRules(name, *lists)


EXPORTS = (
    export("open", rw="anybody"),
    export("open but", rw="anybody", deny="cn=vm1"),
    export("disk", rw="cn=vm1", ro=f"sha256={SHA['backup']}"),
    export("both", rw="cn=vm1", ro="cn=*"),
    export("taken back", rw="cn=* psk=*", deny="dns=*.disks.example"),
    export("read", ro="uid=1000"),
    export("", ro="psk=vm1"),
    export("nobody's"),
)

# allow, deny; then for each client what it may open, in order.
GRANTS = [
    (
        "",
        "",
        {
            "vm1": {"open": RW, "disk": RW, "both": RW},
            "vm2": {"open": RW, "open but": RW, "both": RO},
            "backup": {"open": RW, "open but": RW, "disk": RO, "both": RO, "taken back": RW},
            "admin": {"open": RW, "open but": RW, "both": RO, "taken back": RW, "read": RO},
            "key": {"open": RW, "open but": RW, "taken back": RW, "": RO},
            "user": {"open": RW, "open but": RW, "read": RO},
            "root": {"open": RW, "open but": RW},
            "nobody": {"open": RW, "open but": RW},
        },
    ),
    (
        "cn=vm1 psk=*",
        "",
        {
            "vm1": {"open": RW, "disk": RW, "both": RW},
            "key": {"open": RW, "open but": RW, "taken back": RW, "": RO},
        },
    ),
    (
        "cn=*",
        f"dns=*.disks.example spki={SHA['admin'][::-1]}",
        {"backup": {"open": RW, "open but": RW, "disk": RO, "both": RO, "taken back": RW}},
    ),
    ("uid=1000", "cn=*", {"user": {"open": RW, "open but": RW, "read": RO}}),
    ("uid=0", "uid=0", {}),
]


@pytest.mark.parametrize("who", IDENTITIES)
@pytest.mark.parametrize(("allow", "deny", "table"), GRANTS, ids=range(len(GRANTS)))
def test_exports(allow: str, deny: str, table: dict[str, dict[str, Mode]], who: str) -> None:
    lists = [tuple(RULES[text] for text in one.split()) for one in (allow, deny)]
    grant = Rules(*lists, exports=EXPORTS).grant(IDENTITIES[who])
    expected = table.get(who, {})
    assert grant == Grant(bool(expected), tuple(expected.items()))


def test_what_may_be_meant_is_denied_everywhere() -> None:
    """Denied in the widest sense, at the door and at each export."""
    two = Identity(common_names=("vm1", "vm9"))
    deny = (RULES["cn=vm1"],)
    assert Rules(deny=deny).grant(two) == Grant(False)
    tables = (ExportRules("disk", (Rule.anybody(),), deny=deny), export("open", rw="anybody"))
    assert Rules(exports=tables).grant(two) == Grant(True, (("open", RW),))
    assert Rules(deny=deny, exports=tables).grant(two) == Grant(False, ())


def test_to_open_nothing_is_not_to_enter() -> None:
    rules = Rules(exports=(export("disk", rw="cn=vm1"),))
    assert rules.grant(IDENTITIES["vm1"]) == Grant(True, (("disk", RW),))
    assert rules.grant(IDENTITIES["vm2"]) == Grant(False, ())
    assert rules.grant(Identity()) == Grant(False, ())


LISTS = st.lists(st.sampled_from(sorted(MEANT)), max_size=3)


@given(LISTS, LISTS, LISTS, LISTS, LISTS)
def test_against_a_model(
    allow: list[str], deny: list[str], rw: list[str], ro: list[str], barred: list[str]
) -> None:
    def meant(texts: list[str]) -> set[str]:
        return set(itertools.chain.from_iterable(MEANT[text] for text in texts))

    def rules(texts: list[str]) -> tuple[Rule, ...]:
        return tuple(RULES[text] for text in texts)

    one = ExportRules("disk", rules(rw), rules(ro), rules(barred))
    inside = (meant(allow) if allow else EVERYBODY) - meant(deny) - meant(barred)
    writers = inside & meant(rw)
    readers = inside & meant(ro) - writers
    every = Rules(rules(allow), rules(deny), exports=(one,))
    for who, identity in IDENTITIES.items():
        modes = [RW] if who in writers else [RO] if who in readers else []
        assert every.grant(identity) == Grant(bool(modes), tuple(("disk", mode) for mode in modes))


# ---------------------------------------------------------------- wildcards

LABEL = st.sampled_from(["a", "b", "ab", "a-b", "x1"])
WILD = st.one_of(LABEL, st.just("*"))
ODD = st.one_of(
    LABEL, st.sampled_from(["", "*", "a*", "..", "%61", "a@b", "a:1", "?", "#", "/", " "])
)


def naive(pattern: list[str], labels: list[str]) -> bool:
    """Label by label; a star is any one label."""
    if not pattern or not labels:
        return not pattern and not labels
    return pattern[0] in ("*", labels[0]) and naive(pattern[1:], labels[1:])


@given(st.lists(WILD, min_size=1, max_size=4), st.lists(LABEL, min_size=1, max_size=4))
def test_wildcards(pattern: list[str], labels: list[str]) -> None:
    expected = naive(pattern, labels)
    dots, name = ".".join(pattern), ".".join(labels)
    slashes, path = "/".join(pattern), "/".join(labels)
    cases = [
        (f"dns={dots}", Identity(dns=(name,)), expected),
        (f"email=me@{dots}", Identity(emails=(f"me@{name}",)), expected),
        (f"uri=s://h/{slashes}", Identity(uris=(f"s://h/{path}",)), expected),
        (f"uri=s://{dots}/p", Identity(uris=(f"s://{name}/p",)), expected),
        (f"cn={dots}", Identity(common_name=name), expected or pattern == ["*"]),
        (f"psk={dots}", Identity(psk=name), expected or pattern == ["*"]),
    ]
    for text, identity, meant in cases:
        rule = Rule.parse("--allow", text)
        assert rule.matches(identity) == meant, text
        assert rule.denies(identity) == meant or "cn" in text, text


@given(st.lists(WILD, min_size=1, max_size=4), st.lists(ODD, min_size=1, max_size=4))
def test_odd_names_meet_no_star(pattern: list[str], labels: list[str]) -> None:
    """Whatever a rule lets in by a star is a plain label each; and what it lets in it can deny."""
    dots, slashes = ".".join(pattern), "/".join(pattern)
    plain = all(label in {"a", "b", "ab", "a-b", "x1"} for label in labels)
    for text, identity in (
        (f"dns={dots}", Identity(dns=(".".join(labels),))),
        (f"uri=s://h/{slashes}", Identity(uris=("s://h/" + "/".join(labels),))),
        (f"uri=s://{dots}/p", Identity(uris=("s://" + ".".join(labels) + "/p",))),
    ):
        rule = Rule.parse("--allow", text)
        met = rule.matches(identity)
        if "*" in pattern and met and text[0] == "d":
            assert plain or labels[-1] == "", (text, identity)
        if naive(pattern, labels) and plain:
            assert met
        assert rule.denies(identity) >= met
