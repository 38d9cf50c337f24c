"""Batches whose loss is not finite: skipped, counted, and in the end a reason to stop."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import toy
from tests.train.test_endings import Recorder, lines, saved
from tests.train.test_loop import same_bits
from vidgen.train.metrics_buffer import NonFiniteLoss


class Bad(toy.ToyLoader):
    """Batches of these steps make the loss infinite."""

    def __init__(self, *steps):
        super().__init__(8)
        self.bad = {step - 1 for step in steps}

    def __next__(self):
        self.bad_batch = self.next if self.next in self.bad else None
        return super().__next__()


def train(workdir, *steps, **options):
    return toy.train(workdir, task=toy.ToyTask(fragile=True), loader=Bad(*steps), **options)


def test_bad_steps_are_skipped_counted_and_named_and_the_run_goes_on(tmp_path):
    evaluator = Recorder(3)
    train(tmp_path, 5, 6, log_every=4, evaluators=[evaluator], stop_after_nonfinite=3)
    skipped = {line["step"]: line.get("skipped") for line in lines(tmp_path)}
    assert skipped == {3: None, 4: 0, 8: 2, 9: None, 12: 0}
    assert all(np.isfinite(line["loss"]) for line in lines(tmp_path) if "loss" in line)
    named = map(json.loads, (tmp_path / "nonfinite.jsonl").read_text().splitlines())
    assert [(line["step"], line["clips"][0]) for line in named] == [(5, "clip-4-0"), (6, "clip-5-0")]
    assert evaluator.seen == [3, 9, 12]  # after step 6 nobody knows whether the weights are of use


def test_too_many_in_a_row_stop_the_run_whether_it_was_interrupted_among_them_or_not(tmp_path):
    message = r"steps 3 to 5: .*=\[\[3,5\]\]"
    with pytest.raises(NonFiniteLoss, match=message):
        train(tmp_path, 3, 4, 5, 6, stop_after_nonfinite=3)
    assert saved(tmp_path) == [4]  # in which two were bad already
    with pytest.raises(NonFiniteLoss, match=message):
        train(tmp_path, 5, 6, stop_after_nonfinite=3)


def test_the_advice_leads_past_the_bad_steps(tmp_path):
    with pytest.raises(NonFiniteLoss) as error:
        train(tmp_path, 3, 4, 5, stop_after_nonfinite=3)
    (found,) = re.findall(r"--config.run.skip_steps=(\S+?)\. ", str(error.value))
    assert found == "[[3,5]]"
    state = train(tmp_path, 3, 4, 5, stop_after_nonfinite=3, skip_steps=((3, 5),))
    assert int(state.step) == 12
    # The steps that are left out change nothing: as of batches that are skipped.
    other = train(tmp_path / "other", 3, 4, 5, stop_after_nonfinite=4)
    same_bits(state, other)
    assert [line["skipped"] for line in lines(tmp_path)] == [0, 0, 1, 1, 1] + 7 * [0]


def test_weights_that_are_of_no_use_are_reported_before_they_are_evaluated_or_saved_at_the_end(tmp_path):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Diverges(toy.ToyTask):
        def loss(self, context):
            loss, metrics = super().loss(context)
            return loss + jnp.where(context.step >= 2, jnp.inf, 0.0), metrics

    evaluator = Recorder(4)
    with pytest.raises(NonFiniteLoss, match="steps 3 to 4"):
        toy.train(tmp_path, task=Diverges(), num_steps=4, evaluators=[evaluator])
    assert not evaluator.seen and not saved(tmp_path)
