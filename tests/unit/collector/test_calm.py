import asyncio
import threading
import time

import pytest
import uvicorn

from collector.calm import Server


class Counting(Server):
    ticks = 0

    async def on_tick(self, counter: int) -> bool:
        self.ticks += 1
        assert counter % 10 == 0, "uvicorn renews the date of its answers at multiples of ten"
        return await super().on_tick(counter)


async def application(_scope: object, _receive: object, _send: object) -> None:
    """Is never called."""


@pytest.fixture
def server() -> Counting:
    return Counting(uvicorn.Config(application, port=0, lifespan="off", log_config=None, log_level="warning"))


def run(server: Server) -> threading.Thread:
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < end
        time.sleep(0.005)
    return thread


def test_it_wakes_once_a_second_and_ends_at_once(server: Counting) -> None:
    thread = run(server)
    time.sleep(1.5)
    assert 1 <= server.ticks <= 4
    began = time.monotonic()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
    assert time.monotonic() - began < 0.9


def test_what_was_to_end_before_it_began_does_not_begin(server: Counting) -> None:
    server.should_exit = True
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
