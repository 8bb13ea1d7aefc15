import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.table import VALUE, Table, key


def contend(path: Path, name: str, keys: int, queue: "multiprocessing.Queue[dict[int, str]]") -> None:
    with Table(path, slots=4096) as table:
        queue.put({n: table.put_if_absent(key("k", str(n)), f"{name}-{n}".encode()).decode() for n in range(keys)})


def take_all(path: Path, keys: int, queue: "multiprocessing.Queue[list[int]]") -> None:
    with Table(path, slots=4096) as table:
        queue.put([n for n in range(keys) if table.take(key("t", str(n))).value is not None])


def write_forever(path: Path) -> None:
    with Table(path, slots=256) as table:
        for n in range(10**9):
            table.add(key("w", str(n % 500)), b"x" * (n % VALUE))


def test_what_is_put_is_found_by_another_table_on_the_same_file(tmp_path: Path) -> None:
    with Table(tmp_path / "t") as one, Table(tmp_path / "t") as two:
        assert one.put_if_absent(key("a"), b"1") == b"1"
        assert two.get(key("a")) == b"1"
        assert two.put_if_absent(key("a"), b"2") == b"1"
    with Table(tmp_path / "t") as again:
        assert again.get(key("a")) == b"1"
        assert again.get(key("b")) is None


def test_workers_that_race_for_a_key_agree_on_its_value(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=contend, args=(tmp_path / "t", name, 500, queue)) for name in "ab"]
    for worker in workers:
        worker.start()
    first, second = queue.get(timeout=60), queue.get(timeout=60)
    for worker in workers:
        worker.join(30)
    assert first == second


def test_workers_that_race_to_take_get_each_value_once(tmp_path: Path) -> None:
    with Table(tmp_path / "t", slots=4096) as table:
        for n in range(500):
            table.add(key("t", str(n)), b"episode")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=take_all, args=(tmp_path / "t", 500, queue)) for _ in "ab"]
    for worker in workers:
        worker.start()
    taken = queue.get(timeout=60) + queue.get(timeout=60)
    for worker in workers:
        worker.join(30)
    assert sorted(taken) == list(range(500))


def test_a_writer_killed_at_any_moment_leaves_a_sound_table_and_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writer = context.Process(target=write_forever, args=(tmp_path / "t",))
    writer.start()
    with Table(tmp_path / "t", slots=256) as table:
        while not any(table.get(key("w", str(n))) for n in range(500)):
            pass
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join(30)
        for n in range(500):
            value = table.get(key("w", str(n)))
            assert value is None or value == b"x" * len(value)
        assert table.put_if_absent(key("after"), b"1") == b"1"


def test_values_of_one_key_are_taken_once_each_oldest_first(tmp_path: Path) -> None:
    with Table(tmp_path / "t") as table:
        assert table.take(key("a")) == (None, 0)
        table.add(key("a"), b"1")
        table.add(key("a"), b"2")
        assert table.take(key("a")) == (b"1", 2)
        assert table.take(key("a")) == (b"2", 2)
        assert table.take(key("a")) == (None, 2)
        table.add(key("a"), b"3")
        assert table.take(key("a")) == (b"3", 3)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 120))
def test_a_full_bucket_gives_up_what_was_used_longest_ago(count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Table(tmp_path_factory.mktemp("t") / "t", slots=16) as table:
        table.put_if_absent(key("kept"), b"kept")
        for n in range(count):
            table.put_if_absent(key(str(n)), str(n).encode())
            assert table.get(key("kept")) == b"kept"
        found = [n for n in range(count) if table.get(key(str(n))) is not None]
        assert found == list(range(max(0, count - 15), count))


def test_a_file_that_is_no_table_is_laid_out_anew(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"something else" * 1000)
    with Table(tmp_path / "t", slots=16) as table:
        assert table.put_if_absent(key("a"), b"1") == b"1"


def test_the_first_size_of_a_file_holds(tmp_path: Path) -> None:
    with Table(tmp_path / "t", slots=64) as small:
        small.put_if_absent(key("a"), b"1")
    with Table(tmp_path / "t", slots=4096) as again:
        assert again.get(key("a")) == b"1"


def test_keys_and_values_have_their_sizes(tmp_path: Path) -> None:
    with Table(tmp_path / "t") as table:
        with pytest.raises(ValueError, match="16 bytes"):
            table.add(b"short", b"")
        with pytest.raises(ValueError, match="136"):
            table.add(key("a"), b"x" * 137)


def test_what_thousands_say_alike_pushes_out_nothing_of_others(tmp_path: Path) -> None:
    with Table(tmp_path / "t", slots=16) as table:  # one bucket
        for number in range(8):
            table.put_if_absent(key("sticky", str(number)), b"%d" % number)
        for _ in range(5000):
            table.add(key("prefix", "Hello"), b"another")
        assert [table.get(key("sticky", str(number))) for number in range(8)] == [b"%d" % n for n in range(8)]
        assert table.take(key("prefix", "Hello")).found == 8


def test_what_was_taken_and_given_back_is_there_once(tmp_path: Path) -> None:
    with Table(tmp_path / "t") as table:
        table.add(key("a"), b"1")
        assert table.take(key("a")) == (b"1", 1)
        table.give_back(key("a"), b"1")
        assert table.take(key("a")) == (b"1", 1)
        assert table.take(key("a")) == (None, 1)
        table.give_back(key("b"), b"2")  # pushed out meanwhile
        assert table.take(key("b")) == (b"2", 1)


@pytest.mark.parametrize("together", [2, 8])
def test_conversations_that_run_side_by_side_with_one_prefix_are_each_continued(tmp_path: Path, together: int) -> None:
    with Table(tmp_path / "t", slots=64) as table:
        for turn in range(20):
            for one in range(together):
                table.add(key("prefix", "Hello"), b"%d-%d" % (turn, one))
            taken = {table.take(key("prefix", "Hello")).value for _ in range(together)}
            assert taken == {b"%d-%d" % (turn, one) for one in range(together)}
