"""`fua`: an upstream that can flush, but knows no FUA, gets the command and then a flush."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.peers.bench import MIB, NO_UPGRADES, Bench
from tests.peers.watched import Event, Request, Watched, covers, staged
from tests.support.peers import NbdServer, check, nbdsh, start_nbdsh, wait_until

NO_FUA = ("--filter=fua",)  # its default: none


@pytest.fixture(scope="module")
def stage(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with staged(pki, tmp_path_factory) as bench:
        yield bench


def flushes_behind(events: list[Event], command: str) -> int:
    """How many flushes there are; each request of this kind has one that began after its end."""
    begins = [n for n, one in enumerate(events) if one.begins and one.request.command == "Flush"]
    ends = [n for n, one in enumerate(events) if not one.begins and one.request.command == command]
    assert ends
    for number, end in enumerate(reversed(ends), 1):
        assert sum(begin > end for begin in begins) >= number, events
    return len(begins)


def test_what_the_upstream_sees(stage: Bench) -> None:
    image = stage.image(4 * MIB)
    watched = Watched(stage, *NO_FUA, "file", image)
    script = """
    h = connect()
    FUA, NO_HOLE = nbd.CMD_FLAG_FUA, nbd.CMD_FLAG_NO_HOLE
    report(fua=h.can_fua())
    h.pwrite(b"a" * 4096, 0)
    h.pwrite(b"b" * 1000, 1, FUA)
    h.trim(4096, 8192, FUA)
    h.zero(4096, 1 << 20, FUA)
    h.zero(4097, 2 << 20, FUA | NO_HOLE)
    h.trim(512, 8192)
    h.shutdown()
    """
    assert nbdsh(script, watched.gateway().client()) == {"fua": True}
    flush = Request("Flush")
    assert watched.requests() == [
        Request("Write", 0, 4096),
        *(Request("Write", 1, 1000), flush),
        *(Request("Trim", 8192, 4096), flush),
        *(Request("Zero", MIB, 4096), flush),
        *(Request("Zero", 2 * MIB, 4097), flush),
        Request("Trim", 8192, 512),
    ]
    # One after the other, not side by side.
    assert [event.begins for event in watched.events()] == [True, False] * 10
    assert image.read_bytes()[:4096] == b"a" + b"b" * 1000 + b"a" * 3095


def test_the_answer_comes_after_both(stage: Bench) -> None:
    """The upstream's flush waits at a FIFO, and so does the client."""
    gates = stage.directory()
    os.mkfifo(gates / "write")
    os.mkfifo(gates / "flush")
    watched = Watched(
        stage,
        *(*NO_FUA, "eval", "thread_model=echo parallel", "get_size=echo 1M"),
        *("can_write=exit 0", "can_flush=exit 0", f"flush=: < {gates}/flush"),
        f"pwrite=cat > /dev/null; test $4 = 0 || exit 0; : < {gates}/write",
        'pread=head -c "$3" /dev/zero',
    )
    script = """
    h = connect()
    done = []
    def finished(error):
        done.append(error.value)
        return 1
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(4096)), 0, finished, nbd.CMD_FLAG_FUA)
    def stays_unanswered_until(path):
        h.pwrite(bytes(512), 4096)  # others pass by
        h.pread(512, 0)
        report(**{path + " waits": not done})
        sys.stdout.flush()
        until(h, lambda: os.path.exists(os.path.join(args["gates"], path + " is next")))
        h.pread(512, 0)
        return not done
    unanswered = [stays_unanswered_until(path) for path in ("write", "flush")]
    report(unanswered=unanswered)
    until(h, lambda: done)
    report(done=done)
    h.shutdown()
    """
    with start_nbdsh(script, watched.gateway().client(), gates=gates) as client:
        assert client.stdout is not None
        assert client.stdout.readline() == '{"write waits": true}\n'
        (gates / "write").write_text("")  # until the script reads
        wait_until(lambda: watched.requests("Flush"), "the flush")
        (gates / "write is next").touch()
        assert client.stdout.readline() == '{"flush waits": true}\n'
        (gates / "flush is next").touch()
        assert client.stdout.readline() == '{"unanswered": [true, true]}\n'
        (gates / "flush").write_text("")
        rest, errors = client.communicate(timeout=60)
    assert rest == '{"done": [0]}\n', errors


def script_of(stage: Bench, *more: str) -> Watched:
    return Watched(
        stage,
        *(*NO_FUA, "eval", "get_size=echo 8M", "thread_model=echo parallel"),
        *("can_write=exit 0", "can_flush=exit 0", "can_trim=exit 0", "can_zero=exit 0"),
        'pread=head -c "$3" /dev/zero',
        *more,
    )


@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EPERM"])
def test_a_flush_that_fails_is_the_answer(stage: Bench, error: str) -> None:
    watched = script_of(
        stage, f"flush=echo {error} >&2; exit 1", "pwrite=cat > /dev/null", "trim=true", "zero=true"
    )
    script = """
    h = connect()
    FUA = nbd.CMD_FLAG_FUA
    report(fua=[failed(h.pwrite, bytes(512), 0, FUA), failed(h.trim, 512, 0, FUA),
                failed(h.zero, 512, 0, FUA)],
           plain=[failed(h.pwrite, bytes(512), 0), failed(h.trim, 512, 0), failed(h.zero, 512, 0)])
    h.shutdown()
    """
    seen = nbdsh(script, watched.gateway().client())
    assert seen == {"fua": [error] * 3, "plain": [None] * 3}
    assert len(watched.requests("Flush")) == 3


def test_what_fails_is_not_flushed(stage: Bench) -> None:
    watched = script_of(
        stage,
        "flush=true",
        "pwrite=cat > /dev/null; echo ENOSPC >&2; exit 1",
        "trim=echo EIO >&2; exit 1",
        "zero=echo EPERM >&2; exit 1",
    )
    script = """
    h = connect()
    FUA = nbd.CMD_FLAG_FUA
    report(fua=[failed(h.pwrite, bytes(512), 0, FUA), failed(h.trim, 512, 0, FUA),
                failed(h.zero, 512, 0, FUA)], flush=failed(h.flush))
    h.shutdown()
    """
    seen = nbdsh(script, watched.gateway().client())
    assert seen == {"fua": ["ENOSPC", "EIO", "EPERM"], "flush": None}
    assert [one.command for one in watched.requests()] == ["Write", "Trim", "Zero", "Flush"]


def test_many_at_once(stage: Bench) -> None:
    """Each write has its own flush behind it, and only those that asked for it."""
    watched = Watched(stage, *NO_FUA, "memory", "64M")
    script = """
    h = connect()
    cookies, expected = [], bytearray(64 << 20)
    for n in range(200):
        data = bytes([n + 1]) * (1 + n * 331)
        expected[n << 17:(n << 17) + len(data)] = data
        flags = nbd.CMD_FLAG_FUA if n % 2 else 0
        buffer = nbd.Buffer.from_bytearray(bytearray(data))
        cookies.append(h.aio_pwrite(buffer, n << 17, flags=flags))
    until(h, lambda: not h.aio_in_flight())
    answers = [h.aio_command_completed(one) for one in cookies]
    right = h.pread(32 << 20, 0) == expected[:32 << 20]
    report(answers=all(answers), right=right)
    h.shutdown()
    """
    seen = nbdsh(script, watched.gateway().client())
    assert seen == {"answers": True, "right": True}
    requests = watched.requests("Write")
    assert len(requests) == 200
    assert not any(one.fua for one in requests)
    asked = {(n << 17) for n in range(1, 200, 2)}
    events = [one for one in watched.events() if one.request.command == "Flush"]
    assert sum(one.begins for one in events) == len(asked)
    mine = [
        e for e in watched.events() if e.request.command == "Flush" or e.request.offset in asked
    ]
    assert flushes_behind(mine, "Write") == len(asked)


def test_a_write_that_is_split_has_one_flush(stage: Bench) -> None:
    watched = Watched(
        stage,
        *("--filter=blocksize-policy", *NO_FUA, "memory", "16M", "blocksize-error-policy=error"),
        *("blocksize-preferred=4K", "blocksize-maximum=1M"),
    )
    script = """
    h = connect()
    h.pwrite(b"x" * (9 << 20), 12345, nbd.CMD_FLAG_FUA)
    h.shutdown()
    report()
    """
    nbdsh(script, watched.gateway().client())
    requests = watched.requests()
    assert covers(requests[:-1], 12345, 9 * MIB)
    assert requests[-1] == Request("Flush")
    events = watched.events()
    assert [one.request.command for one in events[-2:]] == ["Flush", "Flush"]


def test_flags_on_commands_that_change_nothing(stage: Bench) -> None:
    """FUA is taken off, and nothing is flushed for it."""
    watched = Watched(stage, *NO_FUA, "memory", "1M")
    script = """
    h = connect(strict_mode=0)
    FUA = nbd.CMD_FLAG_FUA
    report(answers=[failed(h.pread, 512, 0, FUA), failed(h.cache, 512, 0, FUA),
                    failed(h.flush, FUA), failed(h.pread, 512, 512, FUA | nbd.CMD_FLAG_DF)])
    h.shutdown()
    """
    assert nbdsh(script, watched.gateway().client()) == {"answers": [None] * 4}
    assert [one.command for one in watched.requests()] == ["Read", "Cache", "Flush", "Read"]


ABLE = """
h = connect(strict_mode=0)
report(fua=h.can_fua(), flush=h.can_flush(),
       answer=failed(h.pwrite, b"x" * 512, 0, nbd.CMD_FLAG_FUA), still=failed(h.pwrite, b"x", 0))
h.shutdown()
"""


@pytest.mark.parametrize("flags", [["--no-upgrade", "fua"], NO_UPGRADES, []])
def test_without_it_or_without_flush(stage: Bench, flags: list[str]) -> None:
    """What cannot be done is not promised: the client sees what it would see directly."""
    if flags:
        watched = Watched(stage, *NO_FUA, "memory", "1M")
    else:
        pwrite = "pwrite=cat > /dev/null"
        eval_ = ("eval", "get_size=echo 1M", "can_write=exit 0", pwrite, "pread=exit 1")
        watched = Watched(stage, *eval_)
    front = watched.gateway(*flags)
    seen = nbdsh(ABLE, front.client())
    assert seen == nbdsh(ABLE, front.direct())
    assert seen == {"fua": False, "flush": bool(flags), "answer": "EINVAL", "still": None}
    assert {one.command for one in watched.requests()} == {"Write"}


@pytest.mark.parametrize("flags", [[], ["--no-upgrade", "fua"]])
def test_nbd_server_that_only_flushes(stage: Bench, flags: list[str]) -> None:
    directory = stage.directory()
    image = stage.image(MIB)
    server = NbdServer(directory, image)
    config = directory / "nbd-server.conf"
    config.write_text(config.read_text().replace("fua = true", "fua = false"))
    with server:
        front = stage.gateway(server, "--export", "disk", *flags)
        seen = nbdsh(ABLE, front.client())
    assert seen["answer"] == ("EINVAL" if flags else None)
    assert seen["fua"] is not bool(flags)
    assert image.read_bytes()[:1] == b"x"


def test_qemu_in_writethrough_mode(stage: Bench) -> None:
    """Every write of QEMU's has FUA then."""
    watched = Watched(stage, *NO_FUA, "memory", "4M")
    client = watched.gateway().client()
    words = ["-c", "write -P 3 0 64k", "-c", "write -f -P 4 1M 1k", "-c", "write -z 2M 4k"]
    flags = ["-t", "writethrough"]
    check("qemu-io", *flags, *client.qemu_object(), *words, *client.qemu()[-2:])
    events = [one for one in watched.events() if one.request.command in ("Write", "Flush")]
    assert not any(one.request.fua for one in watched.events())
    assert flushes_behind(events, "Write") >= 2
