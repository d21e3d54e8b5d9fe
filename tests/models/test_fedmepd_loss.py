"""FedMEPD's loss on volumes of a few voxels, by hand."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedcmt.models.fedmepd import FedMEPDNet, Outputs
from fedcmt.models.fedmepd_loss import dice_loss, fedmepd_loss, loss_terms, weighted_cross_entropy


def one_hot(labels: Tensor, classes: int = 4) -> Tensor:
    return functional.one_hot(labels, classes).movedim(-1, 1).float()


def labels_of(*values: int) -> Tensor:
    """One case of 2 x 2 x n voxels, a quarter of them each value's given."""
    return torch.tensor(values).view(1, 2, 2, -1)


EVERY_CLASS = labels_of(0, 0, 1, 1, 2, 2, 3, 3)


def test_oracle_20_a_perfect_prediction_of_all_classes_costs_nothing() -> None:
    assert float(weighted_cross_entropy(one_hot(EVERY_CLASS), EVERY_CLASS)) == 0
    assert float(dice_loss(one_hot(EVERY_CLASS), EVERY_CLASS)) == pytest.approx(0, abs=1e-6)


def test_oracle_20_an_absent_class_costs_its_share_of_the_dice() -> None:
    labels = labels_of(0, 0, 1, 1, 2, 2, 2, 2)
    assert float(dice_loss(one_hot(labels), labels)) == pytest.approx(0.25, abs=1e-6)


def test_oracle_20_equal_chances_for_two_classes_of_equal_size() -> None:
    labels = labels_of(0, 0, 0, 0, 2, 2, 2, 2)
    cost = weighted_cross_entropy(torch.full((1, 4, 2, 2, 2), 0.25), labels)
    assert float(cost) == pytest.approx(0.5 * math.log(4), abs=1e-6) == pytest.approx(0.693147, abs=1e-6)


def test_weights_are_a_case_s_own_and_the_rarer_class_counts_more() -> None:
    """Case 1: 3 voxels of class 0, 1 of class 1, so weights 1/4 and 3/4; case 2: class 1 alone, of weight 0."""
    labels = torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1]]).view(2, 1, 2, 2)
    chance = torch.tensor([0.8, 0.2]).view(1, 2, 1, 1, 1).expand(2, 2, 1, 2, 2)
    expected = -(3 * 0.25 * math.log(0.8) + 0.75 * math.log(0.2)) / 8
    assert float(weighted_cross_entropy(chance, labels)) == pytest.approx(expected, abs=1e-6)


def test_cross_entropy_is_bounded_where_the_truth_seems_impossible() -> None:
    labels = labels_of(0, 0, 0, 0, 1, 1, 1, 1)
    wrong = one_hot(1 - labels, 2)
    assert float(weighted_cross_entropy(wrong, labels)) == pytest.approx(-0.5 * math.log(0.005), abs=1e-6)


def test_dice_counts_the_batch_at_once_and_the_background_too() -> None:
    """Class 1 is in the first case alone: 2 * 1 / (2 + 1); background: 2 * 2 / (2 + 3)."""
    labels = torch.tensor([[0, 1], [0, 0]]).view(2, 1, 1, 2)
    predicted = one_hot(torch.tensor([[0, 1], [0, 1]]).view(2, 1, 1, 2), 2)
    assert float(dice_loss(predicted, labels)) == pytest.approx(1 - (2 / 3 + 4 / 5) / 2, abs=1e-6)


def outputs(sequences: int = 2, dtype: torch.dtype = torch.float32) -> Outputs:
    names = ("FLAIR", "T1ce", "T1", "T2")[:sequences]
    logits = [
        torch.randn(1, 4, 2, 2, 2, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(5 + sequences)
    ]
    maps = tuple(own.softmax(dim=1) for own in logits[1:5])
    return Outputs(logits[0], maps, dict(zip(names, logits[5:], strict=True)), ())


@pytest.mark.parametrize("sequences", [1, 2, 4])
def test_oracle_22_one_term_for_the_fusion_one_for_each_level_and_one_for_each_sequence(sequences: int) -> None:
    terms = loss_terms(outputs(sequences), EVERY_CLASS[:, None])
    assert len(terms) == 1 + 4 + sequences
    assert list(terms)[:6] == ["fused", "map.1", "map.2", "map.3", "map.4", "alone.FLAIR"]


def test_oracle_22_the_loss_is_the_plain_sum_of_its_terms() -> None:
    given, target = outputs(), EVERY_CLASS[:, None]
    expected = {
        "fused": given.logits.softmax(dim=1),
        "map.3": given.probability_maps[2],
        "alone.T1ce": given.auxiliary["T1ce"].softmax(dim=1),
    }
    terms = loss_terms(given, target)
    for name, probabilities in expected.items():
        cost = weighted_cross_entropy(probabilities, target[:, 0]) + dice_loss(probabilities, target[:, 0])
        torch.testing.assert_close(terms[name], cost)
    torch.testing.assert_close(fedmepd_loss(given, target), torch.stack(list(terms.values())).sum())


def test_oracle_22_terms_of_a_network_s_own_outputs() -> None:
    network = FedMEPDNet(3, 4, ["T2", "t1c", "FLAIR"], features_per_stage=(4, 4, 4, 4))
    network.all_outputs = True
    target = torch.randint(4, (1, 1, 16, 8, 8), generator=torch.Generator().manual_seed(0))
    terms = loss_terms(network(torch.randn(1, 3, 16, 8, 8)), target)
    assert len(terms) == 1 + 4 + 3
    assert [name for name in terms if name.startswith("alone.")] == ["alone.FLAIR", "alone.T1ce", "alone.T2"]
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_half_precision_is_summed_in_single_and_targets_may_be_of_any_type() -> None:
    given, target = outputs(dtype=torch.float16), EVERY_CLASS[:, None]
    result = fedmepd_loss(given, target.to(torch.int16))
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, fedmepd_loss(outputs(), target.float()), rtol=1e-2, atol=1e-2)


def test_a_target_of_another_grid_and_logits_alone_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target \(1, 2, 2, 2\) for logits \(1, 4, 2, 2, 2\)"):
        fedmepd_loss(outputs(), EVERY_CLASS)
    with pytest.raises(TypeError, match="a Tensor from the network, expected its Outputs"):
        fedmepd_loss(outputs().logits, EVERY_CLASS[:, None])  # type: ignore[arg-type]
