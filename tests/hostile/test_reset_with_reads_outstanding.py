"""A client queues reads and resets the connection, while another verifies every byte it gets.

nbdkit once asserted here, and might have written one client's data to the descriptor of another.
"""

from __future__ import annotations

import functools

import pytest

from tests.hostile.conftest import Lab
from tests.hostile.scripts import Holding
from tests.support.fake_upstream import Link, Script, pattern
from tests.support.rawclient import Cmd

READS = 64


def all_forwarded(link: Link) -> bool:
    return len(link.requests) == READS


@pytest.mark.parametrize("how", ["rst", "fin"])
@pytest.mark.parametrize("held", [True, False], ids=["no_reply_yet", "replies_on_their_way"])
@pytest.mark.parametrize("structured", [False, True], ids=["simple", "structured"])
def test_the_other_client_gets_its_own_data(
    lab: Lab, how: str, held: bool, structured: bool
) -> None:
    base = lab.settled_fds()
    good = lab.session(structured=structured)
    for _ in range(4):
        script = Holding(READS) if held else Script()
        lab.fake.queue.append(script)
        bad = lab.session(structured=structured)
        link = lab.fake.links[-1]
        for i in range(READS):
            bad.submit(Cmd.READ, 8192 * (i % 100), 65536)
        wanted = [good.submit(Cmd.READ, 4096 * i, 8192) for i in range(20)]
        if held:
            lab.fake.wait(functools.partial(all_forwarded, link), "all reads forwarded")
        bad.client.reset() if how == "rst" else bad.client.close()
        if isinstance(script, Holding):
            script.go.set()
        for _ in wanted:
            answer = good.collect()
            assert answer.error == 0
            assert answer.data == pattern(answer.request.offset, 8192)
        good.check()
    good.disc()
    good.client.close()
    lab.wait_fds(base)
    lab.assert_idle()
