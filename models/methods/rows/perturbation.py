"""Rows of the perturbation methods."""

from models.methods.table import Method

ROWS = (
    Method(
        name="scorecam",
        title="Score-CAM",
        paper="Wang et al. 2020, arXiv:1910.01279",
        formula="M = ReLU(sum_k w_k A_k), w = softmax_k(y_c(X * H_k)), H_k = minmax(upsample(A_k)); "
        "k: all channels that are not constant, or the `samples` of most energy",
        family="perturbation",
        needs_gradients=False,
        signed=False,
        cost="many",
    ),
    Method(
        name="ss_cam",
        title="SS-CAM",
        paper="Wang et al. 2020, arXiv:2006.14255 (there N = 35)",
        formula="as Score-CAM with w = softmax_k(mean_i y_c(X * (H_k + n_i))), n_i ~ N(0, 2^2), i = 1 … N samples",
        family="perturbation",
        needs_gradients=False,
        signed=False,
        cost="many",
        defaults={"samples": 10, "seed": 0},
    ),
    Method(
        name="is_cam",
        title="IS-CAM",
        paper="Naidu et al. 2020, arXiv:2010.03023",
        formula="as Score-CAM with w = softmax_k(mean_i y_c((i / N) X * H_k)), i = 1 … N samples",
        family="perturbation",
        needs_gradients=False,
        signed=False,
        cost="many",
        defaults={"samples": 10},
    ),
    Method(
        name="ablationcam",
        title="Ablation-CAM",
        paper="Desai and Ramaswamy 2020, IEEE WACV",
        formula="M = ReLU(sum_k w_k A_k), w_k = (y_c - y_c with A_k = 0) / |y_c|",
        family="perturbation",
        needs_gradients=False,
        signed=False,
        cost="passes",
    ),
    Method(
        name="occlusion",
        title="Occlusion",
        paper="Zeiler and Fergus 2014, arXiv:1311.2901",
        formula="M = mean over covering windows of y_c(X) - y_c(X with the window at the mean colour), "
        "`steps` half-overlapping windows a side",
        family="perturbation",
        needs_gradients=False,
        signed=True,
        cost="many",
        defaults={"steps": 13},
        of_input=True,
    ),
    Method(
        name="rise",
        title="RISE",
        paper="Petsiuk et al. 2018, arXiv:1806.07421",
        formula="M = 1 / (N p) sum_i f_c(X * m_i) m_i, f the probability, N samples of 7 x 7 grids, p = 0.5",
        family="perturbation",
        needs_gradients=False,
        signed=False,
        cost="many",
        defaults={"samples": 4000, "seed": 0},
        of_input=True,
    ),
)
