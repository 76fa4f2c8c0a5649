"""Which test stands for which bug of others. Each id has at least one, or no code to be wrong.

The ids are those of CVE, of issues and of commits of the projects in whose code the bug was.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTILE, PEERS = "tests/hostile", "tests/peers"

TESTS: dict[str, tuple[str, ...]] = {
    "CVE-2021-3716 nbdkit": (  # plaintext options that survive STARTTLS
        f"{HOSTILE}/test_state_before_starttls.py::test_nothing_survives",
        f"{HOSTILE}/test_state_before_starttls.py::test_contexts_need_structured_replies_from_inside",
        f"{HOSTILE}/test_extended_headers_and_older_options.py::test_what_was_said_in_plaintext",
    ),
    "nbdkit 282c3b03": (  # the payload of a refused option was taken for the next
        f"{HOSTILE}/test_info_payload_before_tls.py::test_starttls_works_after_two_refusals",
    ),
    "nostarttls": (  # what shares a segment with STARTTLS
        f"{HOSTILE}/test_bytes_behind_starttls.py::test_forged_plaintext",
        f"{HOSTILE}/test_bytes_behind_starttls.py::test_client_hello_too_early",
        f"{HOSTILE}/test_bit_flips_before_tls.py::test_every_bit",
    ),
    "CVE-2019-14850 nbdkit": (  # the disk is opened for who has proved nothing
        f"{HOSTILE}/test_unauthenticated_crowd.py::test_no_connection_to_the_upstream",
    ),
    "CVE-2019-14851 nbdkit": (  # INFO before GO
        f"{HOSTILE}/test_info_before_go.py::test_other_name_in_between",
        f"{HOSTILE}/test_info_before_go.py::test_other_name_at_last",
        f"{HOSTILE}/test_info_before_go.py::test_many_times",
        f"{HOSTILE}/test_info_before_go.py::test_go_fails_then_succeeds",
    ),
    "CVE-2021-20286 libnbd": (  # a server that dies in the handshake
        f"{HOSTILE}/test_upstream_closes_during_handshake.py::test_every_byte",
        f"{HOSTILE}/test_bit_flips_of_the_upstream.py::test_every_truncation",
    ),
    "CVE-2022-26495 nbd-server": (  # name length 2^32 - 1
        f"{HOSTILE}/test_lying_name_lengths.py::test_matrix",
    ),
    "CVE-2022-26496 nbd-server": (  # name longer than its option
        f"{HOSTILE}/test_lying_name_lengths.py::test_matrix",
        f"{HOSTILE}/test_lying_name_lengths.py::test_off_by_little",
    ),
    "nbd-server 7a64238": (  # the end of TLS in a loop, at full speed
        f"{HOSTILE}/test_vanishing_inside_a_record.py::test_while_haggling",
        f"{HOSTILE}/test_vanishing_inside_a_record.py::test_in_transmission",
        f"{HOSTILE}/test_vanishing_inside_a_record.py::test_after_disc",
        f"{HOSTILE}/test_tls_close_notify.py::test_inside_a_request_header",
    ),
    "CVE-2024-7409 qemu": (  # silent clients, and the end with such
        f"{HOSTILE}/test_silent_sockets.py::test_a_good_client_gets_in_and_the_silent_are_dropped",
        f"{HOSTILE}/test_floods.py::test_a_good_client_gets_in",
        f"{HOSTILE}/test_sigterm_with_half_handshakes.py::test_half_handshakes",
    ),
    "CVE-2017-15118 qemu": (  # export names beyond 256 bytes
        f"{HOSTILE}/test_bad_export_names.py::test_legal_but_unknown",
        f"{HOSTILE}/test_bad_export_names.py::test_illegal",
    ),
    "CVE-2017-15119 qemu": (  # huge options
        f"{HOSTILE}/test_huge_option_length.py::test_more_than_will_ever_come",
        f"{HOSTILE}/test_huge_option_length.py::test_all_of_it_comes",
    ),
    "CVE-2023-5215 libnbd": (  # a negative size
        f"{HOSTILE}/test_upstream_absurd_sizes.py::test_refused",
        f"{HOSTILE}/test_upstream_absurd_sizes.py::test_nothing_at_all",
        f"{HOSTILE}/test_bit_flips_of_the_upstream.py::test_every_bit",
    ),
    "CVE-2023-5871 libnbd": (  # block status that nobody can have meant
        f"{HOSTILE}/test_upstream_bad_block_status.py::test_no_success",
        f"{HOSTILE}/test_upstream_bad_block_status.py::test_odd_but_legal",
    ),
    "libnbd 2023-07": (  # no extents, or too many
        f"{HOSTILE}/test_upstream_bad_block_status.py::test_no_success",
        f"{HOSTILE}/test_upstream_bad_block_status.py::test_more_than_2_20_extents",
        f"{HOSTILE}/test_upstream_bad_block_status.py::test_as_many_as_are_allowed",
    ),
    "CVE-2022-0485 nbdcopy": (  # errors that nobody hears of
        f"{PEERS}/test_upstream_errors.py::test_each_error_number",
        f"{PEERS}/test_upstream_errors.py::test_programs_fail_when_a_request_failed",
    ),
    "CVE-2025-47711 nbdkit": (  # an extent longer than the request
        f"{PEERS}/test_faults_full.py::test_extents_of_8_gib",
        f"{HOSTILE}/test_upstream_bad_block_status.py::test_odd_but_legal",
        f"{HOSTILE}/test_upstream_bad_block_status.py::test_req_one_violated",
    ),
    "CVE-2025-47712 nbdkit": (  # lengths near 2^32
        f"{PEERS}/test_faults_full.py::test_extents_of_8_gib",
        f"{HOSTILE}/test_upstream_bad_block_status.py::test_nearly_4_gib",
    ),
    "nbdkit 9d82aa4f": (  # reads outstanding, and the client gone
        f"{HOSTILE}/test_reset_with_reads_outstanding.py::test_the_other_client_gets_its_own_data",
        f"{PEERS}/test_faults_clients_killed.py::test_killed",
    ),
    "nbdkit 1.40": (  # a check of names that was not there, addresses of an unknown family
        f"{PEERS}/test_access_refusals.py::test_who_may_open_nothing_is_told_so_inside_tls",
        f"{HOSTILE}/test_refused_by_rules.py::test_every_option_and_then_some",
        "tests/test_access.py::test_what_is_no_address",
    ),
    "CVE-2023-40217 CPython": (  # plaintext before the handshake, taken for TLS
        f"{HOSTILE}/test_plaintext_then_close_after_ack.py::test_nothing_is_served",
        f"{HOSTILE}/test_plaintext_after_ack.py::test_no_downgrade",
    ),
    "CVE-2013-7441 nbd-server": (  # gone during the negotiation
        f"{HOSTILE}/test_vanishing_at_every_byte.py::test_plain_part",
        f"{HOSTILE}/test_vanishing_at_every_byte.py::test_client_hello",
        f"{HOSTILE}/test_cut_at_every_byte_inside_tls.py::test_of_the_tls_handshake",
        f"{HOSTILE}/test_cut_at_every_byte_inside_tls.py::test_of_options_and_requests",
    ),
    "CVE-2015-0847 nbd-server": (  # signals
        f"{HOSTILE}/test_signal_storm.py::test_storm",
    ),
    "nbd issue 126": (  # connections are counted, and never discounted
        f"{HOSTILE}/test_connection_slots_leak.py::test_limit_is_not_used_up",
        f"{HOSTILE}/test_floods.py::test_no_place_is_used_up_by_ten_times_every_bound",
    ),
    "CVE-2011-1473 TLS": (  # renegotiation without end
        f"{HOSTILE}/test_tls_key_updates.py::test_renegotiation_without_end",
        f"{PEERS}/test_faults_tls.py::test_renegotiation",
    ),
}


@functools.cache
def functions(file: str) -> frozenset[str]:
    """The tests in a file."""
    tree = ast.parse((ROOT / file).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(
        one.name for one in tree.body if isinstance(one, kinds) and one.name.startswith("test_")
    )


@pytest.mark.parametrize("lesson", TESTS)
def test_there_is_a_test(lesson: str) -> None:
    assert TESTS[lesson]
    for name in TESTS[lesson]:
        file, _, function = name.partition("::")
        assert (ROOT / file).is_file(), f"no {file}"
        assert function in functions(file), f"no {name}"


# -- lessons about code that is not here


@functools.cache
def words(file: str) -> frozenset[str]:
    """Every name in a module of ours: imported, read, called, or an attribute."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        match node:
            case ast.Import(names=names):
                found.update(one.name for one in names)
            case ast.ImportFrom(module=module, names=names):
                found.update((module or "", *(one.name for one in names)))
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found.add(name)
    return frozenset(found)


def all_words() -> frozenset[str]:
    files = [str(path.relative_to(ROOT)) for path in (ROOT / "gateway").rglob("*.py")]
    assert len(files) > 40
    return frozenset().union(*map(words, files))


def is_no_tls_client() -> bool:
    """What dials the upstream knows nothing of TLS."""
    dialling = ("upstream", "redial", "lifeline", "outlet", "relay")
    return not any(
        words(f"gateway/{name}.py") & {"ssl", "start_tls", "starttls", "SSLContext"}
        for name in dialling
    )


def starts_no_program() -> bool:
    runs = {"subprocess", "system", "popen", "posix_spawn", "posix_spawnp", "run_process", "pty"}
    runs |= {f"exec{kind}" for kind in ("v", "ve", "vp", "vpe", "l", "le", "lp", "lpe")}
    return not all_words() & runs


NOT_HERE: dict[str, tuple[str, Callable[[], bool]]] = {
    "CVE-2019-14842 libnbd": (
        "no such code path: the gateway is no TLS client of its upstream",
        is_no_tls_client,
    ),
    "CVE-2024-7383 libnbd": (
        "no such code path: the gateway is no TLS client of its upstream",
        is_no_tls_client,
    ),
    "CVE-2026-27448 pyOpenSSL": (
        "TLS is the standard library's",
        lambda: not any(name.split(".")[0] == "OpenSSL" for name in all_words()),
    ),
    "CVE-2025-40080 Linux": (
        "there is no listener that a kernel client could not use: TCP and Unix sockets only",
        lambda: "AF_VSOCK" not in all_words(),
    ),
    "CVE-2024-4467 qemu-img": (
        "no program is ever started, so none gets a client's words",
        starts_no_program,
    ),
}


@pytest.mark.parametrize("lesson", NOT_HERE)
def test_there_is_no_such_code(lesson: str) -> None:
    """Once there is, this fails, and the lesson wants a test."""
    why, holds = NOT_HERE[lesson]
    assert holds(), f"no longer true: {why}"
    assert lesson not in TESTS
