"""The METHODS table: what every explanation method is, without torch."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

from models.types import Struct

Family = Literal["gradient", "activation", "perturbation", "pixels", "transformer"]
Cost = Literal["pass", "head", "passes", "many"]


class Method(Struct):
    """One explanation method.

    Attributes:
        name: name in the API; also the name of the function in `models.methods.<family>`.
        paper: where it was defined.
        formula: what is computed, with A_k = channel k of the activation, g = its gradient, Z = its
            pixels.
        cost: `pass` (free with the prediction) or `head` (a pass of the head per target): the
            function takes a `Capture` of N images and returns maps (N, T, h, w). `passes` (a few
            passes of the network) or `many` (hundreds): the function is a generator of steps for
            one `Subject` and returns maps (T, h, w).
        needs_gradients: whether the pass must be differentiated.
        signed: whether negative values of the map mean evidence against the class.
        images: images that it runs through the network after the first pass, as factors: numbers,
            `samples`, `steps`, `targets`, `channels` of the layer, and `masks`, the channels that
            become one. A gradient counts as three images.
        defaults: default `samples`, `steps` and `seed`.
        assumes_nonnegative: whether the derivation needs a layer without negative values; on other
            layers the explanation carries a warning.
        of_input: whether it explains the input itself, whatever layers are named.
    """

    name: str
    title: str
    paper: str
    formula: str
    family: Family
    cost: Cost
    needs_gradients: bool = True
    signed: bool = False
    images: tuple[int | str, ...] = (0,)
    defaults: dict[str, Any] = {}
    assumes_nonnegative: bool = False
    of_input: bool = False


_GRADIENT = 3

_gradient = partial(Method, family="gradient", cost="head")
_activation = partial(Method, family="activation", cost="pass", needs_gradients=False)
_perturbation = partial(Method, family="perturbation", cost="many", needs_gradients=False)
_pixels = partial(
    Method, family="pixels", cost="passes", of_input=True, images=(_GRADIENT, "targets")
)
_transformer = partial(
    Method, family="transformer", cost="passes", of_input=True, images=(_GRADIENT, "targets")
)

_ROWS = (
    _gradient(
        name="cam",
        title="Class Activation Mapping",
        paper="Zhou et al. 2016, arXiv:1512.04150",
        formula="M = sum_k W_ck A_k",
        cost="pass",
        signed=True,
    ),
    _gradient(
        name="gradcam",
        title="Grad-CAM",
        paper="Selvaraju et al. 2017, arXiv:1610.02391",
        formula="M = ReLU(sum_k w_k A_k), w_k = (1/Z) sum_ij g_kij",
    ),
    _gradient(
        name="gradcam_plus_plus",
        title="Grad-CAM++",
        paper="Chattopadhay et al. 2018, arXiv:1710.11063, eq. 19",
        formula="M = ReLU(sum_k w_k A_k), w_k = sum over g_kij > 0 of g_kij / (2 + g_kij S_k), "
        "S_k = sum_ij A_kij",
        assumes_nonnegative=True,
    ),
    _gradient(
        name="xgradcam",
        title="XGrad-CAM",
        paper="Fu et al. 2020, arXiv:2008.02312",
        formula="M = ReLU(sum_k w_k A_k), w_k = sum_ij g_kij A_kij / S_k, 0 where S_k vanishes",
        assumes_nonnegative=True,
    ),
    _gradient(
        name="hirescam",
        title="HiResCAM",
        paper="Draelos and Carin 2020, arXiv:2011.08891",
        formula="M = ReLU(sum_k g_k * A_k)",
    ),
    _gradient(
        name="layercam",
        title="LayerCAM",
        paper="Jiang et al. 2021, IEEE TIP 30",
        formula="M = ReLU(sum_k ReLU(g_k) * A_k)",
    ),
    _gradient(
        name="gradcam_elementwise",
        title="Grad-CAM element-wise",
        paper="pytorch-grad-cam, after Selvaraju et al. 2017, arXiv:1610.02391",
        formula="M = sum_k ReLU(g_k * A_k)",
    ),
    _gradient(
        name="smooth_gradcam_plus_plus",
        title="Smooth Grad-CAM++",
        paper="Omeiza et al. 2019, arXiv:1908.01224",
        formula="M = ReLU(sum_k w_k A_k), w_k = sum_ij alpha_kij ReLU(D1_kij), alpha = D2 / (2 D2 "
        "+ S_k D3), Dp = mean of g^p over inputs with normal noise of 0.15 times the "
        "input's range, A and S_k = sum_ij A_kij of the clean input",
        cost="passes",
        images=("samples", _GRADIENT, "targets"),
        defaults={"samples": 10, "seed": 0},
        assumes_nonnegative=True,
    ),
    _gradient(
        name="finercam",
        title="Finer-CAM",
        paper="Zhang et al. 2025, arXiv:2501.11309",
        formula="Grad-CAM of y_c - 0.6 mean_d y_d, d = the 3 classes closest to c in score (ties: "
        "lower index), or those the target names",
        cost="passes",
        images=(_GRADIENT, "targets"),
    ),
    _gradient(
        name="shapleycam",
        title="ShapleyCAM",
        paper="Cai 2025, arXiv:2501.06261",
        formula="M = ReLU(sum_k w_k A_k), w_k = (1/Z) sum_ij (g - H A / 2)_kij, g and H gradient "
        "and Hessian of u = y_c + log p_c (ReST)",
        cost="passes",
        images=(8, _GRADIENT, "targets"),
    ),
    _gradient(
        name="fullgrad",
        title="FullGrad",
        paper="Srinivas and Fleuret 2019, arXiv:1905.00780",
        formula="M = psi(x * dx y) + sum over layers of psi(b * g), b = biases, of batch-norms "
        "beta - gamma mean / sqrt(var + eps); psi = sum over channels of the upsampled "
        "|.|, scaled to [0, 1] over all channels of the layer",
        cost="passes",
        images=(2, _GRADIENT, "targets"),
        of_input=True,
    ),
    _activation(
        name="eigencam",
        title="Eigen-CAM",
        paper="Muhammad and Yeasin 2020, arXiv:2008.00299",
        formula="M = A v_1, v_1 = first right singular vector of A (positions by channels, not "
        "centred), its sign such that corr(M, sum_k A_k) >= 0; the same for every class",
    ),
    _activation(
        name="eigengradcam",
        title="Eigen-Grad-CAM",
        paper="pytorch-grad-cam, after Muhammad and Yeasin 2020, arXiv:2008.00299",
        formula="M = B v_1, B = g * A (positions by channels, not centred), v_1 its first right "
        "singular vector, its sign such that corr(M, sum_k B_k) >= 0",
        cost="head",
        needs_gradients=True,
    ),
    _activation(
        name="kpca_cam",
        title="KPCA-CAM",
        paper="Karmani et al. 2024, arXiv:2410.00267",
        formula="M = first component of kernel PCA over positions, kernel tanh(x·y / K + 1) of "
        "channel vectors less their mean, its sign such that corr(M, sum_k A_k) >= 0; "
        "layers averaged down to 28 x 28 at most; the same for every class",
    ),
    _activation(
        name="fem",
        title="Feature Explanation Method",
        paper="Fuad et al. 2020, IPTA, doi:10.1109/IPTA50016.2020.9286629",
        formula="M = sum_k mu_k B_k, B_k = 1 where A_k > mu_k + 2 sigma_k, else 0 (mean and "
        "standard deviation over positions); the same for every class",
        assumes_nonnegative=True,
    ),
    _perturbation(
        name="scorecam",
        title="Score-CAM",
        paper="Wang et al. 2020, arXiv:1910.01279",
        formula="M = ReLU(sum_k w_k A_k), w = softmax_k(y_c(X * H_k)), H_k = "
        "minmax(upsample(A_k)); k: all channels that are not constant, or the `samples` "
        "of most energy",
        images=("masks",),
    ),
    _perturbation(
        name="ss_cam",
        title="SS-CAM",
        paper="Wang et al. 2020, arXiv:2006.14255 (there N = 35)",
        formula="as Score-CAM with w = softmax_k(mean_i y_c(X * (H_k + n_i))), n_i ~ N(0, 2^2), i "
        "= 1 … N samples",
        images=("samples", "channels"),
        defaults={"samples": 10, "seed": 0},
    ),
    _perturbation(
        name="is_cam",
        title="IS-CAM",
        paper="Naidu et al. 2020, arXiv:2010.03023",
        formula="as Score-CAM with w = softmax_k(mean_i y_c((i / N) X * H_k)), i = 1 … N samples",
        images=("samples", "channels"),
        defaults={"samples": 10},
    ),
    _perturbation(
        name="ablationcam",
        title="Ablation-CAM",
        paper="Desai and Ramaswamy 2020, IEEE WACV",
        formula="M = ReLU(sum_k w_k A_k), w_k = (y_c - y_c with A_k = 0) / |y_c|",
        cost="passes",
        images=("channels",),
    ),
    _perturbation(
        name="occlusion",
        title="Occlusion",
        paper="Zeiler and Fergus 2014, arXiv:1311.2901",
        formula="M = mean over covering windows of y_c(X) - y_c(X with the window at the mean "
        "colour), `steps` half-overlapping windows a side",
        images=("steps", "steps"),
        signed=True,
        defaults={"steps": 13},
        of_input=True,
    ),
    _perturbation(
        name="rise",
        title="RISE",
        paper="Petsiuk et al. 2018, arXiv:1806.07421",
        formula="M = 1 / (N p) sum_i f_c(X * m_i) m_i, f the probability, N samples of 7 x 7 "
        "grids, p = 0.5",
        images=("samples",),
        defaults={"samples": 4000, "seed": 0},
        of_input=True,
    ),
    _pixels(
        name="saliency",
        title="Saliency",
        paper="Simonyan et al. 2014, arXiv:1312.6034",
        formula="M = max over colours of |dx y|",
    ),
    _pixels(
        name="input_x_gradient",
        title="Input times gradient",
        paper="Shrikumar et al. 2016, arXiv:1605.01713",
        formula="M = sum over colours of x * dx y, x normalised",
        signed=True,
    ),
    _pixels(
        name="guided_backprop",
        title="Guided Backpropagation",
        paper="Springenberg et al. 2015, arXiv:1412.6806",
        formula="M = max over colours of |dx y|, every ReLU passing only ReLU(gradient) back",
    ),
    _pixels(
        name="guided_gradcam",
        title="Guided Grad-CAM",
        paper="Selvaraju et al. 2017, arXiv:1610.02391",
        formula="M = Guided Backpropagation * Grad-CAM at the layer, upsampled bilinearly",
        of_input=False,
    ),
    _pixels(
        name="smoothgrad",
        title="SmoothGrad",
        paper="Smilkov et al. 2017, arXiv:1706.03825",
        formula="M = max over colours of |mean over samples of dy/dx at x + e|, e normal, sd 0.15 "
        "(max x - min x)",
        images=("samples", _GRADIENT, "targets"),
        defaults={"samples": 25, "seed": 0},
    ),
    _pixels(
        name="vargrad",
        title="VarGrad",
        paper="Adebayo et al. 2018, arXiv:1810.03307",
        formula="M = sum over colours of E[(a - E a)^2], a = dy/dx at x + e, e as in SmoothGrad",
        images=("samples", _GRADIENT, "targets"),
        defaults={"samples": 25, "seed": 0},
    ),
    _pixels(
        name="integrated_gradients",
        title="Integrated Gradients",
        paper="Sundararajan et al. 2017, arXiv:1703.01365",
        formula="M = sum over colours of (x - b) * mean over t in (0, 1) of dy/dx at b + t (x - "
        "b), b = a black image, Gauss-Legendre quadrature",
        images=("steps", _GRADIENT, "targets"),
        signed=True,
        defaults={"steps": 50},
    ),
    _pixels(
        name="lrp",
        title="Layer-wise Relevance Propagation",
        paper="Bach et al. 2015, PLoS ONE 10(7); composite of Montavon et al. 2019, LNCS 11700",
        formula="M = sum over colours of R, R_i = sum_j s_ij R_j / sum_i s_ij; linear: s = x w, "
        "epsilon 0.25 RMS; convolutions, batch normalisation in them: s = x w + 0.25 (x "
        "w)^+; pixels: s = x w - low w^+ - high w^-",
        images=(10, "targets"),
        signed=True,
    ),
    _transformer(
        name="attention_rollout",
        title="Attention Rollout",
        paper="Abnar and Zuidema 2020, arXiv:2005.00928",
        formula="M = rows of B_L … B_1 at the tokens that are read, B_l = (E_h A_l + I) / 2",
        needs_gradients=False,
        images=(_GRADIENT,),
    ),
    _transformer(
        name="gradient_rollout",
        title="Gradient Attention Rollout",
        paper="Gildenblat 2020, github.com/jacobgil/vit-explain",
        formula="M = rows of B_L … B_1 at the tokens that are read, B_l = row-scaled (E_h[dA_l * "
        "A_l])^+ + I",
    ),
    _transformer(
        name="transformer_attribution",
        title="Transformer Attribution",
        paper="Chefer et al. 2021, arXiv:2103.15679",
        formula="M = rows of R at the tokens that are read, R = I, then R <- R + E_h[(dA_l * "
        "A_l)^+] R",
    ),
    _transformer(
        name="legrad",
        title="LeGrad",
        paper="Bousselham et al. 2024, arXiv:2404.03214",
        formula="M = mean over layers, heads and queries of (ds_l/dA_l)^+, s_l = score that the "
        "head gives to the tokens after layer l",
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
"""Every method by name, in the order in which `/v1/methods` lists them."""


def images_of(
    method: Method, *, samples: int | None, steps: int | None, targets: int, channels: int
) -> int:
    """Images that a method runs through the network for one layer; see `Method.images`."""
    asked = {"samples": samples, "steps": steps}
    numbers = {k: method.defaults.get(k, 0) if v is None else v for k, v in asked.items()}
    masks = min(numbers["samples"] or channels, channels)
    numbers |= {"targets": targets, "channels": channels, "masks": masks}
    return math.prod(numbers[f] if isinstance(f, str) else f for f in method.images)
