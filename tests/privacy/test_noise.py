"""Where noise comes from, and what it is added to."""

import math
import os
from collections.abc import Sequence

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from fedcmt.params import ParameterError, copy_into, snapshot
from fedcmt.privacy import noise
from fedcmt.privacy.clipping import clip_flat
from fedcmt.privacy.noise import NoiseSource, SecureNoise, SeededNoise, add_noise

MILLION = 10**6


class Ones:
    """A source whose noise is known; remembers what was asked of it."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def normal(self, shape: Sequence[int], /) -> Tensor:
        self.shapes.append(tuple(shape))
        return torch.ones(tuple(shape))


@pytest.mark.parametrize("source", [SecureNoise(), SeededNoise(3)])
def test_numbers_are_standard_normal(source: NoiseSource) -> None:
    """Bounds are six standard errors wide; the distance to the distribution function is 10^-6 likely to be larger."""
    count = 200_000
    numbers = source.normal((count,)).double().numpy()
    assert abs(numbers.mean()) < 6 / math.sqrt(count)
    assert abs(numbers.std() - 1) < 6 / math.sqrt(2 * count)
    assert stats.kstest(numbers, "norm").pvalue > 1e-6
    assert 4 < abs(numbers).max() < 8.6


def test_halves_of_secure_numbers_are_independent() -> None:
    """A pair of Box and Muller's has one radius in common: neither values nor magnitudes may show it."""
    count = 200_000
    first, second = SecureNoise().normal((2, count))
    for left, right in ((first, second), (first.abs(), second.abs())):
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 6 / math.sqrt(count)


@pytest.mark.parametrize("source", [SecureNoise(), SeededNoise(3)])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 5), torch.Size([7])])
def test_any_shape_is_filled(source: NoiseSource, shape: Sequence[int]) -> None:
    numbers = source.normal(shape)
    assert numbers.shape == torch.Size(shape)
    assert numbers.dtype == torch.float32
    assert bool((numbers != 0).all())


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 21])
def test_secure_numbers_are_drawn_in_parts_and_none_twice(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "_PAIRS", 4)
    numbers = SecureNoise().normal((count,))
    assert len(numbers) == len(set(numbers.tolist())) == count
    assert bool(torch.isfinite(numbers).all())


def test_secure_numbers_come_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bits set: both uniform numbers are 1, radius and sine 0. None set: the largest magnitude there is."""
    monkeypatch.setattr(os, "urandom", lambda count: b"\xff" * count)
    assert SecureNoise().normal((2,)).tolist() == pytest.approx([0.0, 0.0], abs=1e-12)
    monkeypatch.setattr(os, "urandom", lambda count: b"\x00" * count)
    assert SecureNoise().normal((2,)).tolist() == pytest.approx([8.5717, 0.0], abs=1e-4)


def test_secure_numbers_have_no_seed() -> None:
    torch.manual_seed(0)
    first = SecureNoise().normal((4,))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    assert not torch.equal(first, SecureNoise().normal((4,)))
    assert torch.equal(state, torch.get_rng_state())


def test_t6_a_seed_repeats_and_another_differs() -> None:
    assert torch.equal(SeededNoise(3).normal((5,)), SeededNoise(3).normal((5,)))
    assert not torch.equal(SeededNoise(3).normal((5,)), SeededNoise(4).normal((5,)))


def test_a_seeded_source_goes_on_and_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    source = SeededNoise(3)
    assert not torch.equal(source.normal((5,)), source.normal((5,)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, True])
def test_a_seed_is_a_whole_number(seed: int) -> None:
    with pytest.raises(ValueError, match="SeededNoise: seed is"):
        SeededNoise(seed)


class Tied(nn.Module):
    """Two names for one weight, as in nnU-Net's decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False)
        self.decoder = nn.ModuleDict({"encoder": self.encoder})


def test_t6_a_tied_tensor_gets_one_draw() -> None:
    network = Tied()
    before = snapshot(network)
    noisy = add_noise(before, 1.0, SeededNoise(1))
    copy_into(network, noisy)
    state = network.state_dict()
    assert set(noisy) == {"encoder.weight"}
    assert torch.equal(state["encoder.weight"], state["decoder.encoder.weight"])
    assert not torch.equal(state["encoder.weight"], before["encoder.weight"])


def test_t6_buffers_stay() -> None:
    network = nn.BatchNorm1d(3)
    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    copy_into(network, add_noise(parameters, 1.0, SeededNoise(1)))
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in network.named_buffers())


def test_each_tensor_has_a_draw_of_its_own() -> None:
    noisy = add_noise({"a": torch.zeros(3), "b": torch.zeros(3)}, 1.0, SeededNoise(1))
    assert not torch.equal(noisy["a"], noisy["b"])


def test_noise_is_scaled_and_added() -> None:
    source = Ones()
    params = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(3, 1)}
    noisy = add_noise(params, {"b": 0.5, "a": 2.0}, source)
    assert {name: tensor.tolist() for name, tensor in noisy.items()} == {"a": [3.0, 4.0], "b": [[0.5], [0.5], [0.5]]}
    assert source.shapes == [(2,), (3, 1)]


def test_the_input_is_left_alone_also_without_noise() -> None:
    params = {"a": torch.tensor([1.0, 2.0])}
    add_noise(params, 1.0, Ones())["a"].zero_()
    add_noise(params, 0.0, Ones())["a"].zero_()
    assert params["a"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float16, torch.float32)],
)
def test_noise_is_at_least_single_precision(given: torch.dtype, expected: torch.dtype) -> None:
    noisy = add_noise({"a": torch.ones(4, dtype=given)}, 1e-5, SeededNoise(1))
    assert noisy["a"].dtype == expected
    assert len(set(noisy["a"].tolist())) == 4


@pytest.mark.parametrize("std", [-1.0, math.nan, math.inf, True])
def test_a_standard_deviation_that_is_none_is_refused_by_name(std: float) -> None:
    with pytest.raises(ValueError, match="add_noise: std of a is"):
        add_noise({"a": torch.ones(2)}, std, Ones())


def test_standard_deviations_are_for_all_tensors_and_no_others() -> None:
    with pytest.raises(ParameterError, match="1 parameters missing \\[b\\], 1 unknown \\[c\\]"):
        add_noise({"a": torch.ones(2), "b": torch.ones(2)}, {"a": 1.0, "c": 1.0}, Ones())


@pytest.mark.parametrize("tensor", [torch.tensor([1, 2]), torch.tensor([math.nan])])
def test_what_is_no_number_gets_no_noise(tensor: Tensor) -> None:
    with pytest.raises(ParameterError, match="add_noise: 1 tensors"):
        add_noise({"a": tensor}, 1.0, Ones())


@pytest.mark.parametrize(("z", "std"), [(1.0, 0.25), (4.244, 1.061)])
def test_t5_noise_on_the_mean_of_four_sites(z: float, std: float) -> None:
    """z S / K on the mean itself."""
    mean = {"w": torch.zeros(MILLION)}
    assert float(add_noise(mean, z * 1.0 / 4, SeededNoise(5))["w"].std()) == pytest.approx(std, rel=0.01)


def test_t5_shares_of_four_sites_add_up() -> None:
    """0.2 at each of four sites is 0.2 / sqrt(4) on their mean; clipping comes first and does not bound it."""
    clipped, _ = clip_flat({"w": torch.zeros(MILLION)}, 1.0)
    sent = [add_noise(clipped, 0.2, SeededNoise(site))["w"] for site in range(4)]
    assert float(torch.stack(sent).mean(0).std()) == pytest.approx(0.1, rel=0.01)
