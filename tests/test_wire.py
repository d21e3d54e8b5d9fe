"""What an update is worth after it has travelled in fewer bits, and that bad forms are refused."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from fedcmt.algorithms.base import Participant, Update
from fedcmt.algorithms.fedavg import FedAvg
from fedcmt.config import ConfigError, OptimizerConfig, ServerConfig, SiteConfig
from fedcmt.data.phantoms import make_brain_mr
from fedcmt.federation import Federation
from fedcmt.inprocess import InProcessChannel
from fedcmt.messages import Message, Task
from fedcmt.nnunet.planner import FederatedPlanner
from fedcmt.params import ParameterError, Params, check_finite, load_tensors, norm, serialized_size, shapes, snapshot
from fedcmt.privacy.clipping import clip_flat
from fedcmt.privacy.server_half import ServerPrivacy
from fedcmt.privacy.terms import PrivacyTerms
from fedcmt.site import Site
from fedcmt.wire import SCALE_SUFFIX, decode, encode, owner, values

SHORT = ["float16", "int8"]


def travelled(delta: Params, dtype: str, seed: int = 0) -> Params:
    return decode(encode(delta, dtype, seed=seed), dtype, where="here")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_float32_changes_nothing() -> None:
    delta = {"w": noise(2, 3), "s": torch.tensor(1e-30)}
    encoded = encode(delta, "float32", seed=0)
    assert all(encoded[name] is tensor for name, tensor in delta.items())
    assert set(encoded) == set(delta)
    assert decode(encoded, "float32", where="here") == encoded


def test_half_precision_divides_by_a_power_of_two() -> None:
    encoded = encode({"w": torch.tensor([3.0, -1.5, 0.0])}, "float16", seed=0)
    assert encoded["w"].dtype == torch.float16
    assert encoded["w"].tolist() == [24576.0, -12288.0, 0.0]  # 3 is 0.75 times 2^2, which becomes 0.75 times 2^15
    assert (encoded["w#scale"].dtype, encoded["w#scale"].shape) == (torch.float32, ())
    assert float(encoded["w#scale"]) == 2**-13


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e5, 1e30])
def test_half_precision_keeps_eleven_bits_of_all_but_the_smallest(size: float) -> None:
    exponents = torch.linspace(-35, 0, 1001)
    delta = size * noise(1001).sign() * torch.exp2(exponents)
    error = (travelled({"w": delta}, "float16")["w"] - delta).abs()
    largest = float(delta.abs().max())
    assert bool((error <= (2**-11 * delta.abs()).clamp(min=2**-39 * largest)).all())
    assert int((delta.abs() < 2**-28 * largest).sum()) > 100  # of both kinds


def test_half_precision_is_finite_up_to_the_largest_float32() -> None:
    delta = torch.tensor([torch.finfo(torch.float32).max / 2, 70000.0])
    assert bool(torch.isfinite(travelled({"w": delta}, "float16")["w"]).all())


def test_whole_numbers_of_steps_travel_as_bytes_without_loss() -> None:
    weights = torch.tensor([[127.0, -1.0, 0.0], [-0.5, 0.25, 63.5]])
    encoded = encode({"w": weights}, "int8", seed=0)
    assert encoded["w"].dtype == torch.int8
    assert encoded["w#scale"].tolist() == [1.0, 0.5]  # of each row: its largest value is 127 steps
    assert encoded["w"][0].tolist() == [127, -1, 0]
    assert encoded["w"][1].tolist()[::2] == [-1, 127]
    assert encoded["w"][1, 1].item() in (0, 1)  # half a step


def test_bytes_are_off_by_less_than_a_step_of_their_row() -> None:
    delta = noise(5, 3, 2, 4) * torch.tensor([1e-6, 1.0, 30.0, 1e-3, 0.1]).reshape(5, 1, 1, 1)
    error = (travelled({"w": delta}, "int8")["w"] - delta).abs().flatten(1).amax(1)
    assert bool((error <= delta.abs().flatten(1).amax(1) / 127 * (1 + 1e-4)).all())
    assert float(error.max()) > 0


def test_rounding_to_bytes_is_right_on_average() -> None:
    delta = torch.tensor([[127.0, 0.3, -0.3, 5.75, 0.0]])
    draws = torch.stack([travelled({"w": delta}, "int8", seed)["w"] for seed in range(2000)])
    # A draw is off by half a step at most, in the mean of 2000 by 0.011; the nearest would be off by 0.3 or 0.25.
    assert (draws.mean(0) - delta).abs().max() < 0.06
    assert set(draws[:, 0, 1].tolist()) == {0.0, 1.0}
    assert set(draws[:, 0, 4].tolist()) == {0.0}


def test_small_values_beside_a_large_one_are_not_lost_over_rounds() -> None:
    delta = torch.full((1, 64), 0.002)
    delta[0, 0] = 1.0  # a step is 1 / 127, of which the others are a quarter
    total = sum(travelled({"w": delta}, "int8", seed)["w"] for seed in range(400))
    assert isinstance(total, Tensor)
    assert float(total[0, 1:].mean()) == pytest.approx(400 * 0.002, rel=0.05)


def test_the_seed_decides_the_rounding() -> None:
    delta = {"w": noise(4, 50)}
    first, again, other = (encode(delta, "int8", seed=seed)["w"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_two_tensors_of_the_same_values_are_not_rounded_alike() -> None:
    encoded = encode({"a": noise(4, 50), "b": noise(4, 50)}, "int8", seed=0)
    assert not torch.equal(encoded["a"], encoded["b"])


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3),
        torch.tensor(0.0),
        torch.tensor(-0.7),
        torch.tensor([0.3]),
        torch.tensor([[1e-3]]),
        torch.empty(0),
        torch.empty(0, 3, 2),
        torch.empty(2, 0),
        torch.tensor([[0.0, 0.0], [1.0, -1.0]]),
    ],
    ids=lambda t: f"{tuple(t.shape)}",
)
def test_tensors_of_any_form_come_back(tensor: Tensor, dtype: str) -> None:
    got = travelled({"w": tensor}, dtype)["w"]
    assert (got.shape, got.dtype) == (tensor.shape, torch.float32)
    torch.testing.assert_close(got, tensor, rtol=2**-11, atol=0)


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("largest", [1.4e-45, 2.5e-43, 1e-42, 1e-38])
def test_numbers_near_the_smallest_do_not_change_their_sign_nor_grow(largest: float, dtype: str) -> None:
    delta = torch.tensor([[largest, -largest, largest / 2, 0.0]])
    got = travelled({"w": delta}, dtype)["w"]
    assert bool((got * 1e38 * delta.sign() >= 0).all())
    assert bool((got.abs() <= largest * 1.0001).all())


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(2, 3), (3,), ()])
def test_what_is_not_finite_stays_so(shape: tuple[int, ...], value: float, dtype: str) -> None:
    delta = {"fine": torch.ones(2), "bad": torch.full(shape, value)}
    if shape == (2, 3):
        delta["bad"][0] = 1.0
    got = travelled(delta, dtype)
    with pytest.raises(ParameterError, match=r"not finite: \[bad\]"):
        check_finite(got, where="here")
    assert got["fine"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", SHORT)
def test_encoding_leaves_its_input_alone(dtype: str) -> None:
    delta = {"w": noise(3, 4)}
    encode(delta, dtype, seed=0)
    assert torch.equal(delta["w"], noise(3, 4))


@pytest.mark.parametrize(
    ("delta", "dtype", "reason"),
    [
        ({"w": torch.ones(2)}, "int4", r"update_dtype is 'int4', expected float32, float16, int8"),
        ({"w": torch.ones(2).double()}, "int8", r"w is torch\.float64, expected torch\.float32"),
        ({"w@mr.a#scale": torch.ones(2)}, "float16", r"w@mr\.a#scale ends with #scale"),
    ],
)
def test_an_update_that_has_no_such_form_is_refused(delta: Params, dtype: str, reason: str) -> None:
    with pytest.raises(ParameterError, match=reason):
        encode(delta, dtype, seed=0)


def changed(**tensors: Any) -> Callable[[Params], dict[str, Any]]:
    """Tensors by name, ``scale`` for the scales; None takes one away."""
    names = {"scale": "w" + SCALE_SUFFIX}
    return lambda encoded: {
        name: tensor
        for name, tensor in {**encoded, **{names.get(n, n): t for n, t in tensors.items()}}.items()
        if tensor is not None
    }


FORGED = {
    "no scales": (changed(scale=None), r"missing \[w#scale\]"),
    "scales alone": (changed(w=None), r"unknown \[w#scale\]"),
    "scales of scales": (changed(**{"w#scale#scale": torch.tensor(1.0)}), r"unknown \[w#scale#scale\]"),
    "scales of another form": (changed(scale=torch.ones(2, 1)), r"w#scale \(2, 1\) instead of \(2,\)"),
    "a scale for all rows": (changed(scale=torch.tensor(1.0)), r"w#scale \(\) instead of \(2,\)"),
    "scales of another type": (changed(scale=torch.ones(2).double()), r"w#scale is torch\.float64"),
    "numbers as they are": (changed(w=torch.ones(2, 3)), r"w is torch\.float32, expected torch\.int8 under"),
    "no tensor": (changed(w=[1, 2]), r"\['w'\] are not dense torch tensors"),
    "a sparse tensor": (changed(w=torch.ones(2, 3).to_sparse()), r"\['w'\] are not dense torch tensors"),
}


@pytest.mark.parametrize("case", FORGED)
def test_another_form_than_was_asked_for_is_refused(case: str) -> None:
    change, reason = FORGED[case]
    forged = change(encode({"w": noise(2, 3)}, "int8", seed=0))
    with pytest.raises(ParameterError, match=rf"update of site 'c': .*{reason}"):
        decode(forged, "int8", where="update of site 'c'")


def test_scales_belong_to_their_tensor() -> None:
    encoded = encode({"w": noise(2, 3)}, "int8", seed=0)
    assert {name: owner(name, encoded) for name in encoded} == {"w": "w", "w#scale": "w"}
    assert owner("w#scale", ["w#scale"]) == "w#scale"
    assert owner("other", encoded) == "other"


def test_values_are_what_the_server_will_read() -> None:
    encoded = encode({"w": noise(2, 3), "b": noise(3)}, "int8", seed=0)
    read = decode(encoded, "int8", where="here")
    assert all(torch.equal(values({**encoded, "plain": torch.ones(1)})[name], read[name]) for name in read)
    assert list(read) == ["w", "b"]


@pytest.mark.parametrize(("dtype", "most"), [("float16", 0.51), ("int8", 0.27)])
@pytest.mark.parametrize("features", [[16, 32, 64, 128], [32, 64, 128]])
def test_an_update_of_a_u_net_takes_about_a_half_or_a_quarter(features: list[int], dtype: str, most: float) -> None:
    network = PlainConvUNet(
        input_channels=1,
        n_stages=len(features),
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1, *[2] * (len(features) - 1)],
        n_conv_per_stage=2,
        num_classes=3,
        n_conv_per_stage_decoder=2,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"affine": True},
        nonlin=nn.LeakyReLU,
    )
    delta = snapshot(network)
    ratio = serialized_size(encode(delta, dtype, seed=0))[1] / serialized_size(delta)[1]
    assert most - 0.02 < ratio <= most


def test_rows_travel_like_whole_tensors() -> None:
    rows = noise(6, 3, 2)[[4, 1]]
    got = travelled({"w": rows}, "int8")["w"]
    assert got.shape == rows.shape
    assert torch.allclose(got, rows, atol=float(rows.abs().max()) / 127)


def test_an_update_that_rounding_lengthened_is_clipped_again_by_the_server(tmp_path: Path) -> None:
    terms = PrivacyTerms("central_client_dp", clip=0.5, noise_multiplier=1e-9, noise="seeded")
    clipped, _ = clip_flat({"w": noise(4, 300)}, terms.clip)
    longer = travelled(clipped, "int8")
    assert norm(longer) > terms.clip * (1 + 1e-5)
    site = Participant("c", "MR", ("T1",), 3, shapes(clipped))
    privacy = ServerPrivacy(terms, FedAvg(), tmp_path, seed=0, num_sites=1)
    protected = privacy.protect({"c": Update(longer, num_cases=3, num_steps=1)}, [site], {}, 0)
    assert norm(protected["c"].delta) == pytest.approx(terms.clip, rel=2e-6)


@pytest.mark.parametrize("value", ["float64", 16, None, ["int8"]])
def test_a_job_with_another_type_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"here: update_dtype is .*, expected float32, float16, int8"):
        ServerConfig.from_dict({"num_rounds": 1, "update_dtype": value}, "here")


@pytest.mark.parametrize("dtype", SHORT)
def test_noise_that_adds_up_over_sites_goes_with_exact_numbers_only(dtype: str) -> None:
    def job(mode: str) -> ServerConfig:
        privacy = {"mode": mode, "noise_multiplier": 1.0}
        return ServerConfig.from_dict({"num_rounds": 1, "update_dtype": dtype, "privacy": privacy}, "here")

    assert job("central_client_dp").update_dtype == dtype
    with pytest.raises(ConfigError, match="expected float32 under distributed_client_dp"):
        job("distributed_client_dp")


PLANNING = {
    "mode": "architecture",
    "base_features": 8,
    "max_features": 16,
    "max_stages": 2,
    "max_patch_size": [16, 16, 16],
    "batch_size": 2,
}
SITE = SiteConfig(701, "MR", local_steps=2, val_batches=1, optimizer=OptimizerConfig("SGD", lr=1e-2), mirroring=False)


class Deaf(Site):
    """Always answers in float32."""

    def handle(self, task: Task, message: Message, stop: Callable[[], bool] = lambda: False) -> Message:
        return super().handle(task, Message({**message.meta, "update_dtype": "float32"}, message.tensors), stop)


@dataclass
class Finished:
    """A job of two sites and two rounds."""

    folder: Path
    params: Params
    results: dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Finished]:
    home = tmp_path_factory.mktemp("home")
    raw = home / "raw" / "Dataset701_Tiny"
    make_brain_mr(raw, num_train=5, num_test=1, seed=3, style="site_a", channels=("T2",), shape_vox=(20, 22, 18))

    def job(dtype: str, name: str, other: type[Site] = Site, rounds: int = 2, min_sites: int = 2) -> Finished:
        folder = home / name
        with pytest.MonkeyPatch.context() as patch:
            for kind, path in (("raw", raw.parent), ("preprocessed", home / "pre"), ("results", folder / "results")):
                patch.setenv(f"nnUNet_{kind}", str(path))
            makes = {"north": Site, "south": other}
            sites = {site: make(site, SITE, FedAvg(), folder / site) for site, make in makes.items()}
            config = ServerConfig(rounds, planning=PLANNING, update_dtype=dtype, min_sites=min_sites)  # type: ignore[arg-type]
            planner = FederatedPlanner(PLANNING, seed=5)
            federation = Federation(FedAvg(), planner, config, job="job", folder=folder / "server")
            results = federation.run(InProcessChannel(sites), list(sites))
        tensors, _ = load_tensors(folder / "server" / "state.safetensors")
        return Finished(folder, tensors, results)

    return job


@pytest.fixture(scope="module")
def exact(run: Callable[..., Finished]) -> Finished:
    return run("float32", "exact")


@pytest.fixture(scope="module")
def in_bytes(run: Callable[..., Finished]) -> Finished:
    return run("int8", "bytes")


def distance(one: Params, other: Params) -> float:
    return norm({name: tensor - other[name] for name, tensor in one.items()})


def trained_rows(job: Finished) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (job.folder / "north" / "egress.jsonl").read_text().splitlines()]
    return [row for row in rows if row["task"] == "train"]


def test_a_job_in_bytes_ends_close_to_one_in_float32(exact: Finished, in_bytes: Finished) -> None:
    moved = sum(row["norm"] for row in trained_rows(exact))
    assert 0 < distance(in_bytes.params, exact.params) < 0.01 * moved
    assert {tensor.dtype for tensor in in_bytes.params.values()} == {torch.float32}


def test_the_ledger_has_what_was_on_the_wire(exact: Finished, in_bytes: Finished) -> None:
    (plain, _), (short, _) = trained_rows(exact), trained_rows(in_bytes)
    weights = [name for name, tensor in plain["tensors"].items() if len(tensor["shape"]) == 5]
    assert weights
    assert all(short["tensors"][name]["dtype"] == "int8" for name in plain["tensors"])
    assert {name for name in short["tensors"] if name not in plain["tensors"]} == {
        f"{n}#scale" for n in plain["tensors"]
    }
    assert 0.25 < short["tensor_bytes"] / plain["tensor_bytes"] < 0.27
    assert short["norm"] == pytest.approx(plain["norm"], rel=0.01)


def test_bytes_sent_are_fewer_and_bytes_received_are_not(exact: Finished, in_bytes: Finished) -> None:
    plain, short = (job.results["sites"]["north"] for job in (exact, in_bytes))
    assert short["bytes_sent"] < 0.5 * plain["bytes_sent"]
    assert short["bytes_received"] == plain["bytes_received"]


def test_a_site_that_does_not_answer_in_the_type_asked_for_is_left_out(
    run: Callable[..., Finished], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fedcmt"):
        job = run("float16", "deaf", other=Deaf, rounds=1, min_sites=1)
    assert "update of site 'south': " in caplog.text
    assert "#scale" in caplog.text
    assert "without ['south']" in caplog.text
    assert job.results["rounds"] == 1
