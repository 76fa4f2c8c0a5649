"""Several exports, each with a mode, as one client may open them. Nothing else is there for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import SessionEnd
from gateway.nbd.constants import Info, Opt, Rep
from gateway.nbd.negotiation import Close, Send
from gateway.nbd.oldstyle import OldstyleHaggling
from gateway.nbd.pairing import (
    Answer,
    Granted,
    Listed,
    ListExports,
    Open,
    QueryContexts,
    Refused,
    Unavailable,
)
from gateway.nbd.policy import Export, ExportPolicy, Replies, agree
from gateway.nbd.upgrades import ALL_UPGRADES
from gateway.nbd.wire import ListedExport
from tests.nbd.front import Front, willing
from tests.nbd.support import (
    ALL_FEATURES,
    MIB,
    Reply,
    Tf,
    acked,
    all_cuts,
    info_data,
    info_text,
    listed,
    meta_data,
    option,
)

WRITER, READER = Export("disk"), Export("disk", read_only=True)
BACKUP = Export("backup", read_only=True)
TABLE = ExportPolicy(table=(WRITER, BACKUP), upgrades=ALL_UPGRADES)
NOT_OURS = ["", "other", "Disk", "disk ", "backup/", "d", "n" * 4096]
LIST, STRUCTURED = option(Opt.LIST), option(Opt.STRUCTURED_REPLY)


def about(number: int, name: str) -> bytes:
    """An option about an export."""
    match number:
        case Opt.EXPORT_NAME:
            return option(number, name.encode())
        case Opt.INFO | Opt.GO:
            return option(number, info_data(name))
        case _:
            return option(number, meta_data(name, ("base:allocation",)))


# -- names


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO])
@pytest.mark.parametrize("export", [WRITER, BACKUP])
def test_each_export_is_opened_by_its_own_name(number: int, export: Export) -> None:
    for pieces in all_cuts(about(number, export.name)):
        front = Front(policy=TABLE)
        assert front.say(*pieces)[-2 if number == Opt.GO else -1] == acked(number)
        (question,) = front.questions
        assert isinstance(question, Open)
        assert (question.name, question.go) == (export.name, number == Opt.GO)


@pytest.mark.parametrize("name", NOT_OURS)
@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO, Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_names_in_no_table_ask_nobody(number: int, name: str) -> None:
    """(H10): the upstream is neither dialled nor told."""
    front = Front(policy=TABLE)
    front.say(STRUCTURED)
    del front.questions[:]
    assert front.say(about(number, name)) == [Reply(number, Rep.ERR_UNKNOWN)]
    assert not front.questions


@pytest.mark.parametrize("name", NOT_OURS)
def test_export_name_of_no_table_closes(name: str) -> None:
    front = Front(policy=TABLE)
    assert front.say(about(Opt.EXPORT_NAME, name)) == [Close(SessionEnd.REFUSED)]
    assert not front.questions


@pytest.mark.parametrize("number", [Opt.INFO, Opt.GO, Opt.LIST_META_CONTEXT, Opt.SET_META_CONTEXT])
def test_not_allowed_and_not_there_are_the_same_bytes(number: int) -> None:
    """One table has the export for others, the other never heard of it."""
    answers = []
    for policy in (
        ExportPolicy(table=(WRITER,)),  # "backup" is somebody else's
        ExportPolicy(table=(WRITER, Export("unrelated"))),
    ):
        front = Front(Refused(Rep.ERR_UNKNOWN), policy=policy)
        front.say(option(Opt.EXTENDED_HEADERS))
        front.machine._structured = front.machine._chunks_below = True
        answers.append(front.effects(about(number, "backup")))
        answers.append(front.effects(about(number, "never-heard-of")))
        answers.append(front.effects(about(number, "disk")))  # ours, and the upstream lacks it
    assert all(isinstance(one, Send) for answer in answers for one in answer)
    assert all(answer == answers[0] for answer in answers)


def test_the_empty_name_is_only_what_is_called_so() -> None:
    front = Front(policy=ExportPolicy(table=(WRITER, Export(""))))
    front.say(about(Opt.INFO, ""))
    assert front.questions == [Open("", (), go=False)]
    assert TABLE.find("") is None


def test_canonical_name_is_that_of_the_table() -> None:
    answer = Granted(0, 1, None, ((1, info_text(1, "secret-path")),))
    front = Front(answer, policy=TABLE)
    said = front.say(option(Opt.INFO, info_data("backup", (Info.NAME,))))
    assert said[1] == Reply(Opt.INFO, Rep.INFO, info_text(1, "backup"))


def test_an_oldstyle_client_cannot_choose() -> None:
    with pytest.raises(AssertionError):
        OldstyleHaggling(TABLE)


# -- modes


def flags_of(front: Front, name: str) -> int:
    front.say(about(Opt.GO, name))
    assert front.terms is not None
    return int(front.terms.flags)


@pytest.mark.parametrize("extended", [False, True])
def test_read_only_is_by_export(extended: bool) -> None:
    """The same flags as --read-only has them, and the other export notices nothing."""
    for name, read_only in (("disk", False), ("backup", True)):
        front, alone = Front(policy=TABLE), Front(
            policy=ExportPolicy(name, read_only, ALL_UPGRADES)
        )  # fmt: skip
        if extended:
            for one in (front, alone):
                one.say(option(Opt.EXTENDED_HEADERS))
        assert flags_of(front, name) == flags_of(alone, name)
        assert front.terms == alone.terms
        assert front.terms is not None
        assert front.terms.read_only is read_only
        assert bool(front.terms.flags & Tf.SEND_WRITE_ZEROES) is not read_only


def test_info_and_go_of_different_exports() -> None:
    front = Front(policy=TABLE)
    for name, read_only in (("backup", True), ("disk", False), ("backup", True)):
        export, ack = front.say(about(Opt.INFO, name))
        assert ack == acked(Opt.INFO)
        assert isinstance(export, Reply)
        assert bool(export.data[-1] & Tf.READ_ONLY) is read_only
    assert flags_of(front, "disk") & Tf.READ_ONLY == 0


def test_terms_of_an_export_that_may_not_be_opened_are_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError):
        agree(TABLE, Granted(MIB, ALL_FEATURES), name="other", replies=Replies())


# -- LIST


FULL = (
    ListedExport("other", "of somebody else"),
    ListedExport("backup", "of last night"),
    ListedExport("disk", "a disk"),
    ListedExport("disk", "the same again"),
)


@pytest.mark.parametrize(
    ("table", "answer", "names"),
    [
        (TABLE.table, Listed(FULL), [FULL[2], FULL[1]]),
        ((BACKUP,), Listed(FULL), [FULL[1]]),
        (TABLE.table, Listed(FULL[:2]), [FULL[1]]),
        (TABLE.table, Listed(FULL[:1]), []),
        (TABLE.table, Listed(()), []),
        (TABLE.table, Refused(Rep.ERR_UNSUP), [("disk", ""), ("backup", "")]),
        (TABLE.table, Refused(Rep.ERR_POLICY), [("disk", ""), ("backup", "")]),
        (TABLE.table, Refused(Rep.ERR_SHUTDOWN), [("disk", ""), ("backup", "")]),
        (TABLE.table, Unavailable(), [("disk", ""), ("backup", "")]),
    ],
)
def test_list_shows_what_this_client_may_open(
    table: tuple[Export, ...], answer: Answer, names: list[tuple[str, str]]
) -> None:
    """In the table's order, in the upstream's words."""
    for pieces in all_cuts(LIST):
        front = Front(answer, policy=ExportPolicy(table=table))
        assert front.say(*pieces) == [
            *(Reply(Opt.LIST, Rep.SERVER, listed(*one)) for one in names),
            acked(Opt.LIST),
        ]
        assert front.questions == [ListExports()]


def test_contexts_are_those_of_the_export_asked_for() -> None:
    front = Front(policy=TABLE)
    front.say(STRUCTURED)
    front.say(option(Opt.SET_META_CONTEXT, meta_data("backup", ("base:allocation",))))
    assert front.questions[-1] == QueryContexts("backup", ("base:allocation",), select=True)
    front.say(about(Opt.GO, "disk"))
    assert front.terms is not None
    assert not front.terms.contexts


# -- after a change


ANY, ANY_READ_ONLY = ExportPolicy(None), ExportPolicy(None, read_only=True)


@pytest.mark.parametrize(
    ("policy", "export", "opens"),
    [
        (TABLE, WRITER, True),
        (TABLE, READER, True),  # it was told read-only, and stays so
        (TABLE, BACKUP, True),
        (TABLE, Export("backup"), False),
        (TABLE, Export("other"), False),
        (TABLE, Export("", read_only=True), False),
        (ExportPolicy(table=()), READER, False),
        (ExportPolicy("disk"), WRITER, True),
        (ExportPolicy("disk"), Export(""), False),  # that is another export of the upstream
        (ExportPolicy("disk", read_only=True), WRITER, False),
        (ExportPolicy("disk", read_only=True), READER, True),
        (ExportPolicy(""), Export(""), True),
        (ANY, WRITER, True),
        (ANY_READ_ONLY, WRITER, False),
        (ANY_READ_ONLY, READER, True),
    ],
)
def test_whether_what_is_open_may_stay_so(
    policy: ExportPolicy, export: Export, opens: bool
) -> None:
    assert policy.opens(export) is opens


@pytest.mark.parametrize(
    ("new", "old", "covers"),
    [
        (TABLE, TABLE, True),
        (TABLE, ExportPolicy(table=(BACKUP,)), True),
        (ExportPolicy(table=(BACKUP,)), TABLE, False),
        (TABLE, ExportPolicy("disk"), True),
        (ExportPolicy("disk"), TABLE, False),
        (TABLE, ANY, False),
        (ANY, TABLE, True),
        (ANY, ANY_READ_ONLY, True),
        (ANY_READ_ONLY, ANY, False),
        (ANY_READ_ONLY, ANY_READ_ONLY, True),
        (ANY_READ_ONLY, ExportPolicy(table=(BACKUP,)), True),
        (ExportPolicy("disk", read_only=True), ExportPolicy("disk"), False),
    ],
)
def test_whether_nothing_was_lost(new: ExportPolicy, old: ExportPolicy, covers: bool) -> None:
    assert new.covers(old) is covers


TABLES = st.lists(
    st.builds(Export, st.sampled_from(["", "a", "b", "c"]), st.booleans()),
    unique_by=lambda one: one.name,
    max_size=4,
).map(lambda exports: ExportPolicy(table=tuple(exports)))
POLICIES = TABLES | st.builds(ExportPolicy, st.sampled_from([None, "", "a", "b"]), st.booleans())


@given(new=POLICIES, old=POLICIES, name=st.sampled_from(["", "a", "b", "c", "d"]))
def test_who_lost_nothing_can_open_what_it_could(
    new: ExportPolicy, old: ExportPolicy, name: str
) -> None:
    before = old.find(name)
    if new.covers(old) and before is not None:
        after = new.find(before.name)
        assert after is not None
        assert after.name == before.name
        assert before.read_only or not after.read_only


@given(policy=POLICIES, names=st.lists(st.sampled_from(["", "a", "b", "c", "d"]), max_size=6))
def test_nothing_but_the_policy_s_exports_is_ever_asked_for(
    policy: ExportPolicy, names: list[str]
) -> None:
    """And each exactly when a client may open it, read-only or not as it says."""
    front = Front(willing, policy=policy)
    for name in names:
        del front.questions[:]
        found = policy.find(name)
        said = front.say(about(Opt.INFO, name))
        if found is None:
            assert (said, front.questions) == ([Reply(Opt.INFO, Rep.ERR_UNKNOWN)], [])
            continue
        (question,) = front.questions
        assert isinstance(question, Open)
        assert question.name == found.name
        assert isinstance(said[0], Reply)
        assert bool(said[0].data[-1] & Tf.READ_ONLY) is found.read_only
