"""The ground the tests of methods stand on does what it says."""

from __future__ import annotations

import pytest
import torch

from models.errors import MethodNotApplicable
from models.methods.gradient import gradcam
from models.steps import Forward, InputGradient
from models.targets import ResolvedTarget
from models.types import Intervention


def scores(subject):
    """A long method: scores of the picture and of half of it, one step each."""
    found = []
    for factor in (1.0, 0.5):
        logits = yield Forward(subject.inputs * factor)
        found.append(subject.scores(logits)[0])
    return torch.stack(found, 1)[..., None]


def saliency(subject):
    gradient, _ = yield InputGradient(subject.inputs, subject.targets[:1])
    return gradient.sum(1)


def test_drive_sends_each_step_its_result(drive, subject_of, flat_net, images):
    subject = subject_of(flat_net, images[0], [1, 3])
    maps = drive(scores(subject), subject)
    expected = [flat_net(images[:1] * f)[0, [1, 3]] for f in (1.0, 0.5)]
    torch.testing.assert_close(maps[..., 0], torch.stack(expected, 1))
    assert len(drive.taken) == 2


def test_drive_together_equals_drive_alone(drive, subject_of, flat_net, images):
    change = Intervention(layer="out", channels=(0, 2), op="scale", value=3.0)
    subjects = [
        subject_of(flat_net, x, [2], interventions=i)
        for x, i in zip(images[:2], ((), (change,)), strict=True)
    ]
    alone = [drive(method(s), s) for s in subjects for method in (scores, saliency)]
    runs = [(method(s), s) for s in subjects for method in (scores, saliency)]
    for a, b in zip(drive.together(runs), alone, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(alone[0], alone[2])


def test_drive_raises_what_a_method_raises(drive, subject_of, flat_net, images):
    def refusing(subject):
        yield Forward(subject.inputs)
        raise MethodNotApplicable("Not here.")

    subject = subject_of(flat_net, images[0])
    with pytest.raises(MethodNotApplicable, match="Not here"):
        drive(refusing(subject), subject)


def test_drive_refuses_steps_that_are_too_big(drive, subject_of, flat_net, images):
    def greedy(subject):
        yield Forward(subject.inputs.repeat(5, 1, 1, 1))

    subject = subject_of(flat_net, images[0], chunk=4)
    with pytest.raises(AssertionError):
        drive(greedy(subject), subject)


def test_subjects_of_pooled_linear_heads_have_the_short_gradient(
    subject_of, capture_of, pool_net, images
):
    subject = subject_of(pool_net, images[0], [ResolvedTarget(1, (0, 4)), 2], "out")
    assert subject.warm.head.closed_form
    assert subject.capture.gradient.shape == (1, 2, 6, 1, 1)
    whole = capture_of(pool_net, images[:1], "out", subject.targets)
    torch.testing.assert_close(gradcam(subject.capture), gradcam(whole))


def test_untouched_notices(untouched, pool_net):
    with pytest.raises(AssertionError), untouched(pool_net):
        pool_net.fc.bias[0] += 1
    with pytest.raises(AssertionError), untouched(pool_net):
        pool_net.pool.train()
    with pytest.raises(AssertionError), untouched(pool_net):
        pool_net.fc.register_forward_hook(lambda *_: None)
