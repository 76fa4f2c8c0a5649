"""The same phases, in a process that lives on: no descriptor, no task, no thread is left."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from gateway.server import Server
from gateway.settings import ListenTCP, ListenUnix, Settings
from tests import server_rig, workers_rig
from tests.hostile.open_phases import ALL, QUICK
from tests.hostile.phases import Phase
from tests.support.fake_upstream import FakeUpstream
from tests.workers_rig import Start, descriptors

fake, settings, crew, stack = (
    server_rig.fake,
    server_rig.settings,
    workers_rig.crew,
    workers_rig.stack,
)


def enter_all(
    uri: str, pki: Path, fake: FakeUpstream, kinds: Sequence[type[Phase]] = ALL
) -> list[Phase]:
    entered = []
    for kind in kinds:
        entered.append(kind(uri, pki, fake))
        entered[-1].enter()
    return entered


def leave(entered: list[Phase], *, drained: bool) -> None:
    # All are closed whatever one of them finds: it is not to be seen in the next test.
    with contextlib.ExitStack() as all_of_them:
        for phase in entered:
            all_of_them.callback(phase.close)
        for phase in entered:
            if drained:
                phase.drained()
            else:
                phase.cut()
            phase.look_at_upstream(phase.upstream if drained else phase.upstream_cut)
            phase.close()


def fds() -> Counter[str]:
    gc.collect()  # a socket that is found only now would be a ResourceWarning, and fail the test
    return descriptors(os.getpid())


@pytest.mark.parametrize("how", ["drained", "second signal", "cancelled"])
async def test_nothing_is_left(
    pki: Path, settings: Settings, fake: FakeUpstream, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "front"
    listen = (ListenTCP("127.0.0.1", 0), ListenUnix(str(path)))
    patient = dataclasses.replace(settings, listen=listen, handshake_timeout_s=60.0)
    await trio.to_thread.run_sync(gc.collect)  # the thread that phases are entered in is there
    before, tasks = fds(), trio.lowlevel.current_statistics().tasks_living
    kinds = QUICK if how == "cancelled" else ALL
    result: list[bool] = []
    async with trio.open_nursery() as nursery:

        async def run(task_status: trio.TaskStatus[list[str]]) -> None:
            result.append(await Server(patient).run(task_status=task_status))

        uri, _ = await nursery.start(run)
        entered = await trio.to_thread.run_sync(enter_all, uri, pki, fake, kinds)
        if how == "cancelled":
            nursery.cancel_scope.cancel()
        else:
            signal.raise_signal(signal.SIGTERM)
            if how == "drained":
                await wait_all_tasks_blocked()  # it is known to all
            else:
                signal.raise_signal(signal.SIGINT)
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: leave(entered, drained=how == "drained"))
    assert result == {"drained": [True], "second signal": [False], "cancelled": []}[how]
    assert not path.exists()
    fake.reset()
    assert fds() == before
    assert trio.lowlevel.current_statistics().tasks_living == tasks


def test_worker_that_is_replaced(pki: Path, crew: Start, fake: FakeUpstream) -> None:
    """SIGTERM to each of two workers: their clients are drained, others come, and the supervisor
    holds no more than before."""
    with crew("--handshake-timeout", "60") as running:
        before = descriptors(running.pid)
        entered = enter_all(running.uri, pki, fake)
        for number in (1, 2):
            os.kill(running.wait_worker(number), signal.SIGTERM)
        for number in (1, 2):
            running.wait_log(rf"INFO worker {number}: listeners closed, \d+ sessions to end\n")
        leave(entered, drained=True)
        for number in (1, 2):
            running.wait_log(rf"INFO worker {number} \(process \d+\) has ended; the next one")
        for number in (3, 4):
            running.wait_worker(number)
        assert descriptors(running.pid) == before
