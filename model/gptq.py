"""GPTQ: rounds a matrix so that its products, not its entries, stay near (Frantar et al. 2022, arXiv 2210.17323).

Columns are rounded one after the other, and what each loses is made up for by those not rounded yet. With H = Σ x xᵀ
over calibration inputs and U the upper Cholesky factor of H⁻¹ (H⁻¹ = Uᵀ U), column j's error e = (w - ŵ) / U[j, j]
changes each later column k by -e U[j, k]. Columns with the most energy go first, while the most others can still answer
for them; the scales are chosen beforehand, by the error weighted with the same energies.

Shape letters: O outputs, I inputs, G groups per row.
"""

import torch
from torch import Tensor

from model.quantization import Quantized, chosen_scales

DAMPING = 0.01
"""Of the mean diagonal, added to H's: the paper's value. It keeps H invertible and trusts few inputs less."""
BLOCK = 128
"""Columns whose corrections are applied to the others together."""


def gptq(name: str, weight_OI: Tensor, hessian_II: Tensor, group: int, search_steps: int) -> Quantized:
    """Quantizes to 4 bits; `hessian_II` is the sum of x xᵀ over calibration inputs x [I], up to a factor.

    Raises InputError as `quantize` does.
    """
    energy_I = hessian_II.diagonal().float()
    scales_OG = chosen_scales(name, weight_OI, 4, group, search_steps, energy_I)
    order_I = torch.argsort(energy_I, descending=True, stable=True)
    left_OI, factor_II = weight_OI.float()[:, order_I], _inverse_factor(hessian_II[order_I][:, order_I])
    values_OI = torch.empty(weight_OI.shape, dtype=torch.int8)
    for start in range(0, len(order_I), BLOCK):
        block = slice(start, min(start + BLOCK, len(order_I)))
        errors = []
        for j in range(block.start, block.stop):
            column = int(order_I[j])
            scale_O = scales_OG[:, column // group].float()
            values_O = (left_OI[:, j] / scale_O).round_().clamp_(-8, 7)
            values_OI[:, column] = values_O.to(torch.int8)
            error_O = (left_OI[:, j] - values_O * scale_O) / factor_II[j, j]
            left_OI[:, j + 1 : block.stop] -= error_O[:, None] * factor_II[j, j + 1 : block.stop]
            errors.append(error_O)
        left_OI[:, block.stop :] -= torch.stack(errors, dim=1) @ factor_II[block, block.stop :]
    return Quantized(values_OI, scales_OG, 4)


def _inverse_factor(hessian_II: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped inverse, in float32; inputs that were always zero count for nothing."""
    damped_II: Tensor = hessian_II.double()
    diagonal_I = damped_II.diagonal()
    diagonal_I[diagonal_I == 0] = 1
    diagonal_I += DAMPING * diagonal_I.mean()
    inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(damped_II))
    factor_II: Tensor = torch.linalg.cholesky(inverse_II, upper=True)
    return factor_II.float()
