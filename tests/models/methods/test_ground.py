"""The ground the tests of methods stand on does what it says."""

from __future__ import annotations

import pytest
import torch

from models.errors import MethodNotApplicable
from models.methods.gradient import gradcam
from models.steps import Forward, InputGradient, LayerGradient
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
    assert subject.head.closed_form
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


def pairs(layer):
    """A long method: gradient plus activation at a layer, for all targets in one step."""

    def method(subject):
        capture = yield LayerGradient(subject.inputs, layer, subject.targets)
        assert capture.layer == layer
        torch.testing.assert_close(capture.score[0], subject.scores(subject.logits[None])[0])
        return (capture.gradient + capture.activation[:, None])[0].sum(1)

    return method


@pytest.mark.parametrize("targets", [[3], [ResolvedTarget(1, (0, 4)), 2]])
def test_layer_gradient(targets, drive, subject_of, capture_of, flat_net, images, untouched):
    subject = subject_of(flat_net, images[0], targets, "body")
    whole = capture_of(flat_net, images[:1], "body", targets)
    with untouched(flat_net):
        maps = drive(pairs("body")(subject), subject)
    torch.testing.assert_close(maps, (whole.gradient + whole.activation[:, None])[0].sum(1))


def test_layer_gradients_of_several_jobs_share_a_batch(drive, subject_of, flat_net, images):
    """Whatever their layers, numbers of targets and interventions."""
    change = Intervention(layer="act", channels=(1,), op="zero")
    wants = [("out", [0], ()), ("stem", [1, ResolvedTarget(2, (3,))], ()), ("out", [4], (change,))]
    runs = [
        (pairs(layer)(s), s)
        for x, (layer, targets, change) in zip(images, wants, strict=False)
        for s in [subject_of(flat_net, x, targets, layer, interventions=change)]
    ]
    alone = [drive(pairs(layer)(s), s) for (layer, *_), (_, s) in zip(wants, runs, strict=True)]
    for together, expected in zip(drive.together(runs), alone, strict=True):
        torch.testing.assert_close(together, expected)


def test_layer_gradient_is_zero_where_the_layer_has_no_part(drive, subject_of, pool_net, images):
    class Aside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.spare = pool_net, torch.nn.Conv2d(3, 2, 1).requires_grad_(False)

        def forward(self, x):
            self.spare(x)
            return self.net(x)

    subject = subject_of(Aside().eval(), images[0], [0])
    maps = drive(pairs("spare")(subject), subject)
    torch.testing.assert_close(maps, subject.module.spare(images[:1]).sum(1))
