"""Part of `check`: rules that can never match, or add nothing.

Settings refuses the kinds that no client can have (a uid without a Unix listener, a certificate's
name without a CA, ...). Here is what follows from rules about each other. A rule is "void" if
no client whom it is about can have anything from it. Found is what follows from two rules, not from
three: "void" is never said of a rule that has an effect, and not of every rule that has none.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from typing import Final

from gateway.access import ExportRules, Network, Rule, Rules
from gateway.check.report import Report
from gateway.identity import Identity
from gateway.rule import ANYBODY

_ANY: Final = "*"
# A client has one of these at most, so two rules about different ones exclude each other. It may
# have several names of the other kinds.
_SINGLE: Final = frozenset({"cn", "dn", "sha256", "spki", "psk", "uid"})
_WHOLE: Final = frozenset({"cn", "psk"})  # where a lone `*` is whatever there is


def check_rules(report: Report, rules: Rules) -> None:
    """All rules. The same rule twice, one that is void, and lists that let nobody in."""
    before = len(report.verdicts)
    _check_addresses(report, rules.allow_from, rules.deny_from)
    _check_list(report, "allow", rules.allow)
    _check_list(report, "deny", rules.deny)
    alive = [rule for rule in rules.allow if not _denied(report, "allow", rule, rules.deny)]
    if rules.allow and not alive:
        report.bad("allow", "every rule is denied again: nobody can enter")
    for rule in rules.deny:
        if rule.parts == (_ANY,) and rule.kind in _WHOLE:
            report.warn(f"deny {rule}", f"whoever has a {rule.kind} is denied: is it meant?")
    for export in rules.exports:
        _check_export(report, export, rules.deny, alive if rules.allow else None)
    count = len(rules.allow) + len(rules.deny) + len(rules.allow_from) + len(rules.deny_from)
    count += sum(len(one.read_write + one.read_only + one.deny) for one in rules.exports)
    if len(report.verdicts) == before and (count or rules.exports):
        tables = f" and {len(rules.exports)} exports" if rules.exports else ""
        report.ok("rules", f"{count} in all{tables}, none void or there twice")


def _check_list(report: Report, where: str, rules: Sequence[Rule]) -> None:
    """Rules of one list, which all say the same of those whom they are about."""
    for index, rule in enumerate(rules):
        if rule in rules[:index]:
            report.warn(f"{where} {rule}", "there twice")
            continue
        wider = next((one for one in rules if one != rule and covers(one, rule)), None)
        if wider is not None:
            report.warn(f"{where} {rule}", f"adds nothing to {wider}: which of them is meant?")


def _denied(report: Report, where: str, rule: Rule, deny: Sequence[Rule]) -> bool:
    by = next((one for one in deny if denies(one, rule)), None)
    if by is not None:
        report.warn(f"{where} {rule}", f"void: deny {by} takes all of it back; remove one of them")
    return by is not None


def _check_export(
    report: Report, export: ExportRules, deny: Sequence[Rule], allow: Sequence[Rule] | None
) -> None:
    """One table. `allow` are the global rules that are not void, None if there are none at all."""
    name = f'export "{export.name}"'
    lists = (("read-write", export.read_write), ("read-only", export.read_only))
    for mode, rules in lists:
        _check_list(report, f"{name} {mode}", rules)
    _check_list(report, f"{name} deny", export.deny)
    alive = 0
    for mode, rules in lists:
        for rule in rules:
            where = f"{name} {mode}"
            if _denied(report, where, rule, [*export.deny, *deny]):
                continue
            if allow is not None and not any(overlap(rule, one) for one in allow):
                report.warn(f"{where} {rule}", "void: no allow rule lets these clients enter")
                continue
            alive += 1
    for rule in export.read_only:
        writes = next((one for one in export.read_write if covers(one, rule)), None)
        if writes is not None:
            report.warn(
                f"{name} read-only {rule}", f"void: read-write {writes} lets these clients write"
            )
    if (export.read_write or export.read_only) and not alive:
        report.bad(name, "nobody can open it: all its rules are void")
    elif allow is not None and not allow:
        report.bad(name, "nobody can open it: nobody can enter")
    for rule in export.deny:
        if any(covers(one, rule) for one in deny):
            report.warn(f"{name} deny {rule}", "adds nothing: it is denied everywhere")


# ---------------------------------------------------------------- addresses


def _check_addresses(report: Report, allow: Sequence[Network], deny: Sequence[Network]) -> None:
    for where, networks in (("allow-from", allow), ("deny-from", deny)):
        for index, network in enumerate(networks):
            if network in networks[:index]:
                report.warn(f"{where} {network}", "there twice")
            elif any(one != network and _inside(network, one) for one in networks):
                report.warn(f"{where} {network}", "adds nothing: a larger network is there too")
    denied = tuple(_collapsed(deny))
    alive = [one for one in allow if not any(_inside(one, other) for other in denied)]
    for network in allow:
        if network not in alive:
            report.warn(f"allow-from {network}", "void: deny-from takes all of it back")
    if allow and not alive:
        report.bad("allow-from", "every network is denied again: nobody can connect by TCP")
    everything = {network.version for network in denied if network.prefixlen == 0}
    if everything == {4, 6}:
        report.bad("deny-from", "denies every address: nobody can connect by TCP")
    elif everything and not allow:
        report.warn("deny-from", f"denies every IPv{everything.pop()} address: is it meant?")


def _collapsed(networks: Sequence[Network]) -> Iterator[Network]:
    """Neighbours made one, so that what two of them cover together is seen to be covered."""
    yield from ipaddress.collapse_addresses(
        one for one in networks if isinstance(one, ipaddress.IPv4Network)
    )
    yield from ipaddress.collapse_addresses(
        one for one in networks if isinstance(one, ipaddress.IPv6Network)
    )


def _inside(one: Network, other: Network) -> bool:
    if isinstance(one, ipaddress.IPv4Network) and isinstance(other, ipaddress.IPv4Network):
        return one.subnet_of(other)
    if isinstance(one, ipaddress.IPv6Network) and isinstance(other, ipaddress.IPv6Network):
        return one.subnet_of(other)
    return False


# ---------------------------------------------------------------- two rules


def covers(wide: Rule, rule: Rule) -> bool:
    """Whether `wide` lets in everybody whom `rule` lets in."""
    if wide.kind == ANYBODY:
        return True
    if wide.kind != rule.kind:
        return False
    client = _only_client(rule)
    return _contains(wide, rule) if client is None else wide.matches(client)


def denies(deny: Rule, rule: Rule) -> bool:
    """Whether `deny` keeps out everybody whom `rule` lets in."""
    if deny.kind != rule.kind:
        return False
    client = _only_client(rule)
    return _contains(deny, rule) if client is None else deny.denies(client)


def _only_client(rule: Rule) -> Identity | None:
    """A rule without `*` is about one name: who has it, and nothing else. None for other rules.

    Whatever else a client has by that name does not take it out of the reach of another rule.
    """
    if _ANY in rule.parts:
        return None
    value = "".join(rule.parts)
    match rule.kind:
        case "cn":
            return Identity(common_name=value, common_names=(value,))
        case "dn":
            return Identity(rdns=rule.parts)
        case "dns":
            return Identity(dns=(value,))
        case "uri":
            return Identity(uris=(value,))
        case "email":
            return Identity(emails=(value,))
        case "sha256":
            return Identity(sha256=value)
        case "spki":
            return Identity(spki=value)
        case "psk":
            return Identity.of_psk(value)
        case _:
            return Identity(uid=int(value))


def _contains(wide: Rule, rule: Rule) -> bool:
    """The same for two patterns, part by part: `*` has all that `*` has."""
    if wide.parts == (_ANY,):
        return wide.kind in _WHOLE or wide.parts == rule.parts
    return len(wide.parts) == len(rule.parts) and all(
        one == other or (one == _ANY and not set(other) <= set("./?#@"))
        for one, other in zip(wide.parts, rule.parts, strict=True)
    )


def overlap(one: Rule, other: Rule) -> bool:
    """Whether a client can be there whom both are about."""
    if one.kind != other.kind or one.kind not in _SINGLE:
        return True  # a certificate may have both names
    if (_ANY,) in (one.parts, other.parts):
        return True
    return len(one.parts) == len(other.parts) and all(
        mine == theirs or _ANY in (mine, theirs)
        for mine, theirs in zip(one.parts, other.parts, strict=True)
    )
