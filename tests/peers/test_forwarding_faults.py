"""Upstreams that fail as real ones do: at opening, now and then, and for good; and then another
server comes in their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.peers.bench import MIB, NO_UPGRADES, Bench, Front
from tests.peers.watched import Swap, staged
from tests.support.peers import Client, check, nbdsh, run, said, start_nbdsh, wait_until
from tests.support.trixie import Trixie

SIZE = "h = connect(); report(size=h.get_size()); h.shutdown()"


@pytest.fixture(scope="module")
def stage(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with staged(pki, tmp_path_factory) as bench:
        yield bench


@pytest.fixture(scope="module")
def swap(stage: Bench) -> Swap:
    return Swap(stage, "--any-export", *NO_UPGRADES)


def both(front: Front, script: str, export: str = "", **args: Any) -> Any:
    """What a script reports through the gateway, which is what it reports without."""
    through = nbdsh(script, front.client(export), **args)
    assert through == nbdsh(script, front.direct(export), **args)
    return through


# ---------------------------------------------------------------- opening


OPENINGS = {
    "open-fails": ["open=echo EPERM not for you >&2; exit 1"],
    "no-size": ["get_size=echo EIO no size >&2; exit 1"],
    "size-is-not-a-number": ["get_size=echo plenty"],
    "size-below-zero": ["get_size=echo -1"],
    "no-flags": ["can_write=exit 1"],
    "no-block-sizes": ["block_size=exit 1"],
    "wrong-block-sizes": ["block_size=echo 3 5 7"],
}


@pytest.mark.parametrize("what", OPENINGS)
def test_an_export_that_cannot_be_opened(stage: Bench, swap: Swap, what: str) -> None:
    methods = dict(pair.split("=", 1) for pair in OPENINGS[what])
    methods.setdefault("get_size", "echo 1M")
    methods.setdefault("pread", 'head -c "$3" /dev/zero')
    front = swap.front(stage.nbdkit("eval", *(f"{k}={v}" for k, v in methods.items())))
    for client in (front.client(), front.direct()):
        done = run("nbdinfo", client.uri)
        assert done.returncode != 0
        assert run("nbdinfo", "--list", client.uri).returncode != 0
    done = run("qemu-img", "info", *front.client().qemu())
    assert done.returncode != 0
    assert "not for you" not in said(done)


def test_an_export_that_comes_and_goes(stage: Bench, swap: Swap) -> None:
    """Between INFO and GO, and back again, in one session."""
    there = stage.directory() / "there"
    open_it = f'test -e {there} || test "$3" != disk || {{ echo ENOENT >&2; exit 1; }}; echo "$3"'
    front = swap.front(
        stage.nbdkit(
            *("eval", f"open={open_it}", 'get_size=test "$2" = disk && echo 2M || echo 1M'),
            'pread=head -c "$3" /dev/zero',
        )
    )
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.set_opt_mode(True)
    h.connect_uri(args["uri"])
    answers = []
    def answer(call, name):
        h.set_export_name(name)
        answers.append(failed(call) or h.get_size())
    def exists(yes):
        if yes:
            open(args["there"], "w").close()
        else:
            os.unlink(args["there"])
    answer(h.opt_info, "disk")
    exists(True)
    answer(h.opt_info, "disk")
    exists(False)
    answer(h.opt_go, "disk")
    answer(h.opt_info, "other")
    answer(h.opt_info, "disk")
    exists(True)
    answer(h.opt_go, "disk")
    h.pread(512, (2 << 20) - 512)
    h.shutdown()
    exists(False)
    report(answers=answers)
    """
    answers = both(front, script, there=there)["answers"]
    assert answers == ["ENOENT", 2 * MIB, "ENOENT", MIB, "ENOENT", 2 * MIB]


def test_one_of_many_exports_is_broken(stage: Bench, swap: Swap) -> None:
    front = swap.front(
        stage.nbdkit(
            *("eval", "list_exports=printf 'good\\nbad\\nbetter\\n'", "get_size=echo 1M"),
            'open=case "$3" in bad) echo EIO >&2; exit 1;; *) echo "$3";; esac',
            'pread=head -c "$3" /dev/zero',
        )
    )
    for name, answer in (("good", None), ("bad", "ENOENT"), ("better", None), ("bad", "ENOENT")):
        assert both(front, "report(answer=failed(connect))", name) == {"answer": answer}


# ---------------------------------------------------------------- requests


ERRNOS = (
    *("EPERM", "EIO", "ENOMEM", "EINVAL", "ENOSPC", "EOVERFLOW", "ENOTSUP", "EROFS", "EFBIG"),
    *("EDQUOT", "ENOENT", "EBUSY", "EAGAIN", "ETIMEDOUT", "nonsense"),
)


def test_errors_of_a_script(stage: Bench, swap: Swap) -> None:
    """nbdkit puts some of them into others' words; the gateway none."""
    word = stage.directory() / "errno"
    fail = f"read name < {word}; echo $name sorry >&2; exit 1"
    methods = [f"{name}={fail}" for name in ("pread", "trim", "zero", "cache", "flush")]
    methods.append(f"pwrite=cat >/dev/null; {fail}")  # nbdkit says EIO if nobody reads its data
    able = [f"can_{name}=exit 0" for name in ("write", "trim", "zero", "flush", "fast_zero")]
    server = stage.nbdkit("eval", "get_size=echo 1M", *able, "can_cache=echo native", *methods)
    front = swap.front(server)
    script = """
    h = connect()
    rows = []
    for name in args["errnos"]:
        with open(args["word"], "w") as file:
            print(name, file=file)
        rows.append([name, failed(h.pread, 512, 0), failed(h.pwrite, bytes(512), 0),
                     failed(h.trim, 512, 0), failed(h.cache, 512, 0), failed(h.flush),
                     failed(h.zero, 512, 0, nbd.CMD_FLAG_FAST_ZERO)])
    report(rows=rows)
    """
    rows = both(front, script, word=word, errnos=ERRNOS)["rows"]
    seen = {row[0]: row[1] for row in rows}
    assert (seen["EIO"], seen["EROFS"]) == ("EIO", "EPERM")


SHORT = {
    "too-little": "head -c 100 /dev/zero",
    "nothing": "true",
    "too-much": "head -c $(($3 + 100)) /dev/zero",
    "killed": "kill -9 $$",
}


@pytest.mark.parametrize("what", SHORT)
def test_a_read_that_does_not_give_what_was_asked(stage: Bench, swap: Swap, what: str) -> None:
    front = swap.front(
        stage.nbdkit(
            "eval",
            "get_size=echo 1M",
            f'pread=test $4 != 512 || {{ {SHORT[what]}; exit; }}; head -c "$3" /dev/zero',
        )
    )
    script = """
    h = connect()
    answers = [failed(h.pread, 512, at) for at in (0, 512, 1024, 512, 0)]
    h.shutdown()
    report(answers=answers)
    """
    answers = both(front, script)["answers"]
    assert [answers[0], answers[2], answers[4]] == [None] * 3


# ---------------------------------------------------------------- coming back


def test_another_server_in_the_same_place(stage: Bench) -> None:
    """Nothing that was learnt from one server is believed of the next."""
    swap = Swap(stage, "--export", "disk")
    image = stage.image(2 * MIB)
    servers = [
        stage.nbdkit("file", image),
        stage.nbdkit("-o", "--filter=nozero", "split", image),
        stage.qemu_nbd("-x", "disk", "-f", "raw", stage.image(3 * MIB)),
        stage.nbdkit("--no-sr", "file", image),
        stage.nbd_server(image, name="disk"),
    ]
    script = """
    h = connect()
    h.pwrite(bytes([args["n"]]) * 4096, 4096)
    h.flush() if h.can_flush() else None
    report(size=h.get_size(), read=bytes(h.pread(2, 4096)).hex(), zero=h.can_zero())
    h.shutdown()
    """
    for n, server in enumerate([*servers, servers[0]], 1):
        front = swap.front(server)
        size = 3 * MIB if server is servers[2] else 2 * MIB
        seen = nbdsh(script, front.client(), n=n)
        assert seen == {"size": size, "read": f"{n:02x}" * 2, "zero": True}
        swap.place.put(None)
        assert run("nbdinfo", front.client().uri).returncode != 0


def test_killed_and_started_again_between_clients(stage: Bench, swap: Swap) -> None:
    image = stage.image(MIB)
    server = stage.nbdkit("file", image)
    front = swap.front(server)
    write = """
    h = connect()
    h.pwrite(bytes([args["n"]]) * 512, args["n"] * 512)
    h.flush()
    report()
    """
    for n in range(3):
        nbdsh(write, front.client(), n=n)
        server.kill()
        assert run("nbdinfo", front.client().uri).returncode != 0
        server.start()
        assert nbdsh(SIZE, front.client()) == {"size": MIB}
    assert image.read_bytes()[:1536] == b"".join(bytes([n]) * 512 for n in range(3))


# ---------------------------------------------------------------- leaving


LEAVE = {
    # nbdkit's exit codes of a script: the server ends, this client is dropped, or sent away.
    "server-ends-with-success": (4, False),
    "server-ends-with-an-error": (5, False),
    "client-is-dropped": (6, True),
    "client-is-sent-away-with-success": (7, True),
    "client-is-sent-away-with-an-error": (8, True),
}


@pytest.mark.parametrize("what", LEAVE)
def test_a_server_that_wants_to_be_alone(
    newer: Trixie, stage: Bench, swap: Swap, what: str
) -> None:
    """In the middle of requests. Others, and the next client, are not touched."""
    code, stays = LEAVE[what]
    pread = f'test $4 != 512 || {{ head -c "$3" /dev/zero; exit {code}; }}; head -c "$3" /dev/zero'
    with newer.nbdkit("eval", "get_size=echo 1M", f"pread={pread}") as server:
        front = swap.front(server)
        script = """
        h = connect()
        report(before=failed(h.pread, 512, 0))
        report(trigger=failed(h.pread, 512, 512))
        report(after=[failed(h.pread, 512, 0), failed(h.pread, 512, 1024)])
        """
        with start_nbdsh(
            "h = connect(); h.pread(512, 0); report()\ntime.sleep(60)", front.client()
        ) as other:
            assert other.stdout is not None
            other.stdout.readline()
            seen = nbdsh(script, front.client())
            other.kill()
        assert seen["before"] is None
        assert seen["trigger"] in (None, "ESHUTDOWN", "ENOTCONN"), seen
        assert {*seen["after"]} <= {"ESHUTDOWN", "ENOTCONN"}, seen
        if what.startswith("client-is-sent-away"):
            assert seen["trigger"] == (None if code == 7 else "ESHUTDOWN")
        if stays:
            assert nbdsh(SIZE, front.client()) == {"size": MIB}
            return
        wait_until(lambda: run("nbdinfo", front.direct().uri).returncode, "nbdkit to end")
    with newer.nbdkit("memory", "3M") as again:
        assert nbdsh(SIZE, swap.front(again).client()) == {"size": 3 * MIB}


def test_nbdinfo_of_a_dead_server_says_so(stage: Bench, swap: Swap) -> None:
    server = stage.nbdkit("memory", "1M")
    front = swap.front(server)
    check("nbdinfo", front.client().uri)
    server.kill()
    for client in (front.client(), Client(front.client("x").address, front.pki)):
        done = run("qemu-img", "info", *client.qemu())
        assert done.returncode != 0
        assert "the NBD server behind this gateway cannot be reached" in said(done)
