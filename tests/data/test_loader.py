import itertools
import json
import threading
import time

import numpy as np
import pytest

from vidgen.data.loader import Loader
from vidgen.data.source import BrokenClip


class Numbers:
    """Clips whose pixels are their index; some may be broken."""

    def __init__(self, count, broken=()):
        self.count = count
        self.broken_indices = frozenset(broken)
        self.read: list[int] = []

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"Numbers({self.count})"

    def __getitem__(self, index):
        self.read.append(index)
        if index in self.broken_indices:
            raise BrokenClip(f"clip{index}", "no picture")
        return {
            "video": np.full((2, 4, 4, 3), index, np.uint8),
            "caption": f"number {index}",
            "name": f"clip{index}",
            "boxes": np.full((1, 2), index, np.float32),
        }


def flat(batches):
    return list(itertools.chain.from_iterable(batches))


def names(loader, steps):
    return [next(loader)["name"] for _ in range(steps)]


def order(*, clips=10, batch_size=4, steps=15, **keywords):
    with Loader(Numbers(clips), batch_size=batch_size, **{"seed": 3, **keywords}) as loader:
        return names(loader, steps)


def test_batch_holds_what_the_source_gives():
    with Loader(Numbers(10), batch_size=3, seed=0) as loader:
        batch = next(loader)
    assert batch["video"].shape == (3, 2, 4, 4, 3) and batch["video"].dtype == np.uint8
    indices = [int(name.removeprefix("clip")) for name in batch["name"]]
    assert batch["video"][:, 0, 0, 0, 0].tolist() == indices
    assert batch["caption"] == [f"number {index}" for index in indices]
    np.testing.assert_array_equal(
        batch["boxes"], np.array(indices, np.float32)[:, None, None] * np.ones((3, 1, 2))
    )


def test_order_depends_on_the_seed_alone():
    assert order() == order(num_threads=0, prefetch=0) == order(num_threads=4, prefetch=2)
    assert order() != order(seed=4)


def test_every_epoch_has_each_clip_once_in_an_order_of_its_own():
    sequence = flat(order(clips=10, batch_size=5, steps=6))
    epochs = [sequence[start : start + 10] for start in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == 10 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_without_shuffle_clips_come_in_order():
    assert flat(order(clips=3, batch_size=2, steps=3, shuffle=False)) == [
        f"clip{index}" for index in (0, 1, 2, 0, 1, 2)
    ]


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_batches_of_one(processes):
    parts = [order(process_index=index, process_count=processes) for index in range(processes)]
    assert [flat(rows) for rows in zip(*parts, strict=True)] == order()


def test_a_process_decodes_its_own_clips_only():
    source = Numbers(40)
    loader = Loader(source, batch_size=4, seed=0, process_index=1, process_count=2, num_threads=0, prefetch=0)
    given = flat(names(loader, 5))
    loader.close()
    assert [f"clip{index}" for index in source.read] == given and len(given) == 10


@pytest.mark.parametrize("shuffle", [True, False])
def test_resume_is_exact_at_every_step(shuffle):
    whole = order(shuffle=shuffle)
    for step in range(10):
        with Loader(Numbers(10), batch_size=4, seed=3, shuffle=shuffle) as loader:
            names(loader, step)
            state = json.loads(json.dumps(loader.get_state()))
        with Loader(Numbers(10), batch_size=4, seed=3, shuffle=shuffle) as loader:
            loader.set_state(state)
            assert names(loader, 5) == whole[step : step + 5]


def test_a_loader_in_use_can_be_set_back():
    with Loader(Numbers(10), batch_size=4, seed=3) as loader:
        names(loader, 2)
        state = loader.get_state()
        after = names(loader, 3)
        loader.set_state(state)
        assert loader.get_state() == state
        assert names(loader, 3) == after


def test_state_is_global_and_does_not_count_what_is_read_ahead():
    states = []
    for index in range(2):
        loader = Loader(Numbers(10), batch_size=4, seed=3, process_index=index, process_count=2, prefetch=8)
        names(loader, 3)
        states.append(loader.get_state())
        loader.close()
    assert states[0] == states[1] == {"next_index": 12, "num_clips": 10, "seed": 3}


def test_resume_with_another_number_of_processes():
    with Loader(Numbers(10), batch_size=4, seed=3, process_count=2) as loader:
        names(loader, 3)
        state = loader.get_state()
    parts = []
    for index in range(4):
        with Loader(Numbers(10), batch_size=4, seed=3, process_index=index, process_count=4) as loader:
            loader.set_state(state)
            parts.append(names(loader, 4))
    assert [flat(rows) for rows in zip(*parts, strict=True)] == order()[3:7]


def test_state_of_another_seed_is_refused():
    with Loader(Numbers(10), batch_size=4, seed=3) as loader, pytest.raises(ValueError, match="seed 5"):
        loader.set_state({"next_index": 4, "num_clips": 10, "seed": 5})


def test_state_inside_a_batch_is_refused():
    with Loader(Numbers(10), batch_size=4, seed=3) as loader, pytest.raises(ValueError, match="batches of 4"):
        loader.set_state({"next_index": 6, "num_clips": 10, "seed": 3})


def test_state_of_a_source_that_has_grown_warns(caplog):
    with Loader(Numbers(12), batch_size=4, seed=3) as loader:
        loader.set_state({"next_index": 8, "num_clips": 10, "seed": 3})
    assert "10 clips" in caplog.text and "12 now" in caplog.text


def test_fewer_clips_than_the_batch_repeat():
    batches = order(clips=3, batch_size=8, steps=3)
    sequence = flat(batches)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert all(sequence.count(f"clip{index}") == 8 for index in range(3))


def test_one_clip():
    assert order(clips=1, batch_size=2, steps=2) == [["clip0", "clip0"]] * 2


def test_empty_source_is_named():
    with pytest.raises(ValueError, match=r"Numbers\(0\)"):
        Loader(Numbers(0), batch_size=2, seed=0)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"batch_size": 3, "process_count": 2}, "multiple of 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2, "process_index": 2, "process_count": 2}, "process_index is 2"),
    ],
)
def test_numbers_that_do_not_fit(keywords, message):
    with pytest.raises(ValueError, match=message):
        Loader(Numbers(4), seed=0, **keywords)


def broken_order(process_index=0, process_count=1):
    source = Numbers(10, broken=(2, 7))
    with Loader(
        source, batch_size=4, seed=3, process_index=process_index, process_count=process_count
    ) as loader:
        return names(loader, 15), dict(loader.broken), loader.num_replaced


def test_broken_clips_are_replaced_counted_and_logged_once(caplog):
    batches, broken, replaced = broken_order()
    sequence = flat(batches)
    assert len(sequence) == 60 and not {"clip2", "clip7"} & set(sequence)
    assert broken == {"clip2": "no picture", "clip7": "no picture"}
    assert replaced >= 12  # each of the two comes once in each of the six epochs
    assert caplog.text.count("clip2: no picture") == caplog.text.count("clip7: no picture") == 1
    kept = [(got, had) for got, had in zip(sequence, flat(order()), strict=True) if had not in broken]
    assert len(kept) == 48 and all(got == had for got, had in kept)


def test_replacements_are_the_same_in_every_run_and_split():
    parts = [broken_order(index, 2)[0] for index in range(2)]
    assert [flat(rows) for rows in zip(*parts, strict=True)] == broken_order()[0] == broken_order()[0]


def test_a_source_of_broken_clips_alone_is_an_error():
    with (
        Loader(Numbers(5, broken=range(5)), batch_size=2, seed=0) as loader,
        pytest.raises(RuntimeError, match=r"no picture.*Numbers\(5\)"),
    ):
        next(loader)


def test_other_errors_of_a_source_are_not_hidden():
    class Faulty(Numbers):
        def __getitem__(self, index):
            raise KeyError("a defect")

    with Loader(Faulty(5), batch_size=2, seed=0) as loader, pytest.raises(KeyError, match="a defect"):
        next(loader)


def test_clips_of_different_shapes_are_named():
    class Uneven(Numbers):
        def __getitem__(self, index):
            clip = super().__getitem__(index)
            return {**clip, "video": np.zeros((2, 4 + index, 4, 3), np.uint8)}

    with Loader(Uneven(2), batch_size=2, seed=0) as loader, pytest.raises(ValueError, match=r"'video'.*clip"):
        next(loader)


def test_closing_ends_the_threads():
    loader = Loader(Numbers(100), batch_size=2, seed=0, num_threads=3)
    next(loader)
    mine = [thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")]
    assert mine
    loader.close()
    end = time.monotonic() + 10
    while any(thread.is_alive() for thread in mine) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(thread.is_alive() for thread in mine)
