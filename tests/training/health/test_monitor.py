"""Which losses are spikes, and which skipped steps are too many."""

import math

import pytest

from flowhn_jax.training.health.monitor import Monitor, RunProgress, TooManySkippedError

NAN = float("nan")


def monitor_of(losses=(), max_skipped=3):
    """Return a monitor after these losses, its progress, and the lines that it logs."""
    lines, progress = [], RunProgress(losses=list(losses))
    return Monitor(progress, max_skipped, lines.append), progress, lines


def row(loss, skipped_in_row=0):
    return {"loss": loss, "grad_norm": 2.5, "skipped_in_row": skipped_in_row}


@pytest.mark.parametrize(
    ("losses", "threshold"),
    [
        ([3.875, 4.125] * 8, 4 + 6 * 0.125),  # six standard deviations,
        ([4.0] * 16, 4 + 0.1 * 4),  # or a tenth of the mean, where that is more
        ([-4.0] * 64, -4 + 0.1 * 4),
    ],
)
def test_a_spike_is_a_loss_above_the_threshold(losses, threshold):
    monitor, progress, said = monitor_of(losses)
    monitor.observe(1, row(threshold))
    assert (progress.spikes, said) == (0, [])
    monitor, progress, said = monitor_of(losses)
    monitor.observe(1, row(threshold + 0.001))
    assert progress.spikes == len(said) == 1
    monitor.observe(2, row(99.0))
    assert progress.spikes == len(said) == 2


def test_the_line_of_a_spike():
    monitor, _, said = monitor_of([3.875, 4.125] * 8)
    monitor.observe(20, row(5.0))
    assert said == [
        "step 20: the loss of 5.0000 is a spike; the last 16 had the mean 4.0000 and the standard "
        "deviation 0.1250"
    ]


def test_no_spike_before_there_are_16_losses():
    monitor, progress, _ = monitor_of([4.0] * 15)
    monitor.observe(1, row(99.0))
    assert progress.spikes == 0


def test_the_last_64_finite_losses_are_kept():
    monitor, progress, _ = monitor_of()
    for step in range(70):
        monitor.observe(step, row(100.0 - step))
    assert progress.losses == [100.0 - step for step in range(6, 70)]
    monitor.observe(70, row(math.inf))  # a loss too large for float32, with finite gradients
    assert progress.spikes == 1
    monitor.observe(71, row(NAN, 1))
    assert progress.losses == [100.0 - step for step in range(6, 70)]


def test_too_many_skipped_steps_in_a_row():
    monitor, progress, said = monitor_of([4.0] * 16)
    for count in (1, 2):
        monitor.observe(4 + count, row(NAN, count))
    monitor.observe(7, row(9.0, 0))
    with pytest.raises(TooManySkippedError, match="last 3 steps up to 12 had") as raised:
        monitor.observe(12, row(9.0, 3))
    assert (raised.value.step, raised.value.count) == (12, 3)
    assert said[0] == "step 5 was skipped: loss nan, gradient norm 2.5"
    assert len(said) == 4  # with the spike of step 7
    # A skipped step changed no parameters: its loss is no spike and is not kept, finite or not.
    assert progress.spikes == 1
    assert progress.losses == [4.0] * 16 + [9.0]


def test_wary_while_the_next_skipped_step_may_be_one_too_many():
    monitor, _, _ = monitor_of()
    assert not monitor.is_wary
    for count, is_wary in ((1, True), (0, False)):
        monitor.observe(1, row(4.0, count))
        assert monitor.is_wary == is_wary
    monitor, _, _ = monitor_of(max_skipped=1)
    assert monitor.is_wary
    monitor.observe(1, row(4.0))
    assert monitor.is_wary


def test_a_new_run_has_no_losses_spikes_or_rewinds():
    assert RunProgress() == RunProgress(row=None, losses=[], spikes=0, rewinds=0)
