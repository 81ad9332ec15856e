"""Rows of the activation methods."""

from models.methods.table import Method

ROWS = (
    Method(
        name="eigencam",
        title="Eigen-CAM",
        paper="Muhammad and Yeasin 2020, arXiv:2008.00299",
        formula=(
            "M = A v_1, v_1 = first right singular vector of A (positions by channels, not centred), "
            "its sign such that corr(M, sum_k A_k) >= 0; the same for every class"
        ),
        family="activation",
        needs_gradients=False,
        signed=False,
        cost="pass",
    ),
    Method(
        name="eigengradcam",
        title="Eigen-Grad-CAM",
        paper="pytorch-grad-cam, after Muhammad and Yeasin 2020, arXiv:2008.00299",
        formula=(
            "M = B v_1, B = g * A (positions by channels, not centred), "
            "v_1 its first right singular vector, its sign such that corr(M, sum_k B_k) >= 0"
        ),
        family="activation",
        needs_gradients=True,
        signed=False,
        cost="head",
    ),
    Method(
        name="kpca_cam",
        title="KPCA-CAM",
        paper="Karmani et al. 2024, arXiv:2410.00267",
        formula=(
            "M = first component of kernel PCA over positions, kernel tanh(x·y / K + 1) of channel vectors "
            "less their mean, its sign such that corr(M, sum_k A_k) >= 0; layers averaged down to 28 x 28 at most; "
            "the same for every class"
        ),
        family="activation",
        needs_gradients=False,
        signed=False,
        cost="pass",
    ),
    Method(
        name="fem",
        title="Feature Explanation Method",
        paper="Fuad et al. 2020, IPTA, doi:10.1109/IPTA50016.2020.9286629",
        formula=(
            "M = sum_k mu_k B_k, B_k = 1 where A_k > mu_k + 2 sigma_k, else 0 "
            "(mean and standard deviation over positions); the same for every class"
        ),
        family="activation",
        needs_gradients=False,
        signed=False,
        cost="pass",
        assumes_nonnegative=True,
    ),
)
