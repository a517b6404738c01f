"""The soft selection that trains the scorers, and the scores, which must be the same as in the method."""

import torch

from evoprune import methods
from experiments.demo.train_scorer import Scorer, soft_top
from tests.contrib.public import public_tokens
from tests.scorers import write_scorer


def test_weights_add_up_to_the_share_and_so_does_their_gradient():
    scores = (3 * torch.randn(2, 40, generator=torch.Generator().manual_seed(0))).double().requires_grad_()
    weight = soft_top(scores, 0.2).exp()
    torch.testing.assert_close(weight.mean(1), torch.full((2,), 0.2, dtype=torch.float64))
    assert torch.equal(weight.argsort(1), scores.argsort(1))
    toward = torch.linspace(-1, 1, 80, dtype=torch.float64).view(2, 40)
    (weight * toward).sum().backward()
    step = 1e-5
    for place in ((0, 3), (1, 17)):
        moved = torch.zeros_like(scores)
        moved[place] = step
        up, down = ((soft_top(scores.detach() + sign * moved, 0.2).exp() * toward).sum() for sign in (1, -1))
        torch.testing.assert_close(scores.grad[place], (up - down) / (2 * step), atol=1e-6, rtol=1e-4)


def test_a_trained_scorer_scores_the_same_in_the_method(tmp_path):
    torch.manual_seed(0)
    scorer = Scorer(32, 16)
    torch.nn.init.normal_(scorer.q_proj.bias)
    tokens = public_tokens("clustered", 0, (3, 6, 8))
    setting = write_scorer(tmp_path, {name: tensor.detach() for name, tensor in scorer.state_dict().items()})
    expected = scorer(tokens.features[None])[0].detach()
    torch.testing.assert_close(methods.get(f"visionselector:{setting}").scores(tokens), expected)
