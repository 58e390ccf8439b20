"""The store on a real Valkey, and without it; the embedded Valkey's own life and death."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
import redis

from signalbox.serving.embedded_valkey import EmbeddedValkey, ValkeyError
from signalbox.serving.store import PREFIX, Store, StoreUnavailable, redact
from tests.ports import free_port


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with EmbeddedValkey() as url:
        yield url


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    store = Store(url, timeout_s=30)  # a command that is repeated after a pause may say something else
    yield store
    await store.close()


async def test_values(store: Store, url: str) -> None:
    assert await store.get("a") is None
    await store.set("a", b"\x00\xff")
    assert await store.get("a") == b"\x00\xff"
    with redis.Redis.from_url(url) as direct:
        assert direct.get(f"{PREFIX}a") == b"\x00\xff" and direct.ttl(f"{PREFIX}a") == -1
    assert await store.delete("a", "b") == 1
    assert await store.delete() == 0
    assert await store.get("a") is None


async def test_values_end(store: Store) -> None:
    await store.set("short", b"x", ttl_s=30)
    assert await store.get("short") == b"x" and 0 < await store._redis.pttl(f"{PREFIX}short") <= 30_000
    await store.set("short", b"x", ttl_s=0.05)
    await asyncio.sleep(0.1)
    assert await store.get("short") is None
    await store.set("long", b"x")
    assert await store.expire("long", 0.05) and not await store.expire("none", 1)
    await asyncio.sleep(0.1)
    assert await store.get("long") is None


async def test_hashes(store: Store, url: str) -> None:
    assert await store.hgetall("h") == {}
    await store.hset("h", {"a": 1, "b": b"\xff", "c": "é"}, ttl_s=60)
    await store.hset("h", {})
    assert await store.hgetall("h") == {"a": b"1", "b": b"\xff", "c": "é".encode()}
    with redis.Redis.from_url(url) as direct:
        assert 55 < direct.ttl(f"{PREFIX}h") <= 60
    assert await store.hdel("h", "a", "z") == 1
    assert await store.hdel("h") == 0
    assert set(await store.hgetall("h")) == {"b", "c"}


async def test_many_callers_share_few_connections(url: str) -> None:
    store = Store(url, max_connections=4, timeout_s=5)
    with redis.Redis.from_url(url) as direct:
        before = len(direct.client_list())
        await asyncio.gather(*(store.set(f"k{i}", b"x", 10) for i in range(500)))
        assert len(direct.client_list()) - before <= 4
    assert await store.get("k499") == b"x"
    await store.close()
    with redis.Redis.from_url(url) as direct:
        assert len(direct.client_list()) <= before


async def test_a_cancelled_command_does_not_leave_its_answer_to_the_next(url: str, store: Store) -> None:
    one = Store(url, max_connections=1, timeout_s=30)
    await one.set("x", b"wrong")
    await one.set("y", b"right")
    with redis.Redis.from_url(url) as direct:
        direct.client_pause(4000)  # the server answers late
        waiting = asyncio.create_task(one.get("x"))
        await asyncio.sleep(0.05)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    assert await one.get("y") == b"right"
    await one.close()


async def test_a_task_that_uses_the_store_can_be_cancelled(store: Store) -> None:
    """redis-py loses a cancellation that comes while a command ends; a loop around one would go on for ever."""

    async def loop() -> None:
        while True:
            await store.hset("h", {"a": b"x" * 100}, ttl_s=5)

    for i in range(200):
        task = asyncio.create_task(loop())
        await asyncio.sleep(i / 200 * 0.003)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=30)
        assert done and task.cancelled()


async def test_cleaning_up_after_a_cancellation_may_use_the_store(store: Store) -> None:
    async def work() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await store.set("tidy", b"yes")

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.get("tidy") == b"yes"


async def test_loss_is_quick_logged_once_and_ends(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    valkey = EmbeddedValkey(port=port)
    url = valkey.start()
    store = Store(f"redis://user:hunter2@127.0.0.1:{port}/0", retry_after_s=0.2)
    open_store = Store(url, retry_after_s=3600)
    with caplog.at_level(logging.INFO, logger="signalbox"):
        await open_store.set("a", b"x")
        assert open_store.available
        valkey.stop()
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                await open_store.get("a")
        assert not open_store.available
        for _ in range(100):
            with pytest.raises(StoreUnavailable, match="trying again in"):  # refused without asking the network
                await open_store.get("a")
        open_store._closed_until = 0.0  # the time to try again has come
        with pytest.raises(StoreUnavailable):  # tried again, still gone
            await open_store.get("a")
        with EmbeddedValkey(port=port):
            open_store._closed_until = 0.0
            assert await open_store.get("a") is None
            assert open_store.available
            await open_store.close()
            with pytest.raises(StoreUnavailable) as refused:
                await store.ping()  # a wrong password
    # Of these two alone: a store of another test may come back meanwhile.
    lines = [text for record in caplog.records if f":{port}/" in (text := record.getMessage())]
    assert len([line for line in lines if "is lost" in line and "hunter2" not in line]) == 2  # one for each store
    assert len([line for line in lines if "is back" in line]) == 1
    assert "hunter2" not in caplog.text + str(refused.value)
    await store.close()


async def test_an_event_loop_that_stood_still_is_no_loss(url: str) -> None:
    store = Store(url, timeout_s=2)
    await store.set("a", b"x")
    with redis.Redis.from_url(url) as direct:
        direct.client_pause(30)
        waiting = asyncio.create_task(store.get("a"))
        await asyncio.sleep(0.01)  # the command is on its way
        time.sleep(2.3)  # noqa: ASYNC251 (standing still is what is tested)
        assert await waiting == b"x"
    assert store.available
    await store.close()


async def test_while_lost_one_caller_tries_for_all() -> None:
    """A server that accepts and never answers: 100 callers must not wait for 100 timeouts, nor all for one."""
    accepted = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = Store(f"redis://127.0.0.1:{port}", timeout_s=0.3, retry_after_s=60)
    with pytest.raises(StoreUnavailable):
        await store.ping()
    store._closed_until, accepted = 0.0, 0  # the time to try again has come
    results = await asyncio.gather(*(store.ping() for _ in range(100)), return_exceptions=True)
    assert all(isinstance(result, StoreUnavailable) for result in results)
    assert accepted <= 2  # one caller, two attempts
    await store.close()
    server.close()


async def test_a_full_store_refuses_and_is_not_lost() -> None:
    with EmbeddedValkey(max_memory_mib=16) as url:
        store = Store(url)
        with pytest.raises(StoreUnavailable, match="refused"):
            for i in range(40):
                await store.set(f"state{i}", bytes(1 << 20))
        assert store.available and await store.get("state0") == bytes(1 << 20)
        await store.close()


async def test_state_stays_when_the_cache_fills_the_memory() -> None:
    with EmbeddedValkey(max_memory_mib=16) as url:
        store = Store(url)
        await store.set("state", b"kept")
        for i in range(64):
            await store.set(f"cache{i}", bytes(1 << 20), ttl_s=3600)
        assert await store.get("state") == b"kept"
        assert await store.get("cache0") is None and await store.get("cache63") is not None
        await store.close()


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:pw@host:6379/0", "redis://host:6379/0"),
        ("rediss://user:pw@host/1?password=pw", "rediss://host/1"),
        ("unix:///run/valkey.sock?db=0&password=pw", "unix:/run/valkey.sock"),
        ("redis://:pw@host:port", "(an address that cannot be read)"),
    ],
)
def test_addresses_are_shown_without_secrets(url: str, shown: str) -> None:
    assert redact(url) == shown


@pytest.mark.parametrize("url", ["redis://:p/w@host:6379", "redis://:pw@host:port", "redis://host/0?socket_timeout=pw"])
def test_an_unreadable_address_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(ValueError) as caught:
        Store(url)
    assert "pw" not in str(caught.value) and "p/w" not in str(caught.value)


def test_the_embedded_valkey_is_reachable_by_us_alone() -> None:
    with EmbeddedValkey() as url:
        path = Path(url.removeprefix("unix://").partition("?")[0])
        assert path.is_socket() and path.parent.stat().st_mode & 0o077 == 0
    assert not path.parent.exists()
    valkey = EmbeddedValkey(port=free_port())
    valkey.start()
    listening = psutil.Process(valkey.pid).net_connections("tcp")
    valkey.stop()
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


async def test_the_embedded_valkey_keeps_its_data_where_told(tmp_path: Path) -> None:
    for _ in range(2):
        with EmbeddedValkey(data_dir=tmp_path / "state") as url:
            store = Store(url)
            found = await store.get("a")
            await store.set("a", b"kept")
            await store.close()
    assert found == b"kept"


def test_the_embedded_valkey_says_why_it_does_not_start(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValkeyError, match=r"port|bind|listen"):
            EmbeddedValkey(port=taken.getsockname()[1]).start()
    (tmp_path / "file").touch()
    with pytest.raises(ValkeyError, match="cannot be made"):
        EmbeddedValkey(data_dir=tmp_path / "file").start()
    long = tmp_path / ("x" * 100)
    long.mkdir()
    with pytest.raises(ValkeyError, match="too long"):
        EmbeddedValkey(folder=long).start()
    assert not list(long.iterdir())


def test_the_embedded_valkey_dies_with_its_parent() -> None:
    code = (
        "from signalbox.serving.embedded_valkey import EmbeddedValkey; import time\n"
        "valkey = EmbeddedValkey(); valkey.start(); print(valkey.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().split(") ")[1].startswith("Z"):
                return  # dead, and waiting for whoever adopted it
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.02)
    pytest.fail("Valkey outlived its parent")
