"""Methods that need (activation, gradient) pairs of a layer.

Those that need one pair cost one pass all together: each function takes a `Capture` and returns
float32 maps (N, T, h, w), not normalised. The others are generators of steps for one `Subject` and
return maps (T, h, w). Notation: A_k is channel k of the activation, Z its number of pixels, g the
gradient of the score, S_k = sum_ij A_kij. Where the gradient is the same at every position (shape
(N, T, K, 1, 1)) sums over positions are done in closed form; where it is a row of a linear layer,
the generators need no step.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from models.capture import Capture
from models.errors import MethodNotApplicable
from models.methods._fullgrad import decomposed_maps, obstacle
from models.methods._shapley import curved_weights, linear_curved_weights
from models.steps import LayerGradient, Steps, Subject, run_by_targets
from models.targets import ResolvedTarget, ScoreWeights

_SPACE = (-2, -1)
_NOISE = 0.15
_FINER_SHARE = 0.6
_FINER_REFERENCES = 3


def cam(capture: Capture) -> Tensor:
    """Class activation map, sum_k W_ck A_k (Zhou et al. 2016, eq. 2), signed.

    Right only for global average pooling followed by one linear layer, where W_ck = Z g_k.
    """
    return _weighted_sum(_gradient(capture).mean(_SPACE) * _pixels(capture), capture.activation)


def gradcam(capture: Capture) -> Tensor:
    """Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2)."""
    return _weighted_sum(gradcam_weights(capture), capture.activation).relu_()


def gradcam_weights(capture: Capture) -> Tensor:
    """Weights (N, T, K) of Grad-CAM: the mean gradient of each channel."""
    gradient = _gradient(capture)
    return gradient[..., 0, 0] if gradient.shape[-2:] == (1, 1) else gradient.mean(_SPACE)


def gradcam_plus_plus(capture: Capture) -> Tensor:
    """Grad-CAM++ (Chattopadhay et al. 2018, eq. 10 and 19)."""
    return _weighted_sum(gradcam_plus_plus_weights(capture), capture.activation).relu_()


def gradcam_plus_plus_weights(capture: Capture) -> Tensor:
    """Weights (N, T, K) of Grad-CAM++.

    Eq. 19, alpha = g^2 / (2 g^2 + S g^3), is 1 / (2 + g S) wherever g is not 0, and the ReLU of eq.
    10 drops g < 0, so w_k = sum over g > 0 of g / (2 + g S_k): no epsilon, no cubes, and for A >= 0
    no denominator below 2. On signed layers the denominator can vanish; such positions get no
    weight.
    """
    gradient = _gradient(capture)
    total = capture.activation.sum(_SPACE)[:, None, :, None, None]
    denominator = 2 + gradient * total
    alpha = torch.where(denominator.abs() > 1e-6, denominator, torch.inf).reciprocal_()
    return alpha.mul_(gradient.clamp_min(0)).mean(_SPACE) * _pixels(capture)


def xgradcam(capture: Capture) -> Tensor:
    """XGrad-CAM (Fu et al. 2020, eq. 8)."""
    return _weighted_sum(xgradcam_weights(capture), capture.activation).relu_()


def xgradcam_weights(capture: Capture) -> Tensor:
    """Weights (N, T, K) of XGrad-CAM, sum_ij g_kij A_kij / S_k.

    A channel whose sum vanishes against the sum of its magnitudes (a dead one, or a signed one that
    cancels) gets weight 0 instead of an exploding one.
    """
    gradient, activation = _gradient(capture), capture.activation
    total = activation.sum(_SPACE)
    steady = total.abs() > 1e-6 * activation.abs().sum(_SPACE)
    share = activation / torch.where(steady, total, torch.inf)[..., None, None]
    return (gradient * share[:, None]).sum(_SPACE)


def hirescam(capture: Capture) -> Tensor:
    """HiResCAM (Draelos and Carin 2020, eq. 3), with a final ReLU like its relatives here."""
    return _inner(_gradient(capture), capture.activation).relu_()


def layercam(capture: Capture) -> Tensor:
    """LayerCAM (Jiang et al. 2021, eq. 6 and 7)."""
    return _inner(_gradient(capture).relu(), capture.activation).relu_()


def gradcam_elementwise(capture: Capture) -> Tensor:
    """Grad-CAM element-wise of pytorch-grad-cam: sum_k ReLU(g_k * A_k).

    This is LayerCAM on layers without negative values. Where the gradient is constant, ReLU(g_k
    A_k) = ReLU(g_k) ReLU(A_k) + ReLU(-g_k) ReLU(-A_k).
    """
    gradient, activation = _gradient(capture), capture.activation
    if gradient.shape[-2:] == (1, 1):
        evidence = _inner(gradient.relu(), activation.relu())
        return evidence.add_(_inner((-gradient).relu(), (-activation).relu()))
    return (gradient * activation[:, None]).relu_().sum(2)


def smooth_gradcam_plus_plus(subject: Subject) -> Steps:
    """Smooth Grad-CAM++ (Omeiza et al. 2019): derivatives are averaged over noisy inputs.

    D_p is the mean over the samples of g^p, alpha = D_2 / (2 D_2 + S D_3), w_k = sum_ij alpha
    ReLU(D_1), and A and S_k are those of the clean image. The paper prints D_1 in alpha's
    numerator, where Grad-CAM++, which this becomes without noise, has the second derivative. The
    noise is normal, with 0.15 of the input's range as standard deviation, the same for every
    target. Where the gradient does not depend on the input (a linear head), this is Grad-CAM++ and
    needs no step.
    """
    capture = _captured(subject)
    if subject.linear_head is not None:
        return gradcam_plus_plus(capture)[0]
    inputs, random = subject.inputs, subject.generator()
    deviation = _NOISE * (inputs.amax() - inputs.amin())
    size = max(1, subject.chunk // (1 + 2 * len(subject.targets)))
    moments = capture.activation.new_zeros(3, len(subject.targets), *capture.activation.shape[1:])
    for start in range(0, subject.samples, size):
        count = min(size, subject.samples - start)
        # Drawn one by one: the noise of a sample does not depend on the chunk it is in.
        noise = torch.cat([torch.randn(inputs.shape, generator=random) for _ in range(count)])
        noisy = inputs + deviation * noise.to(inputs)
        step = LayerGradient(
            noisy,
            subject.layer,
            subject.targets,
            left=(subject.samples - start - count) * (1 + 2 * len(subject.targets)),
            maps=partial(_smoothed, capture, moments),
        )
        pair: Capture = yield step
        powers = [_gradient(pair).pow(p).sum(0) for p in (1, 2, 3)]
        moments += torch.stack(powers) / subject.samples
    return _smoothed(capture, moments)


def _smoothed(capture: Capture, moments: Tensor) -> Tensor:
    """Maps (T, h, w) from moments (3, T, K, h, w) of the gradient, whose scale makes no difference."""
    first, second, third = moments
    denominator = 2 * second + capture.activation.sum(_SPACE)[0, :, None, None] * third
    steady = denominator.abs() > 1e-6 * second
    alpha = second / torch.where(steady, denominator, torch.inf)
    weights = (alpha * first.relu()).sum(_SPACE)
    return _weighted_sum(weights[None], capture.activation)[0].relu_()


def finercam(subject: Subject) -> Steps:
    """Finer-CAM (Zhang et al. 2025): Grad-CAM of y_c - 0.6 mean_d y_d.

    d are the 3 classes closest to c in score; of classes that are equally close the lower index
    comes first. A target that names what it is held against keeps those classes as its d. A linear
    head needs no step.
    """
    capture = _captured(subject)
    plain = [ResolvedTarget(target.cls) for target in subject.targets]
    held = [_against_closest(target, subject.logits) for target in subject.targets]
    linear = subject.linear_head
    if linear is not None:
        rows = [ScoreWeights([t], linear.device).of_rows(linear) for t in (plain, held)]
        alone, contrast = (row / _pixels(capture) for row in rows)
    else:
        # The pass has given one of the two gradients already: of targets as they were named.
        missing = [
            p if t.against else h for t, p, h in zip(subject.targets, plain, held, strict=True)
        ]
        pair: Capture = yield LayerGradient(subject.inputs, subject.layer, tuple(missing), left=0)
        known, other = (gradcam_weights(c) for c in (capture, pair))
        named = torch.tensor([bool(t.against) for t in subject.targets], device=known.device)
        alone = torch.where(named[:, None], other, known)
        contrast = torch.where(named[:, None], known, other)
    # d(y_c - s mean y_d) = (1 - s) dy_c + s d(y_c - mean y_d)
    weights = (1 - _FINER_SHARE) * alone + _FINER_SHARE * contrast
    return _weighted_sum(weights, capture.activation)[0].relu_()


def shapleycam(subject: Subject) -> Steps:
    """ShapleyCAM (Cai 2025): M = ReLU(sum_k w_k A_k), w_k = mean_ij (g - H A / 2)_kij.

    g and H are gradient and Hessian of the paper's default utility, ReST: the score plus the
    logarithm of its class's probability, u = y_c + log p_c. H A is a Hessian-vector product through
    what follows the layer. A linear head needs no step.
    """
    capture = _captured(subject)
    linear = subject.linear_head
    if linear is not None:
        weights = linear_curved_weights(subject, linear)
    else:
        weights = yield from run_by_targets(subject, partial(curved_weights, subject), cost=24)
    return _weighted_sum(weights[None], capture.activation)[0].relu_()


def fullgrad(subject: Subject) -> Steps:
    """FullGrad (Srinivas and Fleuret 2019, eq. 4 and 8), of the input's size, whatever the layer.

    M = psi(x * dx y) + sum over layers of psi(b * g): b the biases of convolutions and the implicit
    biases beta - gamma mean / sqrt(var + eps) of batch-norms, g the gradient where the bias is
    added; psi = sum over channels of the bilinearly upsampled |.|, scaled to [0, 1] by the least
    and greatest value of all channels of the layer. Biases of linear layers have no place and are
    left out of the map.

    Raises:
        MethodNotApplicable: the model has biases of other kinds, as those of layer norms.
    """
    reason = obstacle(subject.module)
    if reason is not None:
        raise MethodNotApplicable(f"FullGrad cannot explain this model: {reason}.")
    return run_by_targets(subject, partial(decomposed_maps, subject), cost=6)


def _against_closest(target: ResolvedTarget, logits: Tensor) -> ResolvedTarget:
    """The target, held against the classes closest to its own in score unless it names others."""
    if target.against:
        return target
    distance = (logits - logits[target.cls]).abs()
    distance[target.cls] = torch.inf
    closest = distance.sort(stable=True).indices[: min(_FINER_REFERENCES, len(logits) - 1)]
    return ResolvedTarget(target.cls, tuple(closest.tolist()))


def _captured(subject: Subject) -> Capture:
    """The explained layer's pair, for the subject's own targets: its batch may have had more."""
    capture, count = subject.captured, len(subject.targets)
    gradient = _gradient(capture)[:, :count]
    return Capture(capture.layer, capture.activation, gradient, capture.score[:, :count])


def _gradient(capture: Capture) -> Tensor:
    if capture.gradient is None:
        raise ValueError("the pass was run without gradients")
    return capture.gradient


def _pixels(capture: Capture) -> int:
    return capture.activation.shape[-2] * capture.activation.shape[-1]


def _weighted_sum(weights: Tensor, activation: Tensor) -> Tensor:
    """sum_k w_k A_k: (N, T, K) and (N, K, h, w) → (N, T, h, w)."""
    n, _, h, w = activation.shape
    return torch.bmm(weights, activation.flatten(2)).view(n, -1, h, w)


def _inner(gradient: Tensor, activation: Tensor) -> Tensor:
    """sum_k g_k * A_k at each position: (N, T, K, h|1, w|1) and (N, K, h, w) → (N, T, h, w)."""
    if gradient.shape[-2:] == (1, 1):
        return _weighted_sum(gradient[..., 0, 0], activation)
    return (gradient * activation[:, None]).sum(2)
