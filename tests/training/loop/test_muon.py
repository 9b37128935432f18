"""Muon with AdamW: what goes to which, a scheduler that rules both, states that survive saving, rates per part."""

import pytest
import torch
from torch import nn

from segcompass_hf.training.loop.muon import ADAMW_RATIO, Float32Muon, MuonWithAdamW, muon_with_factors


def _two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4))


def _optimizer(model):
    groups = [{"named_parameters": list(model.named_parameters()), "muon_lr": 1e-2, "adamw_lr": 1e-3}]
    return MuonWithAdamW(groups)


def _step(model, optimizer, seed):
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(seed))
    model(x).pow(2).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    model = _two_layers()
    optimizer = _optimizer(model)
    muon, adamw = optimizer.parts
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(model[0].weight)]  # 4 rows are too few
    decayed = [g for g in adamw.param_groups if g["weight_decay"] > 0]
    assert [id(p) for g in decayed for p in g["params"]] == [id(model[2].weight)]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    before = [p.clone() for p in model.parameters()]
    _step(model, optimizer, 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)), "the scheduler rules both"
    assert scheduler.get_last_lr() == [0.0] * len(optimizer.param_groups)


def test_muon_state_survives_saving():
    straight = _two_layers()
    optimizer = _optimizer(straight)
    for seed in range(4):
        _step(straight, optimizer, seed)
    stopped = _two_layers()
    first = _optimizer(stopped)
    for seed in range(2):
        _step(stopped, first, seed)
    resumed = _optimizer(stopped)
    resumed.load_state_dict(first.state_dict())
    for seed in range(2, 4):
        _step(stopped, resumed, seed)
    for a, b in zip(straight.parameters(), stopped.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_muon_in_float32_goes_where_torch_goes(shape):
    """Equal to torch's own but for the rounding of its bfloat16 iteration; momentum and decay included."""
    torch.manual_seed(0)
    theirs = [nn.Parameter(torch.randn(shape)) for _ in range(3)]
    ours = [nn.Parameter(parameter.detach().clone()) for parameter in theirs]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = torch.optim.Muon(theirs, **settings), Float32Muon(ours, **settings)
    before = torch.stack(ours).detach().clone()
    for _ in range(3):
        for one, other in zip(theirs, ours, strict=True):
            one.grad = torch.randn(shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    moved = (torch.stack(ours).detach() - before).norm()
    assert moved > 0.1
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0, atol=0.01 * float(moved))
    one, other = (o.state[p[1]]["momentum_buffer"] for o, p in zip(optimizers, (theirs, ours), strict=True))
    torch.testing.assert_close(one, other)


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
