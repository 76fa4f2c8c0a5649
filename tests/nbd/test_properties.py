"""Any bytes in any cuts: effects or a PeerError, nothing else, in bounded memory, and the same
effects whatever the cuts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import PeerError
from gateway.nbd.constants import Cmd, Opt
from gateway.nbd.haggling import ExportPolicy
from gateway.nbd.handshake import MAX_REPLY_BYTES, MAX_REPLY_DATA, Greeted, Handshake
from gateway.nbd.negotiation import (
    MAX_OPTION_DATA,
    Close,
    Effect,
    EnterTransmission,
    Greeting,
    PlainHaggling,
    StartTLS,
)
from gateway.nbd.pairing import Answer, Terms
from gateway.nbd.replies import MAX_STATUS_DATA
from tests.nbd import strategies as some
from tests.nbd.front import Front
from tests.nbd.server import Server
from tests.nbd.support import (
    IHAVEOPT,
    OPTION,
    Reply,
    Req,
    cut,
    said,
)
from tests.nbd.walker import Seen, Walker, joined, parse_replies

policies = st.builds(ExportPolicy, st.sampled_from([None, "", "disk"]), st.booleans())


class Outcome:
    """What came of feeding these pieces, up to the first that ended the machine."""

    def __init__(
        self,
        receive: Callable[[bytes], list[Effect]],
        pieces: Iterable[bytes],
        ends: type[Effect] | tuple[type[Effect], ...],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.effects: list[Effect] = []
        self.error: str | None = None
        self.ended = False
        for piece in pieces:
            try:
                effects = receive(piece)
            except PeerError as error:
                self.error = str(error)
                break
            self.effects += effects
            self.ended = any(isinstance(one, ends) for one in effects)
            if self.ended:
                assert isinstance(effects[-1], ends), "effects behind the end"
                break
            check()


def same(whole: Outcome, cut: Outcome) -> None:
    """The same error, or the same effects. Effects just before an error may be lost with it."""
    assert whole.error == cut.error
    assert whole.error is None or whole.error.startswith("client: ")
    shorter, longer = sorted([whole.effects, cut.effects], key=len)
    assert longer[: len(shorter)] == shorter
    assert whole.error is not None or len(shorter) == len(longer)


@settings(max_examples=200)
@given(st.booleans(), some.greeting_answers, some.cuts)
def test_greeting(tls_required: bool, raw: bytes, cuts: list[int]) -> None:
    def outcome(pieces: list[bytes]) -> Outcome:
        machine = Greeting(tls_required=tls_required)
        return Outcome(machine.receive, pieces, object)  # type: ignore[arg-type]

    one = outcome([raw])
    same(one, outcome(cut(raw, cuts)))
    assert len(one.effects) == (len(raw) >= 4 and one.error is None)


def options_in(raw: bytes) -> list[int]:
    """The numbers of the whole options at the beginning of these bytes."""
    numbers = []
    while len(raw) >= OPTION.size:
        magic, number, length = OPTION.unpack_from(raw)
        if magic != IHAVEOPT or length > len(raw) - OPTION.size:
            break
        numbers.append(number)
        raw = raw[OPTION.size + length :]
    return numbers


def each_has_one_answer(raw: bytes, outcome: Outcome) -> None:
    """(H3): every option but EXPORT_NAME has one final reply, which echoes its number."""
    answered = [
        one.option
        for one in said(outcome.effects)
        if isinstance(one, Reply) and (one.kind == 1 or one.kind & 1 << 31)
    ]
    sent = options_in(raw)
    assert answered == sent[: len(answered)]
    if outcome.error is None and not outcome.ended:
        assert answered == sent


@settings(max_examples=150)
@given(some.option_streams, some.cuts, st.booleans())
def test_plain_haggling(raw: bytes, cuts: list[int], shutdown: bool) -> None:
    def outcome(pieces: list[bytes]) -> Outcome:
        machine = PlainHaggling()
        if shutdown:
            machine.shutdown()

        def check() -> None:
            assert len(machine._options.inbox) < OPTION.size

        found = Outcome(machine.receive, pieces, (StartTLS, Close), check)
        each_has_one_answer(raw, found)
        return found

    whole, cutted = outcome([raw]), outcome(cut(raw, cuts))
    if whole.error == "client: bytes behind NBD_OPT_STARTTLS" and cutted.error is None:
        assert cutted.effects[-1] == StartTLS()  # the cut was just there: T4 is for the next layer
    else:
        same(whole, cutted)


@settings(max_examples=150)
@given(
    policies,
    st.booleans(),
    some.option_streams,
    some.cuts,
    st.lists(some.answers, min_size=1, max_size=4),
)
def test_haggling(
    policy: ExportPolicy,
    no_zeroes: bool,
    raw: bytes,
    cuts: list[int],
    answers: list[dict[type, Answer]],
) -> None:
    def outcome(pieces: list[bytes]) -> tuple[Outcome, list[object]]:
        front = Front(policy=policy, no_zeroes=no_zeroes)

        def answer(question: object) -> Answer:
            return answers[(len(front.questions) - 1) % len(answers)][type(question)]

        def receive(piece: bytes) -> list[Effect]:
            return front.act(front.machine.receive(piece))

        def check() -> None:
            assert len(front.machine._options.inbox) < OPTION.size + MAX_OPTION_DATA

        front.upstream = answer
        found = Outcome(receive, pieces, (EnterTransmission, Close), check)
        each_has_one_answer(raw, found)
        assert len(front.questions) <= len(options_in(raw))
        return found, list(front.questions)

    whole, asked = outcome([raw])
    cutted, asked_of_cut = outcome(cut(raw, cuts))
    same(whole, cutted)
    assert asked == asked_of_cut


def greet_and_ask(number: int, fixed: bool) -> Handshake:
    machine = Handshake()
    flags = b"\0\x03" if fixed else b"\0\x02"
    assert machine.receive(b"NBDMAGICIHAVEOPT" + flags)
    some.QUESTIONS[number](machine)  # type: ignore[index]
    return machine


def answer_to(machine: Handshake, pieces: list[bytes]) -> Greeted | Answer | str | None:
    for piece in pieces:
        try:
            result = machine.receive(piece)
        except PeerError as error:
            return str(error)
        assert len(machine._inbox) <= 20 + MAX_REPLY_DATA
        assert machine._collected_bytes <= MAX_REPLY_BYTES
        if result is not None:
            return result
    return None


def same_answer(
    whole: Greeted | Answer | str | None, cutted: Greeted | Answer | str | None
) -> None:
    """Bytes behind an answer are noticed together with it, or with the next question."""
    assert not isinstance(whole, str) or whole.startswith("upstream: ")
    if whole == "upstream: bytes that nobody asked for":
        assert cutted is not None
    else:
        assert cutted == whole


@settings(max_examples=150)
@given(some.greetings, some.noise, some.cuts)
def test_greeting_of_an_upstream(greeting: bytes, behind: bytes, cuts: list[int]) -> None:
    for raw in (greeting, greeting + behind):
        same_answer(
            answer_to(Handshake(), [raw] if raw else []), answer_to(Handshake(), cut(raw, cuts))
        )


@settings(max_examples=60)
@given(st.data(), some.cuts)
def test_answer_of_an_upstream(data: st.DataObject, cuts: list[int]) -> None:
    for number in some.QUESTIONS:
        raw = data.draw(some.replies_to(number))
        whole = answer_to(greet_and_ask(number, True), [raw] if raw else [])
        same_answer(whole, answer_to(greet_and_ask(number, True), cut(raw, cuts)))


@given(st.binary(max_size=150), some.cuts)
def test_export_name_answer_of_an_upstream_without_fixed_newstyle(
    raw: bytes, cuts: list[int]
) -> None:
    whole = answer_to(greet_and_ask(Opt.EXPORT_NAME, False), [raw] if raw else [])
    same_answer(whole, answer_to(greet_and_ask(Opt.EXPORT_NAME, False), cut(raw, cuts)))


# -- transmission


@settings(max_examples=150)
@given(some.some_terms, some.request_streams, some.cuts)
def test_requests(terms: Terms, raw: bytes, cuts: list[int]) -> None:
    whole, cutted = Walker(terms).requests([raw]), Walker(terms).requests(cut(raw, cuts))
    assert cutted.upstream == whole.upstream
    assert cutted.client == whole.client
    assert cutted.machine.client_done == whole.machine.client_done
    assert str(cutted.machine.client_fault) == str(whole.machine.client_fault)
    assert cutted.machine.in_flight == whole.machine.in_flight
    assert len(whole.upstream) <= len(raw)


def spoilt(raw: bytes, rng: random.Random) -> bytes:
    """These bytes with a little accident, or none."""
    at = rng.randrange(len(raw) + 1)
    flipped = bytes([raw[at] ^ 1 << rng.randrange(8)]) if at < len(raw) else b""
    return rng.choice(
        [
            raw,
            raw[:at],
            raw[:at] + flipped + raw[at + 1 :],
            raw[:at] + rng.randbytes(rng.randrange(30)) + raw[at:],
            raw[:at] + raw[at + rng.randrange(30) :],
            raw + raw[at : at + 40],
        ]
    )


def some_replies(relay: Walker, terms: Terms, seed: int) -> bytes:
    """What an upstream may say to all that was forwarded, perhaps with an accident in it."""
    rng = random.Random(seed)
    server = Server(terms, rng, shutdown_odds=0.05)
    server.hear(bytes(relay.upstream))
    said = [server.speak() for _ in range(rng.randrange(20)) if server.waiting]
    return spoilt(b"".join(said), rng)


@settings(max_examples=150)
@given(
    some.some_terms,
    st.lists(some.requests, max_size=8),
    st.integers(0, 2**32),
    some.cuts,
    st.booleans(),
)
def test_replies(
    terms: Terms, requests: list[Req], seed: int, cuts: list[int], mid_request: bool
) -> None:
    sent = b"".join(one._replace(cookie=100 + at).pack() for at, one in enumerate(requests))
    if mid_request:
        sent = sent[:-1]

    def outcome(*cuts: int) -> tuple[list[Seen], int, str, bool]:
        relay = Walker(terms).requests([sent])
        relay.client.clear()
        waiting = relay.machine.in_flight
        relay.replies(cut(some_replies(relay, terms, seed), cuts))
        assert len(relay._from_upstream) <= 20 + MAX_STATUS_DATA or relay.machine.upstream_fault
        assert len(relay.machine._from_upstream._chunked) <= relay.machine.in_flight <= waiting
        lengths = {100 + at: one.length for at, one in enumerate(requests) if one.kind == 0}
        seen = parse_replies(bytes(relay.client), lengths, cut_off=True)
        return (
            joined(seen),
            relay.machine.in_flight,
            str(relay.machine.upstream_fault),
            relay.machine.upstream_ends,
        )

    assert outcome(*cuts) == outcome()


@settings(max_examples=150)
@given(
    some.some_terms,
    st.lists(some.requests, max_size=8),
    st.integers(0, 2**32),
    some.cuts,
)
def test_lose_upstream_after_any_replies(
    terms: Terms, requests: list[Req], seed: int, cuts: list[int]
) -> None:
    """Whatever the upstream said before, everybody has had one final reply in the end."""
    relay = Walker(terms)
    numbered = {100 + at: one._replace(cookie=100 + at) for at, one in enumerate(requests)}
    lengths = {cookie: one.length for cookie, one in numbered.items() if one.kind == Cmd.READ}
    relay.requests([one.pack() for one in numbered.values()])
    relay.replies(cut(some_replies(relay, terms, seed), cuts))
    if relay.lose_upstream():
        seen = parse_replies(bytes(relay.client), lengths)
        assert sorted(one.cookie for one in seen if one.final) == sorted(numbered)
        assert relay.machine.idle
    else:
        *_, last = parse_replies(bytes(relay.client), lengths, cut_off=True)
        assert last.kind is None, "a chunk can be filled up"
