"""Errors of the upstream reach the client, each as itself, and programs fail loudly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.peers.bench import SIZE, Bench
from tests.support.peers import nbdsh, run, said

ERRORS = {
    "EPERM": "EPERM",
    "EIO": "EIO",
    "ENOMEM": "ENOMEM",
    "EINVAL": "EINVAL",
    "ENOSPC": "ENOSPC",
    "ESHUTDOWN": "ESHUTDOWN",
}


@pytest.mark.parametrize("structured", [True, False], ids=["sr", "no-sr"])
@pytest.mark.parametrize("error", ERRORS)
def test_each_error_number(bench: Bench, error: str, structured: bool) -> None:
    server = bench.nbdkit("--filter=error", "memory", "1M", f"error={error}", "error-rate=100%")
    front = bench.gateway(server)
    script = """
    out = {}
    for name, call in {
        "read": lambda h: h.pread(4096, 0),
        "write": lambda h: h.pwrite(b"x" * 4096, 0),
        "zero": lambda h: h.zero(4096, 0),
        "trim": lambda h: h.trim(4096, 0),
        "cache": lambda h: h.cache(4096, 0),
    }.items():
        h = connect(request_structured_replies=args["structured"])
        out[name] = failed(call, h)
        if args["go_on"]:
            h.flush()
            h.shutdown()
    report(**out)
    """
    go_on = error != "ESHUTDOWN"  # after that one no further request is allowed
    reported = nbdsh(script, front.client(), structured=structured, go_on=go_on)
    assert reported == dict.fromkeys(reported, ERRORS[error])
    assert len(reported) == 5


def test_errors_among_successes_keep_the_session(bench: Bench) -> None:
    server = bench.nbdkit("--filter=error", "memory", "1M", "error=EIO", "error-pread-rate=50%")
    front = bench.gateway(server)
    script = """
    h = connect()
    h.pwrite(bytes(range(256)) * 4096, 0)
    results = []
    for i in range(200):
        try:
            results.append(h.pread(4096, i * 4096) == bytes(range(256)) * 16)
        except nbd.Error as error:
            results.append(errno.errorcode[error.errnum])
    report(kinds=sorted({str(r) for r in results}))
    h.shutdown()
    """
    assert nbdsh(script, front.client()) == {"kinds": ["EIO", "True"]}


@pytest.mark.parametrize("request_kind", ["pread", "pwrite", "zero"])
def test_programs_fail_when_a_request_failed(
    bench: Bench, pictures: tuple[Path, Path], tmp_path: Path, request_kind: str
) -> None:
    # CVE-2022-0485: a copy that ignores an error is silent corruption.
    picture, _ = pictures
    server = bench.nbdkit(
        *("--filter=error", "memory", f"{SIZE}"),
        *("error=EIO", f"error-{request_kind}-rate=100%"),
    )
    client = bench.gateway(server).client()
    if request_kind == "pread":
        done = run("nbdcopy", "--no-extents", client.uri, tmp_path / "down")
    else:
        done = run("nbdcopy", picture, client.uri)
    assert done.returncode != 0
    assert "Input/output error" in said(done)
    command = {"pread": "read 0 64k", "pwrite": "write 0 64k", "zero": "write -z 0 64k"}
    words = ["-c", command[request_kind]]
    done = run("qemu-io", *client.qemu_object(), *words, *client.qemu()[-2:])
    assert "Input/output error" in said(done)


def test_an_upstream_that_refuses_to_open(bench: Bench) -> None:
    server = bench.nbdkit("eval", "get_size=echo 1M", "open=echo EIO broken disk >&2; exit 1")
    front = bench.gateway(server)
    done = run("nbdinfo", front.client().uri)
    assert done.returncode != 0
    assert done.stderr == run("nbdinfo", front.direct().uri).stderr
    assert "broken disk" not in front.gateway.log()  # that is for the upstream's own log
