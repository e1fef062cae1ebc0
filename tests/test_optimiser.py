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
