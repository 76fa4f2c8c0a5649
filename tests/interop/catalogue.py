"""Every kind of upstream that the comparison is made with: real servers, in every dialect."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from tests.interop.tap import Tap
from tests.peers.bench import MIB, UPSTREAMS, Bench
from tests.support.peers import NbdServer, Server, check
from tests.support.trixie import Trixie

S = TypeVar("S", bound=Server)


class Stage(Bench):
    """A bench that takes servers which somebody else has made; with `newer`, those of trixie."""

    def __init__(
        self, root: Path, pki: Path, stack: contextlib.ExitStack, newer: Trixie | None = None
    ) -> None:
        super().__init__(root, pki, stack)
        self.enter: Callable[[S], S] = stack.enter_context
        self.newer = newer

    def tap(self, server: Server) -> Tap:
        """Between `server` and what connects to it."""
        return self.enter(Tap(self.directory() / "tap.sock", server.socket))

    def newer_nbdkit(self, *args: str | Path) -> Server:
        assert self.newer is not None
        return self.enter(self.newer.nbdkit(*map(self._inside, args)))

    def newer_qemu_nbd(self, *args: str | Path) -> Server:
        assert self.newer is not None
        return self.enter(self.newer.qemu_nbd(*map(self._inside, args)))

    def _inside(self, arg: str | Path) -> str:
        """Our own paths as the newer programs see them."""
        assert self.newer is not None
        return str(arg).replace(str(self.newer.outside), str(self.newer.inside))


Upstream = Callable[[Stage], Server]
SIZE = 4 * MIB
FULL = ("flags", "places", "whole", "filtered")
SHORT = ("flags", "edges", "whole")
LARGE = ("large", "pieces")
LOOK: tuple[str, ...] = ()  # only what the negotiation tells


@dataclass(frozen=True)
class Variant:
    """One kind of upstream.

    `start` makes a server with a fresh copy of the same disk each time. `export` is the name by
    which it is opened, `parts` what of tests/interop/probe.py it is asked.
    """

    start: Upstream
    export: str = ""
    fragile: tuple[str, ...] = ()  # commands that it survives only if they are whole blocks
    parts: tuple[str, ...] = SHORT


def disk(stage: Stage, size: int = SIZE) -> Path:
    """An image with data, and holes between; the same each time."""
    source = random.Random(size)
    path = stage.image(size)
    with path.open("r+b") as file:
        for at in range(0, size, MIB // 2):
            file.seek(at)
            file.write(source.randbytes(min(64 << 10, size - at)))
    return path


def qcow2(stage: Stage, size: int = SIZE, *, bitmaps: bool = False, backing: bool = False) -> Path:
    """A qcow2 image; with two dirty bitmaps of different granularity, or over a backing file."""
    path = stage.directory() / "disk.qcow2"
    below: list[str | Path] = ["-b", disk(stage, size), "-F", "raw"] if backing else []
    check("qemu-img", "create", "-q", "-f", "qcow2", *below, path, str(size))
    write = ("qemu-io", "-f", "qcow2")
    if bitmaps:
        check("qemu-img", "bitmap", "--add", path, "b0")
        check(*write, "-c", "write -P 1 0 128k", "-c", "write -P 2 1M 64k", path)
        check("qemu-img", "bitmap", "--add", "-g", "131072", path, "two: b, 1")
    check(*write, "-c", "write -P 3 256k 64k", "-c", "write -z 2M 64k", path)
    return path


def nbdkit(*args: str) -> Upstream:
    """nbdkit with these arguments; the word DISK in them stands for a fresh image."""
    return lambda stage: stage.nbdkit(*(disk(stage) if arg == "DISK" else arg for arg in args))


def qemu_raw(*args: str) -> Upstream:
    return lambda stage: stage.qemu_nbd(*args, "-f", "raw", disk(stage))


def sectors(driver_options: str) -> Upstream:
    """A disk with blocks larger than 512 bytes, as qemu-nbd tells and wants them."""
    return lambda stage: stage.qemu_nbd(
        "--image-opts",
        f"driver=blkdebug,{driver_options},image.driver=raw,image.file.driver=file,"
        f"image.file.filename={disk(stage)}",
    )


def nbd_server(*lines: str) -> Upstream:
    """nbd-server with these lines at the end of its configuration."""

    def start(stage: Stage) -> Server:
        directory = stage.directory()
        server = NbdServer(directory, disk(stage))
        with (directory / "nbd-server.conf").open("a") as config:
            config.writelines(line.replace("DISK", str(disk(stage))) + "\n" for line in lines)
        return stage.enter(server)

    return start


def behind_a_gateway(stage: Stage) -> Server:
    """A gateway in front of nbdkit, without TLS on a Unix socket, is an upstream too."""
    nbdkit = stage.nbdkit("file", disk(stage))
    listens = stage.directory() / "gateway.sock"
    stage.gateway(nbdkit, "--tls", "off", "--any-export", listen=f"unix:{listens}")
    nbdkit.socket = listens
    return nbdkit


BLOCKS = ("blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=1M")
EXPORTS = r"printf 'first\nthe first\nGrüße\ndescription of <it> & more\n\none without a name\n'"
EVAL = ("eval", "get_size=echo 1M", 'pread=head -c "$3" /dev/zero')

VARIANTS: dict[str, Variant] = {
    # The peers of all other scenarios, with all questions.
    **{
        name: Variant(start, "disk" if name == "nbd-server" else "", parts=FULL)
        for name, start in UPSTREAMS.items()
    },
    # nbdkit, its plugins
    "memory": Variant(nbdkit("memory", "4M"), parts=FULL),
    "memory-33M-no-sr": Variant(nbdkit("--no-sr", "memory", "33M"), parts=LARGE),
    "oldstyle-33M": Variant(
        nbdkit("-o", "--filter=nozero", "--filter=fua", "memory", "33M"), parts=LARGE
    ),
    "odd-size": Variant(nbdkit("memory", "1000001")),
    "one-byte": Variant(nbdkit("memory", "1")),
    "empty": Variant(nbdkit("memory", "0")),
    "data": Variant(nbdkit("data", '@32768 "data"*100 @3145728 0x55*4096', "size=4M")),
    "pattern": Variant(nbdkit("pattern", "5G")),
    "sparse-random": Variant(nbdkit("sparse-random", "4M", "seed=1", "runlength=65536")),
    "full": Variant(nbdkit("full", "4M")),
    "read-only": Variant(nbdkit("-r", "memory", "4M")),
    "rotational": Variant(nbdkit(*EVAL, "is_rotational=exit 0"), parts=LOOK),
    "exports": Variant(
        nbdkit(
            *EVAL,
            f"list_exports=echo INTERLEAVED; {EXPORTS}",
            "default_export=echo first",
            "open=echo $3",
            'export_description=echo "about $2"',
        ),
        parts=LOOK,
    ),
    # nbdkit, its filters
    "no-zero": Variant(nbdkit("--filter=nozero", "file", "DISK"), parts=FULL),
    "emulated-zero": Variant(nbdkit("--filter=nozero", "memory", "4M", "zeromode=emulate")),
    "zero-without-trim": Variant(nbdkit("--filter=nozero", "file", "DISK", "zeromode=notrim")),
    **{
        f"fast-zero-{mode}": Variant(
            nbdkit("--filter=nozero", "memory", "4M", "zeromode=plugin", f"fastzeromode={mode}")
        )
        for mode in ("none", "slow")
    },
    **{
        f"fua-{mode}": Variant(nbdkit("--filter=fua", "file", "DISK", f"fuamode={mode}"))
        for mode in ("emulate", "force")
    },
    "fua-none": Variant(nbdkit("--filter=fua", "file", "DISK")),
    "no-fua-no-zero-no-sr": Variant(
        nbdkit("--no-sr", "--filter=nozero", "--filter=fua", "file", "DISK"), parts=FULL
    ),
    **{
        f"cache-{mode}": Variant(nbdkit("--filter=nocache", "memory", "4M", f"cachemode={mode}"))
        for mode in ("none", "emulate")
    },
    **{
        f"multi-conn-{mode}": Variant(
            nbdkit("--filter=multi-conn", "file", "DISK", f"multi-conn-mode={mode}"), parts=LOOK
        )
        for mode in ("auto", "disable")
    },
    **{
        f"blocks-{action}": Variant(
            nbdkit(
                "--filter=blocksize-policy",
                "file",
                "DISK",
                *BLOCKS,
                f"blocksize-error-policy={action}",
            ),
            parts=FULL,
        )
        for action in ("allow", "error")
    },
    "blocks-64K": Variant(
        nbdkit(
            "--filter=blocksize-policy",
            "memory",
            "33M",
            "blocksize-minimum=64K",
            "blocksize-preferred=64K",
            "blocksize-maximum=4M",
            "blocksize-error-policy=error",
        ),
        parts=LARGE,
    ),
    "blocks-cut": Variant(nbdkit("--filter=blocksize", "memory", "4M", "maxdata=64K", "maxlen=1M")),
    "no-extents": Variant(nbdkit("--filter=noextents", "file", "DISK")),
    "cached-extents": Variant(nbdkit("--filter=cacheextents", "file", "DISK")),
    "cow": Variant(nbdkit("--filter=cow", "file", "DISK")),
    "truncated": Variant(nbdkit("--filter=truncate", "memory", "4000001", "round-up=4096")),
    "protected": Variant(nbdkit("--filter=protect", "file", "DISK", "protect=65536-262143")),
    **{
        f"error-{error}": Variant(
            nbdkit("--filter=error", "memory", "4M", f"error={error}", "error-rate=100%"),
            parts=("flags", "edges"),
        )
        for error in ("EPERM", "EIO", "ENOMEM")
    },
    "described": Variant(
        nbdkit(
            "--filter=exportname",
            "memory",
            "1M",
            "exportname=a b",
            "exportname=Grüße",
            "default-export=a b",
            "exportname-list=explicit",
            "exportname-strict=true",
            "exportdesc=fixed:Grüße & <angle> brackets",
        ),
        export="a b",
        parts=LOOK,
    ),
    # qemu-nbd
    "qemu-read-only": Variant(qemu_raw("-r")),
    "qemu-description": Variant(
        qemu_raw("-D", "Grüße & <angle> brackets", "-x", "name/with ü"), "name/with ü", parts=LOOK
    ),
    "qemu-shared": Variant(qemu_raw("--shared=4")),
    "qemu-allocation-depth": Variant(
        lambda stage: stage.qemu_nbd("-A", "-f", "qcow2", qcow2(stage, backing=True)), parts=FULL
    ),
    "qemu-bitmap": Variant(
        lambda stage: stage.qemu_nbd(
            "-A", "-B", "b0", "-B", "two: b, 1", "-f", "qcow2", qcow2(stage, bitmaps=True)
        ),
        parts=FULL,
    ),
    "qemu-4K": Variant(sectors("align=4096"), parts=FULL),
    "qemu-64K": Variant(
        sectors("align=65536,max-transfer=1048576"),
        fragile=("cache",),  # qemu-nbd 7.2 aborts
    ),
    "qemu-no-discard": Variant(qemu_raw("--discard=ignore")),
    "qemu-detect-zeroes": Variant(qemu_raw("--discard=unmap", "--detect-zeroes=unmap")),
    "qemu-33M": Variant(
        lambda stage: stage.qemu_nbd("-f", "raw", disk(stage, 33 * MIB)), parts=LARGE
    ),
    # nbd-server
    "nbd-server-read-only": Variant(nbd_server("readonly = true"), "disk"),
    "nbd-server-rotational": Variant(nbd_server("rotational = true"), "disk", parts=LOOK),
    "nbd-server-no-flags": Variant(
        nbd_server("flush = false", "fua = false", "trim = false"), "disk"
    ),
    # another gateway
    "gateway": Variant(behind_a_gateway, parts=FULL),
}


def newer_nbdkit(*args: str) -> Upstream:
    return lambda stage: stage.newer_nbdkit(
        *(disk(stage) if arg == "DISK" else arg for arg in args)
    )


# With the programs of Debian trixie: libnbd as the client, in front of servers old and new.
NEWER: dict[str, Variant] = {
    "nbdkit-1.42": Variant(newer_nbdkit("file", "DISK"), parts=FULL),
    "nbdkit-1.42-no-sr": Variant(newer_nbdkit("--no-sr", "--filter=nozero", "memory", "4M")),
    "nbdkit-1.42-blocks": Variant(
        newer_nbdkit("--filter=blocksize-policy", "memory", "4M", *BLOCKS)
    ),
    "qemu-nbd-10": Variant(
        lambda stage: stage.newer_qemu_nbd("-f", "raw", disk(stage)), parts=FULL
    ),
    "qemu-nbd-10-bitmap": Variant(
        lambda stage: stage.newer_qemu_nbd(
            "-A", "-B", "b0", "-B", "two: b, 1", "-f", "qcow2", qcow2(stage, bitmaps=True)
        ),
        parts=FULL,
    ),
    "qemu-nbd-10-read-only": Variant(
        lambda stage: stage.newer_qemu_nbd("-r", "-f", "raw", disk(stage))
    ),
    "qemu-nbd-10-6G": Variant(
        lambda stage: stage.newer_qemu_nbd("-f", "qcow2", qcow2(stage, 6 << 30)), parts=("huge",)
    ),
    "nbdkit": Variant(nbdkit("file", "DISK")),
    "nbdkit-no-sr": Variant(nbdkit("--no-sr", "file", "DISK")),
    "nbdkit-oldstyle": VARIANTS["nbdkit-oldstyle"],
    "qemu-nbd-raw": Variant(qemu_raw()),
    "nbd-server": Variant(nbd_server(), "disk"),
}
