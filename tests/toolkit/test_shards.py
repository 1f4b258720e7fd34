from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vitkit.train.shards import Shard, micro_batches

SIZES = st.integers(1, 60), st.integers(1, 20), st.integers(1, 3), st.integers(1, 4)


@given(*SIZES, st.integers(0, 99))
def test_every_process_takes_an_equal_part_of_every_step(count, batch, accumulate, processes, seed):
    parts = [
        micro_batches([count], batch, accumulate, Shard(rank, processes), seed) for rank in range(processes)
    ]
    assert len({len(part) for part in parts}) == 1
    assert len(parts[0]) == -(-count // batch) * accumulate
    assert len({len(images) for part in parts for images in part}) == 1
    used = [i for part in parts for images in part for i in images]
    assert set(used) <= set(range(count))
    passes = len(parts[0]) * processes
    if count >= passes:
        # Each at most once, and fewer left out than there are passes.
        assert len(set(used)) == len(used) > count - passes
        size = len(parts[0][0]) * processes * accumulate
        assert size <= max(batch, processes * accumulate)


@given(st.integers(0, 99))
def test_a_step_holds_the_same_images_however_it_is_divided(seed):
    whole = micro_batches([48], 12, 1, Shard(), seed)
    for processes in (2, 3):
        parts = [micro_batches([48], 12, 2, Shard(rank, processes), seed) for rank in range(processes)]
        for step in range(4):
            mine = [i for part in parts for images in part[2 * step : 2 * step + 2] for i in images]
            assert sorted(mine) == sorted(whole[step])


@given(st.lists(st.integers(), max_size=20), st.integers(1, 5))
def test_shards_hold_each_item_once(items, count):
    assert sorted(i for rank in range(count) for i in Shard(rank, count).of(items)) == sorted(items)


@given(
    st.lists(st.integers(1, 20), min_size=2, max_size=9),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_chunks_are_divided_among_processes_and_read_a_few_at_a_time(chunks, batch, processes, seed):
    parts = [micro_batches(chunks, batch, 1, Shard(rank, processes), seed) for rank in range(processes)]
    used = [i for part in parts for images in part for i in images]
    assert len({(len(part), *map(len, part)) for part in parts}) == 1
    if len(parts[0]) * processes <= sum(chunks):
        assert len(set(used)) == len(used)
    # Only a chunk at a border is read by two processes.
    owner = [number for number, size in enumerate(chunks) for _ in range(size)]
    readers = [{owner[i] for images in part for i in images} for part in parts]
    if len(set(used)) == len(used):
        assert sum(map(len, readers)) <= len(set().union(*readers)) + processes - 1


def test_a_chunk_of_many_is_read_in_one_stretch():
    chunks = [100] * 50
    order = [i // 100 for images in micro_batches(chunks, 10, 1, Shard(), 0) for i in images]
    places = [[place for place, chunk in enumerate(order) if chunk == number] for number in range(50)]
    assert max(max(where) - min(where) for where in places) < 4 * 100
    assert order != sorted(order)
    assert micro_batches(chunks, 10, 1, Shard(), 0) != micro_batches(chunks, 10, 1, Shard(), 1)
