"""Which exports a client may open and see: --export and --any-export."""

from __future__ import annotations

import json

import pytest

from tests.peers.bench import MIB, Bench, Front
from tests.support.peers import Client, Server, check, nbdsh, run, said


def listed(client: Client) -> list[str]:
    document = json.loads(check("nbdinfo", "--json", "--list", client.uri))
    return [export["export-name"] for export in document["exports"]]


def size(client: Client) -> int:
    return int(check("nbdinfo", "--size", client.uri))


def refused(client: Client) -> None:
    done = run("nbdinfo", client.uri)
    assert done.returncode != 0
    assert "No such file or directory" in said(done), said(done)
    done = run("qemu-img", "info", *client.qemu())
    assert done.returncode != 0
    assert "no such export" in said(done), said(done)


def several(bench: Bench) -> Server:
    """Exports a (1 MiB), b (2 MiB) and secret (4 MiB); a is the default."""
    plugin = [
        *("eval", 'list_exports=printf "INTERLEAVED\\na\\nfirst\\nb\\nsecond\\nsecret\\n\\n"'),
        "default_export=echo a",
        'open=case "$3" in a|b|secret) echo "$3";; *) echo ENOENT none such >&2; exit 1;; esac',
        'get_size=case "$2" in a) echo 1M;; b) echo 2M;; secret) echo 4M;; esac',
        'export_description=echo "this is $2"',
        'pread=printf "%s" "$2" | cat - /dev/zero | head -c "$3"',
    ]
    return bench.nbdkit(*plugin)


def test_without_export_only_the_default(bench: Bench) -> None:
    front = bench.gateway(several(bench))
    assert front.gateway.uri == f"nbds://127.0.0.1:{front.gateway.port}/"
    assert size(front.client()) == MIB
    assert listed(front.client()) == [""]
    for name in ("a", "b", "secret", "nonsense"):
        refused(front.client(name))


def test_a_configured_name(bench: Bench) -> None:
    front = bench.gateway(several(bench), "--export", "b")
    assert front.gateway.uri == f"nbds://127.0.0.1:{front.gateway.port}/b"
    assert size(front.client("b")) == size(front.client()) == 2 * MIB
    assert listed(front.client()) == ["b"]
    for name in ("a", "secret", "nonsense", "B", "b "):
        refused(front.client(name))


def test_qemu_opens_the_configured_name(bench: Bench) -> None:
    front = bench.gateway(several(bench), "--export", "b")
    for name in ("", "b"):
        printed = check("qemu-img", "info", "--output=json", *front.client(name).qemu())
        assert json.loads(printed)["virtual-size"] == 2 * MIB


def test_a_name_that_needs_escapes(bench: Bench) -> None:
    name = "disk/0 of Jörg?&%41"
    server = bench.qemu_nbd("-x", name, "-f", "raw", bench.image(MIB))
    front = bench.gateway(server, "--export", name)
    assert size(front.client(name)) == size(front.client()) == MIB
    assert listed(front.client()) == [name]
    # As printed, it can be pasted.
    assert size(Client(front.gateway.uri, front.pki)) == MIB


def test_names_do_not_tell_what_exists(bench: Bench) -> None:
    """What exists behind the gateway, but is not offered, looks like what does not exist."""
    front = bench.gateway(several(bench), "--export", "b")
    messages = [
        said(run("qemu-img", "info", *front.client(n).qemu())) for n in ("secret", "sacred")
    ]
    assert messages[0].replace("secret", "*") == messages[1].replace("sacred", "*")


def test_a_configured_name_that_the_upstream_lacks(bench: Bench) -> None:
    front = bench.gateway(several(bench), "--export", "lost")
    refused(front.client("lost"))
    refused(front.client())


def test_any_export(bench: Bench) -> None:
    front = bench.gateway(several(bench), "--any-export")
    sizes = {"": MIB, "a": MIB, "b": 2 * MIB, "secret": 4 * MIB}
    assert {name: size(front.client(name)) for name in sizes} == sizes
    assert listed(front.client()) == listed(front.direct()) == ["a", "b", "secret"]
    refused(front.client("nonsense"))


def test_descriptions_in_a_list(bench: Bench) -> None:
    front = bench.gateway(several(bench), "--any-export")
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.set_opt_mode(True)
    h.connect_uri(args["uri"])
    rows = []
    h.opt_list(lambda name, description: rows.append([name, description]))
    h.set_full_info(True)
    h.set_export_name("b")
    h.opt_info()
    report(rows=rows, description=h.get_export_description(), name=h.get_canonical_export_name())
    h.opt_abort()
    """
    assert nbdsh(script, front.client()) == nbdsh(script, front.direct())


def test_info_on_several_exports_before_one_is_opened(bench: Bench) -> None:
    # CVE-2019-14851: an INFO for one export and GO for another.
    front = bench.gateway(several(bench), "--any-export")
    script = """
    h = nbd.NBD()
    h.set_uri_allow_local_file(True)
    h.set_opt_mode(True)
    h.connect_uri(args["uri"])
    sizes = []
    for name in ("a", "b", "a", "secret"):
        h.set_export_name(name)
        h.opt_info()
        sizes.append(h.get_size())
    h.set_export_name("nonsense")
    unknown = [failed(h.opt_info), failed(h.opt_go)]
    h.set_export_name("b")
    h.opt_go()
    first = bytes(h.pread(512, 0))[:6].decode()
    report(sizes=sizes, unknown=unknown, size=h.get_size(), first=first)
    h.shutdown()
    """
    through = nbdsh(script, front.client())
    assert through == nbdsh(script, front.direct())
    assert through["sizes"] == [MIB, 2 * MIB, MIB, 4 * MIB]
    assert through["unknown"] == ["ENOENT", "ENOENT"]
    assert through["size"] == 2 * MIB


@pytest.mark.parametrize("flags", [["-o", "--filter=nozero"], ["--mask-handshake=0"]])
def test_an_upstream_without_options(bench: Bench, flags: list[str]) -> None:
    """The gateway lists and names the one export itself."""
    front = bench.gateway(bench.nbdkit(*flags, "split", bench.image(MIB)), "--export", "disk")
    if flags[0] == "-o":
        assert size(front.client("disk")) == size(front.client()) == MIB
        assert listed(front.client()) == ["disk"]
    refused(front.client("other"))


def nbd_client_size(front: Front, *flags: str) -> str:
    """How far nbd-client comes without a kernel driver: it prints the size that it was told."""
    return said(run(*front.client().nbd_client(*flags), "-nonetlink", "/dev/null"))


@pytest.mark.parametrize("optgo", [[], ["-g"]], ids=["NBD_OPT_GO", "NBD_OPT_EXPORT_NAME"])
def test_nbd_client(bench: Bench, optgo: list[str]) -> None:
    front = bench.gateway(several(bench), "--export", "b")
    assert "size = 2MB" in nbd_client_size(front, "-N", "b", *optgo)
    assert "size = 2MB" in nbd_client_size(front, "-N", "", *optgo)
    assert "size = 4MB" not in nbd_client_size(front, "-N", "secret", *optgo)
    front.gateway.wait_log("closed: export refused" if optgo else "closed: ")


def test_nbd_client_lists(bench: Bench) -> None:
    front = bench.gateway(several(bench), "--export", "b")
    printed = check(*front.client().nbd_client("-l"))
    assert printed.splitlines()[-1] == "b: second"
    everything = bench.gateway(several(bench), "--any-export")
    printed = check(*everything.client().nbd_client("-l"))
    assert printed.splitlines()[-3:] == ["a: first", "b: second", "secret"]
