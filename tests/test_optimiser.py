import pytest
import torch

from flowtilt.optimiser import Adam


def test_updates_are_those_of_torchs_own_class_bit_by_bit():
    """Over many updates with a moving rate, and one parameter that gets no gradient now and then."""
    starts = [torch.randn(4, 3, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    ours, theirs = ([torch.nn.Parameter(s.clone()) for s in starts] for _ in range(2))
    ours[2].requires_grad_(False)
    theirs[2].requires_grad_(False)
    one, other = Adam(ours), torch.optim.Adam(theirs[:2], lr=1.0)
    generator = torch.Generator().manual_seed(7)
    for update in range(50):
        one.clear_gradients()
        other.zero_grad()
        rate = 0.1 / (1 + update)
        for k in (0, 1) if update % 5 else (0,):
            gradient = torch.randn(4, 3, generator=generator)
            ours[k].grad, theirs[k].grad = gradient.clone(), gradient.clone()
        other.param_groups[0]["lr"] = rate
        one.step(rate)
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours[2], starts[2])


@pytest.mark.parametrize(("moments", "decay"), [((0.9, 0.95), 0.01), ((0.8, 0.99), 0.3), ((0.9, 0.95), 0.0)])
def test_with_weight_decay_and_other_moments_updates_are_those_of_torchs_adamw_bit_by_bit(moments, decay):
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    one = Adam([ours], moments, decay)
    other = torch.optim.AdamW([theirs], lr=1.0, betas=moments, weight_decay=decay)
    generator = torch.Generator().manual_seed(7)
    for update in range(50):
        gradient = torch.randn(4, 3, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        other.param_groups[0]["lr"] = rate = 0.1 / (1 + update)
        one.step(rate)
        other.step()
    assert torch.equal(ours, theirs)
    plain = torch.nn.Parameter(start.clone())
    adam = Adam([plain])
    plain.grad = gradient.clone()
    adam.step(0.1)
    assert not torch.equal(plain, ours)
