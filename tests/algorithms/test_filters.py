"""Patience and weights of filters, on convolutions of two to four filters."""

import pytest
import torch
from torch import Tensor

from fedcmt.algorithms.filters import Filters, compare, convolutions, is_patience, mean_change
from fedcmt.params import ParameterError


def filters(patience: list[int], weight: list[float]) -> Filters:
    return Filters(torch.tensor(patience, dtype=torch.int16), torch.tensor(weight, dtype=torch.float64))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def judged(before: Filters, cosine: Tensor, patience: int | None = 10, **given: float) -> Filters:
    settings = {"share": 0.5, "smoothing": 0.95, **given}
    return before.judged(cosine, torch.ones_like(cosine), patience=patience, **settings)


def test_oracle_05_the_sign_of_the_cosine_refills_takes_or_leaves_patience() -> None:
    server = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    cosine, _ = compare(server, torch.tensor([[0.6, 0.8], [-0.6, 0.8], [0.0, 1.0]]))
    assert cosine.tolist() == pytest.approx([0.6, -0.6, 0.0], abs=1e-6)
    assert judged(filters([4, 4, 4], [1, 1, 1]), cosine).patience.tolist() == [10, 3, 4]


@pytest.mark.parametrize(("ours", "theirs"), [(1e-3, 1.0), (1.0, 1e3), (1e-5, 1e4)])
def test_oracle_05_the_cosine_does_not_depend_on_the_length_of_either_change(ours: float, theirs: float) -> None:
    source = torch.Generator().manual_seed(0)
    server, site = torch.randn(4, 3, 2, generator=source), torch.randn(4, 3, 2, generator=source)
    expected, _ = compare(server, site)
    found, _ = compare(ours * server, theirs * site)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_orthogonal_changes_are_exactly_so() -> None:
    cosine, _ = compare(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 0.0, -1.0]]))
    assert cosine.tolist() == [0.0]


def test_oracle_06_patience_is_of_rounds_in_a_row_and_once_gone_is_gone() -> None:
    own, seen = Filters.fresh(1, 3), []
    for sign in (-1, -1, 1, -1, -1, -1):
        own = judged(own, numbers(sign), patience=3)
        seen.append(own.patience.item())
    assert seen == [2, 1, 3, 2, 1, 0]
    again = judged(own, numbers(), patience=3)
    assert (again.patience.tolist(), again.weight.tolist()) == ([0], [0.0])


def test_oracle_06_the_set_of_personal_filters_never_shrinks() -> None:
    own, source = Filters.fresh(40, 2), torch.Generator().manual_seed(3)
    personal = set[int]()
    for _ in range(8):
        own = judged(own, torch.randn(len(own.rows), generator=source).double(), patience=2)
        now = set(range(40)) - set(own.rows)
        assert now >= personal
        personal = now
    assert 0 < len(personal) < 40


def test_oracle_08_the_weight_follows_the_share_of_cases_and_the_ratio_of_norms() -> None:
    _, ratio = compare(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]]))
    assert ratio.tolist() == [5.0]
    found = Filters.fresh(1, 10).judged(numbers(1), ratio, patience=10, share=21 / 197, smoothing=0.95)
    assert found.weight.item() == pytest.approx(0.9766497, abs=1e-7)


def test_oracle_08_a_filter_that_becomes_personal_loses_its_weight_for_ever() -> None:
    own = judged(filters([1, 1], [0.7, 0.7]), numbers(-0.5, 0.5))
    assert own.patience.tolist() == [0, 10]
    assert own.weight[0].item() == 0
    assert judged(own, numbers(1)).weight[0].item() == 0


@pytest.mark.parametrize(
    ("server", "site", "ratio"),
    [
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 0.0], [1.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 0.0], 1000.0),
        ([1.0, 0.0], [1e-30, 0.0], 1000.0),
        ([1e30, 1e30], [1e-4, 0.0], 1000.0),
    ],
)
def test_oracle_08_without_a_change_the_ratio_is_finite(server: list[float], site: list[float], ratio: float) -> None:
    cosine, found = compare(torch.tensor([server]), torch.tensor([site]))
    assert found.tolist() == [ratio]
    assert bool(torch.isfinite(cosine).all())


def test_a_change_that_is_nothing_takes_no_patience() -> None:
    cosine, _ = compare(torch.tensor([[-1.0, 0.0], [1e-20, 0.0]]), torch.tensor([[1e-20, 0.0], [-1.0, 0.0]]))
    assert cosine.tolist() == [0.0, 0.0]


def test_only_shared_filters_are_judged_and_in_their_own_places() -> None:
    before = filters([2, 0, 5, 0], [0.5, 0.0, 1.0, 0.0])
    assert before.rows == (0, 2)
    after = before.judged(numbers(-1, 1), numbers(2, 4), patience=9, share=0.25, smoothing=0.5)
    assert after.patience.tolist() == [1, 0, 9, 0]
    assert after.weight.tolist() == [0.25 + 0.25, 0.0, 0.5 + 0.5, 0.0]
    assert before.patience.tolist() == [2, 0, 5, 0]
    assert after.patience.dtype == torch.int16


def test_without_patience_filters_stay_shared_and_weights_move_all_the_same() -> None:
    own = Filters.fresh(2, None)
    for _ in range(3):
        own = judged(own, numbers(-1, -1), patience=None)
    assert own.rows == (0, 1)
    assert own.weight.tolist() == pytest.approx([0.95**3 * 0.5 + 0.5] * 2)


def test_patience_zero_shares_nothing_from_the_start() -> None:
    own = Filters.fresh(3, 0)
    assert own.rows == ()
    assert own.weight.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("value", "fits"), [(0, True), (32767, True), (-1, False), (32768, False)])
def test_patience_must_fit_its_counter(value: int, fits: bool) -> None:
    assert is_patience(value) == fits


def test_the_mean_is_filter_by_filter_over_those_who_share_it() -> None:
    first = filters([1, 0, 1, 0], [1.0, 0.0, 2.0, 0.0]), torch.tensor([[4.0, 8.0], [3.0, 0.0]])
    second = filters([1, 1, 0, 0], [3.0, 5.0, 0.0, 0.0]), torch.tensor([[0.0, 4.0], [7.0, 6.0]])
    found = mean_change([first, second])
    assert found.tolist() == [[1.0, 5.0], [7.0, 6.0], [3.0, 0.0], [0.0, 0.0]]
    assert found.dtype == torch.float64


def test_filters_of_no_weight_at_all_do_not_move() -> None:
    assert mean_change([(filters([1, 1], [0.0, 1.0]), torch.tensor([9.0, 2.0]))]).tolist() == [0.0, 2.0]


def test_a_convolution_is_its_weight_and_its_bias() -> None:
    shapes = {"d.b.bias": (3,), "d.b.weight": (3, 2, 1), "d.a.weight": (5, 4)}
    assert list(convolutions(shapes).items()) == [("d.a", 5), ("d.b", 3)]


@pytest.mark.parametrize("shapes", [{"d.a.bias": (3,)}, {"d.a.bias": (2,), "d.a.weight": (3, 2)}, {"d.weight": ()}])
def test_what_is_no_convolution_is_refused_by_name(shapes: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ParameterError, match=r"filters: d\.(a\.bias|weight) is .*made of convolutions alone"):
        convolutions(shapes)
