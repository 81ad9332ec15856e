"""Rows of the gradient methods."""

from models.methods.table import Method

ROWS = (
    Method(
        name="cam",
        title="Class Activation Mapping",
        paper="Zhou et al. 2016, arXiv:1512.04150",
        formula="M = sum_k W_ck A_k",
        family="gradient",
        needs_gradients=True,
        signed=True,
        cost="pass",
    ),
    Method(
        name="gradcam",
        title="Grad-CAM",
        paper="Selvaraju et al. 2017, arXiv:1610.02391",
        formula="M = ReLU(sum_k w_k A_k), w_k = (1/Z) sum_ij g_kij",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
    ),
    Method(
        name="gradcam_plus_plus",
        title="Grad-CAM++",
        paper="Chattopadhay et al. 2018, arXiv:1710.11063, eq. 19",
        formula="M = ReLU(sum_k w_k A_k), w_k = sum over g_kij > 0 of g_kij / (2 + g_kij S_k), S_k = sum_ij A_kij",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
        assumes_nonnegative=True,
    ),
    Method(
        name="xgradcam",
        title="XGrad-CAM",
        paper="Fu et al. 2020, arXiv:2008.02312",
        formula="M = ReLU(sum_k w_k A_k), w_k = sum_ij g_kij A_kij / S_k, 0 where S_k vanishes",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
        assumes_nonnegative=True,
    ),
    Method(
        name="hirescam",
        title="HiResCAM",
        paper="Draelos and Carin 2020, arXiv:2011.08891",
        formula="M = ReLU(sum_k g_k * A_k)",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
    ),
    Method(
        name="layercam",
        title="LayerCAM",
        paper="Jiang et al. 2021, IEEE TIP 30",
        formula="M = ReLU(sum_k ReLU(g_k) * A_k)",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
    ),
    Method(
        name="gradcam_elementwise",
        title="Grad-CAM element-wise",
        paper="pytorch-grad-cam, after Selvaraju et al. 2017, arXiv:1610.02391",
        formula="M = sum_k ReLU(g_k * A_k)",
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="head",
    ),
    Method(
        name="smooth_gradcam_plus_plus",
        title="Smooth Grad-CAM++",
        paper="Omeiza et al. 2019, arXiv:1908.01224",
        formula=(
            "M = ReLU(sum_k w_k A_k), w_k = sum_ij alpha_kij ReLU(D1_kij), alpha = D2 / (2 D2 + S_k D3), "
            "Dp = mean of g^p over inputs with normal noise of 0.15 times the input's range, "
            "A and S_k = sum_ij A_kij of the clean input"
        ),
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="passes",
        defaults={"samples": 10, "seed": 0},
        assumes_nonnegative=True,
    ),
    Method(
        name="finercam",
        title="Finer-CAM",
        paper="Zhang et al. 2025, arXiv:2501.11309",
        formula=(
            "Grad-CAM of y_c - 0.6 mean_d y_d, d = the 3 classes closest to c in score (ties: lower index), "
            "or those the target names"
        ),
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="passes",
    ),
    Method(
        name="shapleycam",
        title="ShapleyCAM",
        paper="Cai 2025, arXiv:2501.06261",
        formula=(
            "M = ReLU(sum_k w_k A_k), w_k = (1/Z) sum_ij (g - H A / 2)_kij, "
            "g and H gradient and Hessian of u = y_c + log p_c (ReST)"
        ),
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="passes",
    ),
    Method(
        name="fullgrad",
        title="FullGrad",
        paper="Srinivas and Fleuret 2019, arXiv:1905.00780",
        formula=(
            "M = psi(x * dx y) + sum over layers of psi(b * g), b = biases, of batch-norms "
            "beta - gamma mean / sqrt(var + eps); psi = sum over channels of the upsampled |.|, "
            "scaled to [0, 1] over all channels of the layer"
        ),
        family="gradient",
        needs_gradients=True,
        signed=False,
        cost="passes",
        of_input=True,
    ),
)
