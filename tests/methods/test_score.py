import math

import pytest
import torch

from evoprune.methods.ranking import composite_score, local_density, relative_attention, similarity, unit_features


def groups(lengths, width=6, seed=0):
    """Random features of groups of these lengths, padded with garbage, and which rows are valid."""
    features = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return features, valid


def cosine(a, b):
    lengths = math.dist(a, [0] * len(a)), math.dist(b, [0] * len(b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / (lengths[0] * lengths[1]) if all(lengths) else 0.0


def density_by_hand(features, valid, neighbours):
    out = torch.ones(valid.shape)
    for b, group in enumerate(features.tolist()):
        n = int(valid[b].sum())
        for i in range(n):
            nearest = sorted((cosine(group[i], group[j]) for j in range(n) if j != i), reverse=True)[:neighbours]
            if nearest:
                out[b, i] = sum(nearest) / len(nearest)
    return out


def test_unit_features_join_patches_and_average_heads():
    x = torch.arange(2 * 4 * 3 * 5, dtype=torch.bfloat16).view(2, 4, 3, 5)
    expected = [[sum(float(x[r, p, h, i]) for h in range(3)) / 3 for p in range(4) for i in range(5)] for r in range(2)]
    made = unit_features(x)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, torch.tensor(expected))


def test_similarity_is_the_cosine():
    features, _ = groups([5, 3])
    features[0, 2] = 0
    features[0, 3] = -7 * features[0, 1]
    expected = [[[cosine(a, b) for b in group] for a in group] for group in features.tolist()]
    torch.testing.assert_close(similarity(features), torch.tensor(expected), atol=1e-6, rtol=0)
    assert (similarity(features)[0, 2] == 0).all()


@pytest.mark.parametrize("neighbours", [1, 2, 4, 100])
def test_local_density_against_loops(neighbours):
    features, valid = groups([7, 1, 2, 5, 7])
    features[3, 0] = 0
    made = local_density(similarity(features), valid, neighbours)
    torch.testing.assert_close(made[valid], density_by_hand(features, valid, neighbours)[valid], atol=1e-6, rtol=0)


def test_relative_attention_against_loops():
    received = torch.tensor([[0.2, 0.5, 0.1, 9.0], [0.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]])
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    expected = torch.tensor([[0.4, 1.0, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(relative_attention(received, valid), expected)


@pytest.mark.parametrize(("diversity", "attention"), [(0.1, 0.2), (-0.5, 1.0), (0.3, 0.0), (0.0, 0.4), (0.0, 0.0)])
def test_composite_score_against_loops(diversity, attention):
    features, valid = groups([5, 4])
    cos = similarity(features)
    density = local_density(cos, valid, 2)
    attended = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    made = composite_score(cos, density if diversity else None, attended if attention else None, diversity, attention)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                lone = max(1 - float(density[b, i]), 1 - float(density[b, j]))
                expected = float(cos[b, i, j]) - diversity * lone - attention * max(attended[b, [i, j]].tolist())
                assert float(made[b, i, j]) == pytest.approx(expected, abs=1e-6)
