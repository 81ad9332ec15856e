"""Rows of the transformer methods."""

from models.methods.table import Method

ROWS = (
    Method(
        name="attention_rollout",
        title="Attention Rollout",
        paper="Abnar and Zuidema 2020, arXiv:2005.00928",
        formula="M = rows of B_L … B_1 at the tokens that are read, B_l = (E_h A_l + I) / 2",
        family="transformer",
        needs_gradients=False,
        signed=False,
        cost="passes",
        of_input=True,
    ),
    Method(
        name="gradient_rollout",
        title="Gradient Attention Rollout",
        paper="Gildenblat 2020, github.com/jacobgil/vit-explain",
        formula="M = rows of B_L … B_1 at the tokens that are read, B_l = row-scaled (E_h[dA_l * A_l])^+ + I",
        family="transformer",
        needs_gradients=True,
        signed=False,
        cost="passes",
        of_input=True,
    ),
    Method(
        name="transformer_attribution",
        title="Transformer Attribution",
        paper="Chefer et al. 2021, arXiv:2103.15679",
        formula="M = rows of R at the tokens that are read, R = I, then R <- R + E_h[(dA_l * A_l)^+] R",
        family="transformer",
        needs_gradients=True,
        signed=False,
        cost="passes",
        of_input=True,
    ),
    Method(
        name="legrad",
        title="LeGrad",
        paper="Bousselham et al. 2024, arXiv:2404.03214",
        formula="M = mean over layers, heads and queries of (ds_l/dA_l)^+, "
        "s_l = score that the head gives to the tokens after layer l",
        family="transformer",
        needs_gradients=True,
        signed=False,
        cost="passes",
        of_input=True,
    ),
)
