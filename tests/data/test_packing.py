import collections
import itertools
import json

import numpy as np
import pytest
from grain import experimental

from vidgen.data.packing import PackedLoader, PackingOptions, plan_rows
from vidgen.data.source import BrokenClip

OPTIONS = PackingOptions(tokens_per_row=32, clips_per_row=5, window=4)
LENGTHS = np.random.default_rng(0).integers(1, 21, 50).tolist()


class Numbers:
    """Clips that are known by their number; some may be broken."""

    def __init__(self, count=50, broken=()):
        self.sizes = [(index, 16, 16) for index in range(count)]
        self.broken_indices = frozenset(broken)
        self.read: list[int] = []

    def __len__(self):
        return len(self.sizes)

    def __repr__(self):
        return f"Numbers({len(self)})"

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.broken_indices:
            raise BrokenClip(f"clip{index}", "no latents")
        return {"latents": np.full((1, 2, 2, 1), index), "caption": str(index), "name": f"clip{index}"}


def loader(source=None, lengths=LENGTHS, options=OPTIONS, **keywords):
    source = Numbers() if source is None else source
    return PackedLoader(source, lengths, options, **{"batch_size": 4, "seed": 3} | keywords)


def indices(batch):
    return [[int(clip["caption"]) for clip in row] for row in batch["rows"]]


def order(steps=9, **keywords):
    with loader(**keywords) as batches:
        return [indices(next(batches)) for _ in range(steps)]


def test_every_clip_is_in_one_row_of_an_epoch_and_no_row_holds_too_much():
    rows = list(plan_rows(LENGTHS, OPTIONS, seed=0, num_epochs=1))
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(50))
    assert max(sum(LENGTHS[index] for index in row) for row in rows) <= 32
    assert max(map(len, rows)) <= 5


def test_endless_rows_hold_each_clip_as_often():
    plan = iter(plan_rows(LENGTHS, OPTIONS, seed=0))
    counts = collections.Counter(dict.fromkeys(range(50), 0))
    orders = []
    for _ in range(48):  # windows, after each of which the rows are a beginning of the order
        window = list(itertools.chain.from_iterable(next(plan) for _ in range(OPTIONS.window)))
        counts.update(window)
        orders.append(window)
        assert max(counts.values()) - min(counts.values()) <= 1
    assert min(counts.values()) >= 10
    assert len({tuple(window) for window in orders}) == 48


def test_a_full_window_leaves_no_room_for_the_clip_that_follows():
    rows = list(plan_rows(LENGTHS, OPTIONS, seed=0, num_epochs=1))
    windows = [rows[start : start + 4] for start in range(0, len(rows), 4)]
    for window, following in itertools.pairwise(windows):
        left = [32 - sum(LENGTHS[i] for i in row) if len(row) < 5 else 0 for row in window]
        assert max(left) < max(LENGTHS[index] for row in following for index in row)


def test_the_plan_depends_on_seed_and_lengths_alone():
    assert order() == order(num_threads=0, prefetch=0) == order(num_threads=3, prefetch=1)
    assert order() != order(seed=4)


def test_rows_are_almost_full_where_clips_are_short():
    lengths = np.random.default_rng(1).integers(1, 200, 2000).tolist()
    options = PackingOptions(tokens_per_row=1024, clips_per_row=64)
    rows = list(itertools.islice(plan_rows(lengths, options, seed=0), 128))
    assert sum(lengths[index] for row in rows for index in row) / (128 * 1024) > 0.97


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_rows_of_one(processes):
    parts = [order(process_index=index, process_count=processes) for index in range(processes)]
    assert [list(itertools.chain.from_iterable(rows)) for rows in zip(*parts, strict=True)] == order()


def test_a_process_reads_its_own_clips_only():
    source = Numbers()
    with loader(source, process_index=1, process_count=2, num_threads=0, prefetch=0) as batches:
        given = [indices(next(batches)) for _ in range(5)]
    assert source.read == [index for step in given for row in step for index in row]


def test_a_batch_says_what_it_holds():
    with loader() as batches, loader(process_index=1, process_count=2) as half:
        batch, part = next(batches), next(half)
    given = list(itertools.chain.from_iterable(indices(batch)))
    assert (batch["tokens_per_row"], batch["clips_per_row"]) == (32, 5)
    assert batch["name"] == [f"clip{index}" for index in given]
    assert batch["num_frames"] == sum(given) == part["num_frames"]


def test_resume_is_exact_at_every_step_whatever_the_number_of_processes():
    whole = order(14)
    for step in range(8):
        with loader(process_index=1, process_count=4) as batches:
            for _ in range(step):
                next(batches)
            state = json.loads(json.dumps(batches.get_state()))
        with loader(prefetch=1) as batches:
            batches.set_state(state)
            assert batches.get_state() == state
            assert [indices(next(batches)) for _ in range(6)] == whole[step : step + 6]
            batches.set_state(state)  # a loader in use can be set back
            assert indices(next(batches)) == whole[step]


def test_the_plan_resumes_as_grain_asks_of_a_data_set():
    experimental.assert_equal_output_after_checkpoint(plan_rows(LENGTHS, OPTIONS, seed=0, num_epochs=2))


@pytest.mark.parametrize("change", [{"seed": 4}, {"source": Numbers(49), "lengths": LENGTHS[:49]}])
def test_a_state_of_other_clips_is_an_error(change):
    with loader() as batches:
        next(batches)
        state = batches.get_state()
    with (
        loader(**change) as other,
        pytest.raises(ValueError, match=r"is of (seed 3|num_clips 50), and it is"),
    ):
        other.set_state(state)


def test_broken_clips_are_left_out_and_named_once(caplog):
    source = Numbers(broken=[7, 8])
    with loader(source) as batches:
        given = [indices(next(batches)) for _ in range(9)]
        assert batches.broken == {"clip7": "no latents", "clip8": "no latents"}
    expected = [[[index for index in row if index not in (7, 8)] for row in step] for step in order()]
    assert given == expected
    assert len([record for record in caplog.records if "clip7" in record.message]) <= 1


def test_nothing_but_broken_clips_is_an_error():
    message = r"65 clips in a row could not be read; 50 broken so far, .*Numbers\(50\)"
    with loader(Numbers(broken=range(50)), prefetch=0) as batches, pytest.raises(RuntimeError, match=message):
        collections.deque(batches, maxlen=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch_size": 3, "process_count": 2}, "batch_size is 3 rows, which 2 processes cannot share"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2; expected 0 to 1"),
        ({"source": Numbers(0), "lengths": []}, "no clips to pack"),
        ({"source": Numbers(3)}, "50 lengths for 3 clips"),
        ({"lengths": [*LENGTHS[:-1], 33]}, "clip 49 has 33 tokens, more .* set it to 33 or more"),
    ],
)
def test_numbers_that_do_not_fit_are_errors(keywords, message):
    with pytest.raises(ValueError, match=message):
        loader(**keywords)


@pytest.mark.parametrize("name", ["tokens_per_row", "clips_per_row", "window"])
def test_options_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        PackingOptions(**{"tokens_per_row": 8, name: 0})
