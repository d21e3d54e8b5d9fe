"""Calibration by attention to anchors, on features and anchors small enough to know the answer."""

import pytest
import torch
from torch import Tensor, nn

from fedcmt.models.calibration import Calibration


def random(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def module(width: int = 6, heads: int = 3, dropout: float = 0.1) -> Calibration:
    """In evaluation mode, with weights as large as torch draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Calibration(width, heads, dropout).eval()


def plain(width: int = 2) -> Calibration:
    """One head, all projections the identity."""
    made = Calibration(width, heads=1).eval()
    for linear in (made.query, made.key, made.value, made.output):
        nn.init.eye_(linear.weight)
        nn.init.zeros_(linear.bias)
    return made


FEATURES = random(2, 6, 2, 3, 4)


@pytest.mark.parametrize("copies", [1, 16])
def test_oracle_13_one_anchor_decides_alone(copies: int) -> None:
    made, anchor = module(), random(1, 6, seed=2)
    heads = [made.value.weight[own] @ anchor[0] + made.value.bias[own] for own in torch.arange(18).split(6)]
    expected = made.output.weight @ torch.cat(heads) + made.output.bias
    result = made(FEATURES, anchor.repeat(copies, 1))
    torch.testing.assert_close(result, expected[None, :, None, None, None].expand(2, 6, 2, 3, 4))


def test_oracle_14_neither_order_nor_number_of_copies_of_the_anchors_matters() -> None:
    made, anchors = module(), random(16, 6, seed=2)
    result = made(FEATURES, anchors)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(made(FEATURES, anchors[order]), result)
    torch.testing.assert_close(made(FEATURES, anchors.repeat(2, 1)), result)
    assert not torch.allclose(made(FEATURES, anchors[:8]), result, atol=1e-3)


def test_oracle_14_without_keys_the_values_are_averaged() -> None:
    made, anchors = module(), random(16, 6, seed=2)
    nn.init.zeros_(made.key.weight)
    expected = made.output(made.value(anchors).mean(dim=0))
    torch.testing.assert_close(made(FEATURES, anchors), expected[None, :, None, None, None].expand(2, 6, 2, 3, 4))


def test_oracle_14_a_head_stays_in_the_convex_hull_of_its_values() -> None:
    """Between two anchors that is a line: every voxel of head h is v1 + t (v2 - v1) with t in [0, 1]."""
    made, anchors = module(), 3 * random(2, 6, seed=2)
    head = Calibration(6, heads=1).eval()
    for name in ("query", "key", "value"):
        own, whole = getattr(head, name), getattr(made, name)
        own.weight.data, own.bias.data = whole.weight.data[6:12], whole.bias.data[6:12]
    nn.init.eye_(head.output.weight)
    nn.init.zeros_(head.output.bias)
    one, other = head.value(anchors)
    away = head(FEATURES, anchors).movedim(1, -1) - one
    along = (away @ (other - one)) / (other - one).square().sum()
    torch.testing.assert_close(away, along[..., None] * (other - one))
    assert 0 < along.min() < along.max() < 1


def test_oracle_15_weights_by_hand() -> None:
    result = plain()(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1, 1), torch.eye(2))
    torch.testing.assert_close(result.flatten(), torch.tensor([0.66976, 0.33024]), rtol=0, atol=1e-5)


def test_oracle_16_voxels_are_looked_at_one_by_one() -> None:
    made, anchors = module(), random(16, 6, seed=2)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(3))

    def permuted(maps: Tensor) -> Tensor:
        return maps.flatten(2)[:, :, order].view(maps.shape)

    torch.testing.assert_close(made(permuted(FEATURES), anchors), permuted(made(FEATURES, anchors)))


def test_each_head_is_as_wide_as_the_features() -> None:
    with torch.device("meta"):
        assert [sum(p.numel() for p in Calibration(c, h).parameters()) for c, h in ((16, 4), (128, 8))] == [
            4_304,
            527_488,
        ]


def test_attention_weights_drop_out_in_training_alone() -> None:
    made, anchors = module(dropout=0.5), random(16, 6, seed=2)
    assert torch.equal(made(FEATURES, anchors), made(FEATURES, anchors))
    made.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.allclose(made(FEATURES, anchors), made(FEATURES, anchors), atol=1e-3)
