"""gateway.admission: what rules and settings together let one client do, and what it loses."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from gateway.access import ExportRules, Rule, Rules
from gateway.admission import Admission, policy_of, proven_by_kernel
from gateway.errors import Refusal
from gateway.identity import Identity
from gateway.limits import Limits
from gateway.nbd.policy import Export, ExportPolicy
from gateway.nbd.upgrades import NO_UPGRADES
from gateway.settings import Settings
from gateway.trust import Trust
from tests.session_rig import rules

VM1, VM2 = Identity(common_name="vm1"), Identity(common_name="vm2")
WRITER = rules("cn=vm1")
READER = rules("cn=vm2")
DISK = ExportRules("disk", read_write=WRITER, read_only=READER)
LOGS = ExportRules("logs", read_only=WRITER)
OPEN = ExportRules("open", read_write=(Rule.anybody(),))


def settings(**changes: object) -> Settings:
    return Settings("/run/up.sock", None, upgrades=NO_UPGRADES, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "who", "expected"),
    [
        (Rules(), VM1, ExportPolicy("disk")),
        (Rules(), Identity(), ExportPolicy("disk")),
        (Rules(allow=WRITER), VM1, ExportPolicy("disk")),
        (Rules(allow=WRITER), VM2, None),
        (Rules(allow=WRITER), Identity(), None),
        (Rules(deny=WRITER), VM1, None),
        (Rules(exports=(DISK,)), VM1, ExportPolicy("disk")),
        (Rules(exports=(DISK,)), VM2, ExportPolicy("disk", read_only=True)),
        (Rules(exports=(DISK,)), Identity(), None),
        (Rules(exports=(DISK,), deny=READER), VM2, None),
        (Rules(exports=(OPEN,)), Identity(), ExportPolicy("open")),
        (Rules(exports=(OPEN,), allow=WRITER), VM2, None),
        (
            Rules(exports=(LOGS, DISK)),
            VM1,
            ExportPolicy(table=(Export("logs", read_only=True), Export("disk"))),
        ),
        # One of several: the empty name is nothing then.
        (Rules(exports=(LOGS, DISK)), VM2, ExportPolicy(table=(Export("disk", read_only=True),))),
        (Rules(exports=(LOGS, DISK)), Identity(), None),
    ],
)
def test_what_may_be_opened(given: Rules, who: Identity, expected: ExportPolicy | None) -> None:
    assert policy_of(given, who, settings(export="disk")) == expected
    read_only = policy_of(given, who, settings(export="disk", read_only=True))
    assert (read_only is None) is (expected is None)
    if read_only is not None:
        assert all(one.read_only for one in read_only.exports or ())


def test_any_export() -> None:
    policy = policy_of(Rules(), VM1, settings(export=None, read_only=True))
    assert policy == ExportPolicy(None, read_only=True)


def test_whoever_has_no_rights_loses_none() -> None:
    """Before it is admitted, and if it may open nothing."""
    admission = Admission(settings())
    nobody = Trust(None, Rules(allow=rules("cn=nobody")))
    assert admission.objection(nobody) == ""
    assert admission.admit(VM1, nobody.rules) is None
    assert admission.objection(nobody) == ""
    assert admission.barred.endswith(" may not open anything here")


def test_who_is_one_too_many_has_no_rights_either() -> None:
    admission = Admission(settings(limits=Limits(clients_per_identity=3)))
    assert admission.admit(Identity(psk="vm1"), Rules()) is not None
    admission.crowded()
    assert admission.policy is None
    assert admission.refusal is Refusal.TOO_MANY_CLIENTS
    assert admission.barred == "too many connections of psk:vm1: 3 at a time are allowed"
    assert admission.objection(Contrary(None, Rules())) == ""


class Contrary(Trust):
    """Objects to those whom its rules let in."""

    def objection(self, identity: Identity) -> Refusal | None:
        return Refusal.NOT_ALLOWED


def test_an_objection_counts_whatever_the_rules_say() -> None:
    admission = Admission(settings())
    assert admission.admit(VM1, Rules()) is not None
    assert admission.objection(Trust(None, Rules())) == ""
    assert admission.objection(Contrary(None, Rules())).startswith("not_allowed: ")


def test_name_of_an_export_stays_on_its_line() -> None:
    name = "a\nINFO forged" + 200 * "x"
    admission = Admission(settings())
    admission.admit(VM1, Rules(exports=(ExportRules(name, read_write=(Rule.anybody(),)), OPEN)))
    admission.open(name, read_only=False)
    objection = admission.objection(Trust(None, Rules(exports=(OPEN,))))
    assert objection.isprintable()
    assert len(objection) < 200


class Sock:
    """Who is at its other end."""

    family = socket.AF_UNIX

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option, size) == (socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return struct.pack("iII", 4711, 1000, 4_294_967_294)


def test_user_and_group() -> None:
    proven = proven_by_kernel(Sock(), VM1)  # type: ignore[arg-type]
    assert (proven.common_name, proven.uid, proven.gid) == ("vm1", 1000, 4_294_967_294)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        proven = proven_by_kernel(ours, Identity())
    assert (proven.uid, proven.gid) == (os.getuid(), os.getgid())
    with socket.socket() as tcp:
        assert proven_by_kernel(tcp, VM1) is VM1
