import torch
from hypothesis import given
from hypothesis import strategies as st

from optimize.rl.memory import Memory, Prefixes, shared

IDS = st.lists(st.integers(0, 3), max_size=12)


def filled(ids: list[int], layers: int = 2) -> Memory:
    memory = Memory(4)
    values = torch.tensor(ids, dtype=torch.float32).view(1, -1, 1)
    for layer in range(layers):
        memory.write(layer, 0, values, -values)
    return memory


@given(IDS, IDS, IDS)
def test_shared_counts_the_common_beginning(head: list[int], left: list[int], right: list[int]) -> None:
    count = shared(head + left, head + right)
    assert count >= len(head)
    assert (head + left)[:count] == (head + right)[:count]
    assert (head + left)[count : count + 1] != (head + right)[count : count + 1] or count == len(head + left)


def test_a_memory_keeps_what_was_written_when_it_grows() -> None:
    memory = Memory(2)
    pieces = torch.arange(20.0).view(1, 20, 1)
    for start in range(0, 20, 3):
        keys, values = memory.write(0, start, pieces[:, start : start + 3], -pieces[:, start : start + 3])
    assert torch.equal(keys, pieces)
    assert torch.equal(values, -pieces)


def test_writing_to_a_fork_leaves_the_original() -> None:
    memory = filled([1, 2, 3])
    memory.fork(2, 8).write(0, 1, torch.full((1, 1, 1), 9.0), torch.full((1, 1, 1), 9.0))
    keys, _ = memory.write(0, 3, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    assert keys.flatten().tolist() == [1, 2, 3, 0]


def test_a_row_starts_from_the_longest_kept_beginning_but_computes_its_last_id() -> None:
    prefixes = Prefixes(1 << 20)
    prefixes.keep(None, list(range(20)), filled(list(range(20))))
    prefixes.keep(None, list(range(10)), filled(list(range(10))))
    memory, length = prefixes.start(None, [*range(15), 99, 98], 32)
    assert length == 15
    keys, _ = memory.write(1, 15, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    assert keys.flatten().tolist() == [*range(15), 0]
    assert prefixes.start(None, list(range(20)), 32)[1] == 19


def test_another_adapter_never_starts_from_a_kept_prompt() -> None:
    prefixes = Prefixes(1 << 20)
    prefixes.keep("a", list(range(20)), filled(list(range(20))))
    assert prefixes.start(None, list(range(20)), 32)[1] == 0
    assert prefixes.start("b", list(range(20)), 32)[1] == 0
    assert prefixes.start("a", list(range(20)), 32)[1] == 19


def test_kept_prompts_stay_within_their_bytes_and_the_used_ones_stay_longest() -> None:
    one = filled(list(range(20))).fork(20, 20).nbytes
    prefixes = Prefixes(3 * one)
    for head in range(3):
        prefixes.keep(None, [head] * 20, filled([head] * 20))
    assert prefixes.start(None, [0] * 20, 20)[1] == 19
    prefixes.keep(None, [3] * 20, filled([3] * 20))
    assert prefixes.nbytes == 3 * one
    assert len(prefixes) == 3
    assert [prefixes.longest(None, [head] * 20)[1] for head in range(4)] == [19, 0, 19, 19]
