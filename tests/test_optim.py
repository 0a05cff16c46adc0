"""The optimizer of the SFT stage."""

import pytest
import torch
from conftest import toy

from optim import Muon, orthogonalize, set_lr


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_orthogonalize_makes_all_singular_values_about_one(shape):
    """And keeps the directions: U S V^T becomes about U V^T."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 7
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(torch.stack([matrix, torch.eye(*shape)]))[0]      # each on its own
    assert result.shape == shape and result.dtype == matrix.dtype
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.3
    assert torch.nn.functional.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else():
    model = toy()
    optimizer = Muon(model, 1e-2)
    inside, rest = optimizer.param_groups[0]["params"], [p for group in optimizer.param_groups[1:] for p in group["params"]]
    assert {id(p) for p in inside} == {id(p) for name, p in model.named_parameters() if name.startswith("h.") and p.dim() == 2}
    assert len(inside) + len(rest) == len(list(model.parameters())) and not {id(p) for p in inside} & {id(p) for p in rest}
    assert set_lr(optimizer, 1e-2, 50, 100) == 5e-3 and {group["lr"] for group in optimizer.adamw.param_groups} == {5e-3}
