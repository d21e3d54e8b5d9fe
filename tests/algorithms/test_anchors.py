"""Anchors: prototypes of a few voxels, clusters of a few cases, and how they move from round to round."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedcmt.algorithms.anchors import (
    Anchors,
    CasePrototypes,
    Clusters,
    case_prototypes,
    first_anchors,
    mean_prototypes,
    updated_anchors,
)
from fedcmt.models.fedmepd import FedMEPDNet
from fedcmt.params import ParameterError, copy_into, load_tensors, save_tensors, snapshot

WIDTHS = (16, 32, 64, 128)


def case(*rows: Mapping[int, Sequence[float]] | None) -> CasePrototypes:
    """A case's prototypes from level -> vector of each class; None where it is absent."""
    sizes = {level: len(vector) for level, vector in next(row for row in rows if row is not None).items()}
    levels = {
        level: torch.tensor([[9.0] * size if row is None else list(row[level]) for row in rows])
        for level, size in sizes.items()
    }
    return CasePrototypes(levels, torch.tensor([row is not None for row in rows]))


def one_class(**values: float) -> dict[str, CasePrototypes]:
    """Cases of one class, one level and one feature."""
    return {name: case({4: [value]}) for name, value in values.items()}


def line(length: int, *values: float) -> Tensor:
    """[1, 1, length, 1, 1]."""
    return torch.tensor(values).view(1, 1, length, 1, 1)


def test_oracle_10_features_are_pooled_over_the_voxels_of_a_class_as_if_enlarged_by_the_nearest() -> None:
    features = [line(4, 1, 1, 1, 1), line(2, 2, 4)]
    (found,) = case_prototypes(features, line(4, 1, 1, 1, 0), num_classes=2)
    torch.testing.assert_close(found.levels[2], torch.tensor([[4.0], [8 / 3]]), rtol=0, atol=1e-4)


def test_oracle_10_a_class_that_is_absent_is_marked() -> None:
    (found,) = case_prototypes([line(2, 2, 4)], line(2, 2, 0), num_classes=4)
    assert found.present.tolist() == [True, False, True, False]
    torch.testing.assert_close(found.levels[1][:3:2], torch.tensor([[4.0], [2.0]]), rtol=0, atol=1e-4)


def test_oracle_10_constant_features_are_their_own_prototype() -> None:
    labels = torch.randint(3, (2, 1, 8, 6, 4), generator=torch.Generator().manual_seed(0)).float()
    features = [torch.full((2, 5, 8 // f, 6 // f, 4 // f), 7.0) for f in (1, 2)]
    for found in case_prototypes(features, labels, num_classes=3):
        assert found.present.all()
        for own in found.levels.values():
            torch.testing.assert_close(own, torch.full((3, 5), 7.0), rtol=1e-5, atol=0)


def test_prototypes_equal_those_of_enlarged_features_case_by_case_also_for_odd_lengths() -> None:
    source = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (2, 1, 5, 7, 4), generator=source)
    features = [torch.randn(2, 2 + f, *(-(-n // f) for n in (5, 7, 4)), generator=source) for f in (1, 2, 4)]
    found = case_prototypes(features, labels, num_classes=3)
    for level, (factor, own) in enumerate(zip((1, 2, 4), features, strict=True), start=1):
        enlarged = functional.interpolate(own, scale_factor=factor, mode="nearest")[:, :, :5, :7, :4]
        for i in range(2):
            for k in range(3):
                expected = enlarged[i][:, labels[i, 0] == k].mean(dim=1)
                torch.testing.assert_close(found[i].levels[level][k], expected, rtol=1e-4, atol=1e-4)


def test_prototypes_take_no_gradient_and_are_single_precision_whatever_the_features_are() -> None:
    features = torch.ones(1, 1, 40, 40, 60, dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu"):
        (found,) = case_prototypes([features], torch.zeros(1, 1, 40, 40, 60), num_classes=2)
    assert found.levels[1].dtype == torch.float32
    assert not found.levels[1].requires_grad
    assert float(found.levels[1][0]) == pytest.approx(1, abs=1e-6)


def test_features_of_another_grid_are_refused_by_level() -> None:
    with pytest.raises(ParameterError, match=r"features \(1, 1, 3, 1, 1\) of level 2, expected \(2, 1, 1\) voxels"):
        case_prototypes([line(4, 1, 1, 1, 1), line(3, 1, 1, 1)], line(4, 0, 0, 0, 0), num_classes=1)


def test_a_case_seen_twice_counts_with_the_mean_of_the_patches_that_hold_the_class() -> None:
    both = mean_prototypes([case({1: [2]}, {1: [1]}, None), case({1: [4]}, None, None)])
    assert both.present.tolist() == [True, True, False]
    assert both.levels[1][:2].tolist() == [[3], [1]]


PAIRS = {"a": 0.0, "b": 0.2, "c": 10.0, "d": 10.4, "e": 20.0, "f": 20.6, "g": 30.0, "h": 30.8}


def test_oracle_11_four_pairs_give_four_pair_means() -> None:
    anchors = first_anchors(one_class(**PAIRS))
    torch.testing.assert_close(anchors.levels[4].sort(dim=0).values, torch.tensor([[0.1], [10.2], [20.3], [30.4]]))
    (clusters,) = anchors.clusters
    for one, other in ("ab", "cd", "ef", "gh"):
        assert clusters.of_case[one] == clusters.of_case[other]
        torch.testing.assert_close(
            anchors.levels[4][clusters.of_case[one], 0], torch.tensor((PAIRS[one] + PAIRS[other]) / 2)
        )


def test_oracle_11_the_lowest_level_decides_who_belongs_together_at_all_levels() -> None:
    """At level 1 the cases pair up otherwise: a with c, b with d."""
    above = {"a": 1.0, "b": 50.0, "c": 2.0, "d": 51.0}
    cases = {name: case({1: [above[name]], 4: [PAIRS[name]]}) for name in above}
    first = first_anchors(cases, anchors_per_class=2)
    assert sorted(first.levels[1].flatten().tolist()) == [1.5, 50.5]
    next_round = updated_anchors(first, cases)
    of_case = next_round.clusters[0].of_case
    assert of_case["a"] == of_case["b"] != of_case["c"] == of_case["d"]
    assert next_round.levels[1][of_case["a"], 0] == 25.5
    assert next_round.levels[1][of_case["c"], 0] == 26.5
    torch.testing.assert_close(next_round.levels[4].sort(dim=0).values, torch.tensor([[0.1], [10.2]]))


def test_oracle_12_the_first_update_replaces_and_later_ones_move_by_a_thousandth() -> None:
    first = first_anchors(one_class(a=2.0), anchors_per_class=1)
    assert first.levels[4].tolist() == [[2]]
    replaced = updated_anchors(first, one_class(a=5.0))
    assert replaced.levels[4].tolist() == [[5]]
    back = updated_anchors(updated_anchors(first, one_class(a=2.0)), one_class(a=5.0))
    assert float(back.levels[4]) == pytest.approx(2.003, abs=1e-6)
    assert first.levels[4].tolist() == [[2]], "anchors are not changed in place"


def random_cases(count: int = 6, classes: int = 4, seed: int = 0) -> dict[str, CasePrototypes]:
    source = torch.Generator().manual_seed(seed)
    return {
        f"case{i}": CasePrototypes(
            {level: torch.randn(classes, width, generator=source) for level, width in enumerate(WIDTHS, start=1)},
            torch.ones(classes, dtype=torch.bool),
        )
        for i in range(count)
    }


def test_oracle_12_shapes() -> None:
    anchors = first_anchors(random_cases())
    assert {level: tuple(rows.shape) for level, rows in anchors.levels.items()} == {
        level: (16, width) for level, width in enumerate(WIDTHS, start=1)
    }
    assert sum(rows.numel() for rows in anchors.levels.values()) == 3_840


def test_rows_count_classes_within_a_cluster() -> None:
    cases = {
        "a": case({4: [0.0]}, {4: [100.0]}),
        "b": case({4: [10.0]}, {4: [110.0]}),
        "c": case({4: [20.0]}, {4: [120.0]}),
    }
    anchors = first_anchors(cases, anchors_per_class=3)
    for name, values in (("a", (0, 100)), ("b", (10, 110)), ("c", (20, 120))):
        for k, value in enumerate(values):
            assert anchors.levels[4][anchors.clusters[k].of_case[name] * 2 + k, 0] == value


def test_fewer_cases_than_anchors_repeat_their_clusters_and_move_them_together() -> None:
    first = first_anchors(one_class(a=1.0, b=5.0), anchors_per_class=4)
    rows = first.levels[4].flatten().tolist()
    assert rows[:2] == rows[2:]
    assert set(rows) == {1, 5}
    moved = updated_anchors(first, one_class(a=3.0)).levels[4].flatten()
    cluster = first.clusters[0].of_case["a"]
    assert moved[cluster::2].tolist() == [3, 3]
    assert moved[1 - cluster :: 2].tolist() == [5, 5]


def test_equal_prototypes_are_one_cluster() -> None:
    anchors = first_anchors(one_class(a=1.0, b=1.0, c=7.0), anchors_per_class=3)
    (clusters,) = anchors.clusters
    assert clusters.of_case["a"] == clusters.of_case["b"] != clusters.of_case["c"]
    assert len(clusters.settled) == 2


def test_a_cluster_without_a_member_this_round_keeps_its_anchors_and_is_replaced_when_one_comes() -> None:
    first = first_anchors(one_class(a=1.0, b=5.0), anchors_per_class=2)
    number = dict(first.clusters[0].of_case)
    second = updated_anchors(first, one_class(a=2.0))
    assert second.levels[4][number["b"], 0] == 5
    assert [second.clusters[0].settled[number[name]] for name in "ab"] == [True, False]
    third = updated_anchors(second, one_class(a=2.0, b=8.0))
    assert third.levels[4][number["b"], 0] == 8


def test_a_case_or_class_without_a_cluster_counts_for_nothing() -> None:
    first = first_anchors({"a": case({4: [1.0]}, {4: [2.0]}), "b": case({4: [1.0]}, None)}, anchors_per_class=1)
    assert dict(first.clusters[1].of_case) == {"a": 0}
    later = {"a": case({4: [1.0]}, None), "b": case({4: [3.0]}, {4: [50.0]}), "new": case({4: [90.0]}, {4: [90.0]})}
    second = updated_anchors(first, later)
    assert second.levels[4].flatten().tolist() == [2, 2]
    assert [clusters.of_case for clusters in second.clusters] == [clusters.of_case for clusters in first.clusters]


def test_a_class_that_no_case_shows_has_no_anchors_until_one_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        first = first_anchors({"a": case({4: [1.0]}, None)}, anchors_per_class=2)
    assert "no case shows the classes [1]" in caplog.text
    assert first.levels[4][1::2].tolist() == [[0], [0]]
    second = updated_anchors(first, {"a": case({4: [1.0]}, None), "b": case(None, {4: [6.0]})})
    assert second.levels[4][1::2].tolist() == [[6], [6]]
    assert second.clusters[1] == Clusters({"b": 0}, (False,))
    assert updated_anchors(second, {"b": case(None, {4: [4.0]})}).levels[4][1::2].tolist() == [[4], [4]]


def test_the_order_of_cases_and_torch_s_generator_do_not_matter() -> None:
    cases = random_cases(9)
    before = torch.random.get_rng_state()
    one, other = first_anchors(cases, seed=3), first_anchors(dict(reversed(cases.items())), seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.clusters == other.clusters
    assert all(torch.equal(one.levels[level], other.levels[level]) for level in one.levels)


def test_anchors_come_back_from_a_file(tmp_path: Path) -> None:
    anchors = updated_anchors(first_anchors(random_cases(), seed=5), random_cases(3, seed=1))
    save_tensors(tmp_path / "anchors.safetensors", anchors.tensors(), json.loads(json.dumps(anchors.record())))
    back = Anchors.restored(*load_tensors(tmp_path / "anchors.safetensors"))
    assert (back.clusters, back.seed) == (anchors.clusters, 5)
    following = [updated_anchors(own, random_cases(seed=2)).tensors() for own in (anchors, back)]
    assert following[0].keys() == following[1].keys()
    assert all(torch.equal(following[0][name], following[1][name]) for name in following[0])


def test_anchors_fit_a_calibrated_network() -> None:
    network, anchors = FedMEPDNet(1, 4, ["T2"], calibrated=True), first_anchors(random_cases())
    copy_into(network, anchors.tensors())
    assert torch.equal(snapshot(network)["anchors.3"], anchors.levels[3])


@pytest.mark.parametrize("tensors", [{}, {"anchors.x": torch.zeros(1)}, {"encoders.T1": torch.zeros(1)}])
def test_other_tensors_are_no_anchors(tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ParameterError, match=r"expected names such as anchors\.1"):
        Anchors.restored(tensors, {"clusters": [], "seed": 0})


def test_there_must_be_a_case() -> None:
    with pytest.raises(ParameterError, match="0 cases and 4 anchors per class"):
        first_anchors({})
