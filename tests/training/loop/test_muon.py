"""Muon with a learning rate per part of a model."""

import pytest
from torch import nn

from segcompass_hf.training.loop.muon import ADAMW_RATIO, muon_with_factors


def test_every_part_has_its_rates():
    model = nn.ModuleDict({"tower": nn.Linear(16, 16), "tower_top": nn.Linear(16, 16), "embed": nn.Embedding(20, 16)})
    model["tower_top"].bias.requires_grad_(False)
    optimizer = muon_with_factors(model.named_parameters(), 1e-2, 0.1, {"tower": 0.5, "tower_top": 0.1})
    groups = optimizer.param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    # Matrices go to Muon, the rest to AdamW at a share of the rate and without decay; the longest prefix wins.
    assert rates[id(model["tower"].weight)] == pytest.approx((5e-3, 0.1))
    assert rates[id(model["tower"].bias)] == pytest.approx((5e-3 * ADAMW_RATIO, 0.0))
    assert rates[id(model["tower_top"].weight)] == pytest.approx((1e-3, 0.1))
    assert rates[id(model["embed"].weight)] == pytest.approx((1e-2 * ADAMW_RATIO, 0.0))
    assert id(model["tower_top"].bias) not in rates and len(rates) == 4


def test_a_prefix_that_fits_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"\['towr'\]"):
        muon_with_factors(nn.ModuleDict({"tower": nn.Linear(16, 16)}).named_parameters(), 1e-2, 0.0, {"towr": 0.5})
