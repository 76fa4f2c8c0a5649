"""Asks a server what it is told to, through libnbd, and prints the answers, one JSON line each.

Run by the Python that has the module nbd. Standard input is JSON:
    uri
    contexts     names of meta contexts to look for
    names        exports to ask about; the first is opened, the last need not be there
    queries      lists of queries for meta contexts
    by_hand      upgrades of the gateway that this client is to do itself, in front of a server
                 that lacks the feature: tests/interop/rules.py
    maximum      the server's largest payload, or 0
    connections  each with a name, what to negotiate, and the requests to send (number, command,
                 offset, length, flags); see `Connection`

What is asked never depends on the answers, so that two servers can be asked the very same.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import nbd

Line = dict[str, Any]

MIB = 1 << 20
MAX_DEATHS = 5  # of connections, before a server is given up
CAN = ("cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero")
FUA, DF, FAST_ZERO = 1, 4, 16
EXTENDED = hasattr(nbd.NBD, "set_request_extended_headers")


def error_name(number: int) -> str:
    return errno.errorcode.get(number, str(number))


def outcome(call: Callable[[], object]) -> object:
    """What it returned, or the error's name."""
    try:
        return call()
    except nbd.Error as error:
        return error_name(error.errnum)


def digest(data: bytes | bytearray | memoryview) -> str:
    """Short, and for zeroes a word."""
    data = bytes(data)
    if data.count(0) == len(data):
        return f"{len(data)} zeroes"
    return f"{len(data)} bytes {hashlib.blake2b(data, digest_size=8).hexdigest()}"


def payload(length: int, seed: int) -> bytes:
    """Bytes of every value, others for every seed."""
    part = hashlib.shake_128(seed.to_bytes(8, "big")).digest(min(length, 4099))
    return (part * (length // max(1, len(part)) + 1))[:length]


class Connection:
    """How to connect: a name, and what is asked for in the negotiation."""

    def __init__(self, wanted: Line, settings: Line) -> None:
        self.wanted = wanted
        self.name: str = settings["name"]
        self.extended: bool = settings.get("extended", True)
        self.structured: bool = settings.get("structured", True)
        self.block_size: bool = settings.get("block_size", True)
        self.contexts: list[str] = settings.get("contexts", [])
        self.handshake_flags: int | None = settings.get("handshake_flags")
        self.options: bool = settings.get("options", False)
        self.requests: list[tuple[int, str, int, int, int]] = settings.get("requests", [])

    def handle(self) -> nbd.NBD:
        h = nbd.NBD()
        h.set_uri_allow_local_file(True)
        # Anything may be sent. But with extended headers no WRITE can be read without its flag.
        h.set_strict_mode(getattr(nbd, "STRICT_AUTO_FLAG", 0))
        h.set_full_info(True)
        if EXTENDED:
            h.set_request_extended_headers(self.extended)
        h.set_request_structured_replies(self.structured)
        h.set_request_block_size(self.block_size)
        if self.handshake_flags is not None:
            h.set_handshake_flags(self.handshake_flags)
        for name in self.contexts:
            h.add_meta_context(name)
        return h

    def connect(self) -> nbd.NBD:
        h = self.handle()
        h.connect_uri(self.wanted["uri"])
        return h

    def facts(self, h: nbd.NBD) -> Line:
        """All that a handle knows of its export."""
        got: Line = {
            "size": outcome(h.get_size),
            "structured": outcome(h.get_structured_replies_negotiated),
            "is read_only": outcome(h.is_read_only),
            "is rotational": outcome(h.is_rotational),
            "description": outcome(h.get_export_description),
            "canonical name": outcome(h.get_canonical_export_name),
        }
        if EXTENDED:
            got["extended"] = h.get_extended_headers_negotiated()
            got["can block_status_payload"] = h.can_block_status_payload()
        for i, name in enumerate(("minimum", "preferred", "maximum")):
            got[f"block {name}"] = outcome(lambda i=i: h.get_block_size(i))
        for feature in CAN:
            got[f"can {feature}"] = outcome(getattr(h, "can_" + feature))
        got["contexts"] = [one for one in self.wanted["contexts"] if h.can_meta_context(one)]
        return got

    def ask_options(self) -> Iterator[tuple[str, object]]:
        """Everything that may be asked before an export is opened, if anything may."""
        wanted = self.wanted
        h = self.handle()
        h.set_opt_mode(True)
        h.connect_uri(wanted["uri"])
        if h.aio_is_negotiating():
            listed: list[list[str]] = []
            count = outcome(lambda: h.opt_list(lambda name, text: listed.append([name, text])))
            yield "list", [count, sorted(listed)]
            for name in wanted["names"]:
                h.set_export_name(name)
                yield f"info {name!r}", self._info(h)
                for queries in wanted["queries"]:
                    yield f"contexts of {name!r} for {queries}", self._contexts(h, queries)
            h.clear_meta_contexts()
            for name in self.contexts:
                h.add_meta_context(name)
            h.set_export_name(wanted["names"][-1])
            refused = outcome(h.opt_go)  # unless this server takes any name
            yield f"go to {wanted['names'][-1]!r}", refused
        if h.aio_is_negotiating():
            h.set_export_name(wanted["names"][0])
            yield "go to the right one", outcome(h.opt_go)
        yield "opened", self.facts(h)
        outcome(h.shutdown)

    def _info(self, h: nbd.NBD) -> object:
        try:
            h.opt_info()
        except nbd.Error as error:
            return error_name(error.errnum)
        return self.facts(h)

    def _contexts(self, h: nbd.NBD, queries: list[str]) -> object:
        h.clear_meta_contexts()
        for query in queries:
            h.add_meta_context(query)
        contexts: list[str] = []
        count = outcome(lambda: h.opt_list_meta_context(contexts.append))
        return [count, contexts]


class Requests:
    """Sends requests on one connection, and opens another when it has died."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.h = connection.connect()
        self.facts = connection.facts(self.h)
        self.deaths = 0
        self.seed = 0

    def ask(self, number: int, command: str, offset: int, length: int, flags: int) -> object:
        self.seed = number
        if self.deaths > MAX_DEATHS:
            return "given up"
        answer = outcome(lambda: self._ask(command, offset, length, flags))
        if self.h.aio_is_dead() or self.h.aio_is_closed():
            self.deaths += 1
            answer = f"{answer}, and the connection is gone"
            self.h = self.connection.connect()
        return answer

    def _ask(self, command: str, offset: int, length: int, flags: int) -> object:
        h = self.h
        match command:
            case "read":
                return digest(h.pread(length, offset, flags))
            case "read chunks":
                return self._read_chunks(offset, length, flags)
            case "write":
                return h.pwrite(payload(length, self.seed), offset, flags)
            case "flush":
                return h.flush(flags)
            case "trim":
                return h.trim(length, offset, flags)
            case "zero":
                return h.zero(length, offset, flags)
            case "cache":
                return h.cache(length, offset, flags)
            case "status":
                return self._status(offset, length, flags)
            case "status of one":
                return self._status(offset, length, flags, self.connection.contexts[:1])
            case "status of none":
                return self._status(offset, length, flags, [])
        raise AssertionError(command)

    def _read_chunks(self, offset: int, length: int, flags: int) -> object:
        chunks: list[list[object]] = []

        def chunk(data: memoryview, at: int, status: int, error: Any) -> None:
            kind = {nbd.READ_DATA: "data", nbd.READ_HOLE: "hole", nbd.READ_ERROR: "error"}[status]
            what = error_name(error.value) if kind == "error" else digest(data)
            chunks.append([kind, at, len(data), what])

        try:
            data = digest(self.h.pread_structured(length, offset, chunk, flags))
        except nbd.Error as error:
            data = error_name(error.errnum)
        return [data, chunks]

    def _status(
        self, offset: int, length: int, flags: int, only: list[str] | None = None
    ) -> object:
        found: list[list[object]] = []

        def extents(context: str, at: int, entries: list[Any], error: Any) -> None:
            pairs = list(zip(entries[::2], entries[1::2], strict=True))
            found.append([context, at, pairs, error.value])

        def long_extents(context: str, at: int, entries: list[Any], error: Any) -> None:
            found.append([context, at, entries, error.value])

        if only is not None:
            self.h.block_status_filter(length, offset, only, long_extents, flags)
        elif EXTENDED:
            self.h.block_status_64(length, offset, long_extents, flags)
        else:
            self.h.block_status(length, offset, extents, flags)
        return sorted(found, key=str)


class CarefulRequests(Requests):
    """Does by hand what `upgrades` of the gateway would do for it."""

    def __init__(self, connection: Connection, upgrades: list[str]) -> None:
        super().__init__(connection)
        can = {name: self.facts[f"can {name}"] for name in CAN}
        writable = not self.facts["is read_only"]
        self.zeroes = "write-zeroes" in upgrades and writable and not can["zero"]
        self.fua = "fua" in upgrades and writable and can["flush"] and not can["fua"]
        self.df = "structured-replies" in upgrades and not can["df"]
        self.maximum = connection.wanted["maximum"] or 32 * MIB
        self.split = "block-size" in upgrades

    def _ask(self, command: str, offset: int, length: int, flags: int) -> object:
        if self.fua and flags & FUA:
            answer = self._ask(command, offset, length, flags & ~FUA)
            if command in ("write", "trim", "zero"):
                self.h.flush()
            return answer
        if self.df and command in ("read", "read chunks"):
            flags &= ~DF
        if self.zeroes and command == "zero":
            if flags & FAST_ZERO:
                return "ENOTSUP"
            return self._write(bytes(length), offset, flags & FUA)
        if self.split and length > self.maximum:
            if command == "write":
                return self._write(payload(length, self.seed), offset, flags)
            if command == "read":
                return digest(self._read(offset, length))
            if command == "read chunks":
                return [digest(self._read(offset, length)), "by hand"]
        return super()._ask(command, offset, length, flags)

    def _pieces(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for at in range(0, length, self.maximum):
            yield offset + at, min(self.maximum, length - at)

    def _write(self, data: bytes, offset: int, flags: int) -> None:
        for at, length in self._pieces(offset, len(data)):
            self.h.pwrite(data[at - offset :][:length], at, flags)

    def _read(self, offset: int, length: int) -> bytes:
        return b"".join(bytes(self.h.pread(n, at)) for at, n in self._pieces(offset, length))


def main() -> None:
    wanted: Line = json.load(sys.stdin)
    for settings in wanted["connections"]:
        connection = Connection(wanted, settings)
        answers: Line = {"connection": connection.name}
        if connection.options:
            answers["options"] = dict(connection.ask_options())
        requests = CarefulRequests(connection, wanted["by_hand"])
        answers["facts"] = requests.facts
        answers["answers"] = {one[0]: requests.ask(*one) for one in connection.requests}
        outcome(requests.h.shutdown)
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
