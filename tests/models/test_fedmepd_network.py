"""FedMEPD's network: its published size, its composition, sequences that are missing, and nnU-Net's interface."""

import inspect
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from torch.nn import functional

from fedcmt.models.fedmepd import FedMEPDNet, Outputs
from fedcmt.models.region_fusion import RegionFusion
from fedcmt.models.sequences import SEQUENCES
from fedcmt.params import copy_into, named_tensors, snapshot

SMALL = (4, 4, 8, 8)
SIZE = (16, 8, 11)
"""At the lowest level 2 x 1 x 2 voxels."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build(sequences: Sequence[str] = SEQUENCES, classes: int = 3, seed: int = 0, **changes: Any) -> FedMEPDNet:
    """A narrow network in evaluation mode; its anchors and attention are as large as its features."""
    arguments: dict[str, Any] = {"features_per_stage": SMALL, "heads": (1, 2, 2, 3), "anchors_per_class": 2}
    with seeded(seed):
        network = FedMEPDNet(len(sequences), classes, sequences, **(arguments | changes))
        network.apply(network.initialize)
        for linear in network.calibration.modules():
            if isinstance(linear, nn.Linear):
                nn.init.normal_(linear.weight, std=0.3)
        for anchors in network.anchors.values():
            nn.init.normal_(anchors)
    return network.eval()


def random(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


IMAGE = random(1, 4, *SIZE)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(**arguments: Any) -> FedMEPDNet:
    with torch.device("meta"):
        return FedMEPDNet(4, 4, SEQUENCES, **arguments)


def training(network: FedMEPDNet) -> FedMEPDNet:
    network.all_outputs = True
    return network.train()


def test_oracle_17_encoders_and_decoder_have_the_published_size() -> None:
    network = on_meta()
    assert [count(encoder) for encoder in network.encoders.values()] == [1_466_496] * 4
    assert count(network.encoders) + count(network.decoder) == 8_398_572
    assert count(network.decoder) == 2_532_588
    assert count(network.auxiliary) == 586_388
    assert count(network) == 8_398_572 + 586_388


def test_oracle_17_the_decoder_s_parts() -> None:
    decoder = on_meta().decoder
    convolutions = [m for m in decoder.modules() if isinstance(m, nn.Conv3d)]
    assert len(convolutions) == 86
    assert sum(m.out_channels for m in convolutions) == 4_092
    assert len(list(decoder.parameters())) == 172
    assert count(decoder.fusions) == 1_875_952
    assert count(decoder.maps) == 70_248
    assert count(decoder.ups) + count(decoder.merges) + count(decoder.head) == 586_388


def test_oracle_17_calibration_and_anchors() -> None:
    network = on_meta(calibrated=True)
    assert [count(own) for own in network.calibration.values()] == [4_304, 33_568, 132_672, 527_488]
    assert {name: tuple(own.shape) for name, own in network.anchors.items()} == {
        "1": (16, 16), "2": (16, 32), "3": (16, 64), "4": (16, 128),
    }  # fmt: skip
    assert count(network.anchors) == 3_840


def test_oracle_17_shapes_at_80() -> None:
    outputs = on_meta(calibrated=True).outputs(torch.zeros(1, 4, 80, 80, 80, device="meta"))
    full = (1, 4, 80, 80, 80)
    assert outputs.logits.shape == full
    assert [own.shape for own in outputs.probability_maps] == [full] * 4
    assert {name: own.shape for name, own in outputs.auxiliary.items()} == dict.fromkeys(SEQUENCES, full)
    assert [tuple(own.shape) for own in outputs.features] == [
        (1, width, *(80 // 2**level,) * 3) for level, width in enumerate((16, 32, 64, 128))
    ]


@pytest.mark.parametrize("size", [(9, 9, 9), (17, 8, 13), (16, 16, 16)])
def test_oracle_17_shapes_of_odd_lengths_and_probabilities(size: tuple[int, int, int]) -> None:
    outputs = build(calibrated=True).outputs(random(2, 4, *size))
    assert [tuple(own.shape[2:]) for own in outputs.features] == [tuple(-(-n // f) for n in size) for f in (1, 2, 4, 8)]
    for own in (outputs.logits.softmax(dim=1), *outputs.probability_maps):
        assert own.shape == (2, 3, *size)
        torch.testing.assert_close(own.sum(dim=1), torch.ones(2, *size))
    assert all(own.shape == (2, 3, *size) for own in outputs.auxiliary.values())


def test_oracle_18_what_a_missing_channel_holds_does_not_matter() -> None:
    network, other = build(), IMAGE.clone()
    other[:, 1] = 1e3 * random(1, *SIZE, seed=5)
    other[:, 3] = 0
    assert not torch.allclose(network(other), network(IMAGE), atol=1e-2)
    with network.only(["FLAIR", "T1"]):
        assert torch.equal(network(other), network(IMAGE))


def test_oracle_18_missing_is_as_good_as_never_there() -> None:
    network, site = build(), build(["T1", "FLAIR"], seed=9)
    copy_into(site, {name: own for name, own in snapshot(network).items() if name in snapshot(site)})
    with network.only(["FLAIR", "T1"]):
        assert torch.equal(network(IMAGE), site(IMAGE[:, [2, 0]]))
    assert not any(name.startswith(("encoders.T1ce.", "encoders.T2.")) for name in named_tensors(site))


def test_oracle_18_encoders_of_missing_sequences_get_no_gradient() -> None:
    network = training(build(calibrated=True))
    with network.only(["T1ce", "T2"]):
        outputs = network(IMAGE)
    assert list(outputs.auxiliary) == ["T1ce", "T2"]
    (outputs.logits.square().sum() + sum(own.square().sum() for own in outputs.auxiliary.values())).backward()
    without = {name for name, p in network.named_parameters() if p.grad is None}
    assert {name.split(".")[1] for name in without if name.startswith("encoders.")} == {"FLAIR", "T1"}
    assert not any(name.startswith(("encoders.T1ce.", "encoders.T2.", "calibration.")) for name in without)


def test_oracle_19_a_client_with_all_sequences_and_no_calibration_is_the_server() -> None:
    server, client = build(), build(seed=9)
    shared = {n: t for n, t in snapshot(server).items() if n.startswith(("encoders.", "decoder."))}
    assert not torch.allclose(client(IMAGE), server(IMAGE), atol=1e-2)
    copy_into(client, shared)
    assert torch.equal(client(IMAGE), server(IMAGE))


def test_oracle_19_what_adds_nothing_is_no_calibration() -> None:
    server, client = build(), build(seed=9, calibrated=True, calibration="add")
    copy_into(client, {n: t for n, t in snapshot(server).items() if n.startswith(("encoders.", "decoder."))})
    assert not torch.allclose(client(IMAGE), server(IMAGE), atol=1e-2)
    for own in client.calibration.values():
        nn.init.zeros_(own.output.weight)
        nn.init.zeros_(own.output.bias)
    assert torch.equal(client(IMAGE), server(IMAGE))


def test_oracle_21_the_fused_prediction_does_not_train_the_probability_maps() -> None:
    network = training(build())
    network(IMAGE).logits.square().sum().backward()
    without = {name for name, p in network.decoder.named_parameters() if p.grad is None}
    assert without == {name for name, _ in network.decoder.named_parameters() if name.startswith("maps.")}
    network(IMAGE).probability_maps[3].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in network.decoder.maps["4"].named_parameters() if "weight" in n)
    assert all(p.grad is None for p in network.decoder.maps["3"].parameters())


@pytest.mark.parametrize("names", [("t2w", "T1", "flair", "T1Gd"), ("T1c", "T2-FLAIR", "t2", "t1n")])
def test_oracle_27_channels_in_another_order_under_other_names_give_the_same(names: tuple[str, ...]) -> None:
    order = {
        ("t2w", "T1", "flair", "T1Gd"): [3, 2, 0, 1],
        ("T1c", "T2-FLAIR", "t2", "t1n"): [1, 0, 3, 2],
    }[names]
    usual, shuffled = build(calibrated=True), build(names, seed=9, calibrated=True)
    copy_into(shuffled, snapshot(usual))
    assert list(named_tensors(shuffled)) == list(named_tensors(usual))
    assert torch.equal(shuffled(IMAGE[:, order]), usual(IMAGE))
    assert not torch.allclose(shuffled(IMAGE), usual(IMAGE), atol=1e-2)


class Reference:
    """The network as a formula over its parameters."""

    def __init__(self, network: FedMEPDNet) -> None:
        self.p = snapshot(network)
        self.heads = [own._heads for own in network.calibration.values()]

    def conv(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        weight = self.p[f"{name}.weight"]
        return functional.conv3d(x, weight, self.p[f"{name}.bias"], stride, weight.shape[-1] // 2)

    def block(self, x: Tensor, name: str, stride: int = 1) -> Tensor:
        x = self.conv(x, f"{name}.conv", stride)
        mean, variance = x.mean((2, 3, 4), keepdim=True), x.var((2, 3, 4), keepdim=True, correction=0)
        x = (x - mean) / (variance + 1e-5).sqrt()
        return torch.where(x > 0, x, 0.2 * x)

    def blocks(self, x: Tensor, name: str, number: int) -> Tensor:
        for i in range(number):
            x = self.block(x, f"{name}.{i}")
        return x

    def encoder(self, x: Tensor, name: str) -> list[Tensor]:
        maps = []
        for level in range(4):
            start = self.block(x, f"{name}.first.{level}", stride=1 if level == 0 else 2)
            x = start + self.blocks(start, f"{name}.residual.{level}", 2)
            maps.append(x)
        return maps

    def fusion(self, stack: list[Tensor], p: Tensor, name: str) -> Tensor:
        regions = []
        for k in range(p.shape[1]):
            own = p[:, k : k + 1]
            size = own.mean((2, 3, 4), keepdim=True) + 1e-7
            described = torch.cat([(x * own).mean((2, 3, 4), keepdim=True) / size for x in stack] + [size], dim=1)
            hidden = functional.leaky_relu(self.conv(described, f"{name}.gates.{k}.0"), 0.2)
            gates = self.conv(hidden, f"{name}.gates.{k}.2").sigmoid()
            regions.append(sum(gates[:, m : m + 1] * x * own for m, x in enumerate(stack)))
        half = self.blocks(torch.cat(regions, dim=1), f"{name}.regions", 3)
        return torch.cat((half, self.blocks(torch.cat(stack, dim=1), f"{name}.shortcut", 3)), dim=1)

    def map(self, stack: list[Tensor], decoded: Tensor | None, name: str) -> Tensor:
        embedded = self.blocks(torch.cat(stack, dim=1), f"{name}.embed", 3)
        joined = embedded if decoded is None else torch.cat((decoded, embedded), dim=1)
        return self.conv(self.block(joined, f"{name}.classify.0"), f"{name}.classify.1").softmax(dim=1)

    def calibrated(self, x: Tensor, level: int) -> Tensor:
        anchors, heads, width = self.p[f"anchors.{level}"], self.heads[level - 1], x.shape[1]
        q, k, v = (
            functional.linear(of, self.p[f"calibration.{level}.{n}.weight"], self.p[f"calibration.{level}.{n}.bias"])
            for n, of in (("query", x.movedim(1, -1)), ("key", anchors), ("value", anchors))
        )
        parts = []
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            parts.append((q[..., own] @ k[:, own].T / width**0.5).softmax(dim=-1) @ v[:, own])
        name = f"calibration.{level}.output"
        result = functional.linear(torch.cat(parts, dim=-1), self.p[f"{name}.weight"], self.p[f"{name}.bias"])
        return result.movedim(-1, 1)

    def enlarged(self, x: Tensor, factor: int, like: Tensor) -> Tensor:
        size = [factor * n for n in x.shape[2:]]
        x = functional.interpolate(x, size, mode="trilinear", align_corners=True)
        return x[(..., *(slice(n) for n in like.shape[2:]))]

    def up(self, x: Tensor, level: int, like: Tensor, part: str) -> Tensor:
        size = [2 * n for n in x.shape[2:]]
        x = functional.interpolate(x, size, mode="trilinear", align_corners=True)
        return self.block(x, f"{part}.ups.{level}")[(..., *(slice(n) for n in like.shape[2:]))]

    def merge(self, x: Tensor, upper: Tensor, level: int, part: str) -> Tensor:
        return self.blocks(torch.cat((x, upper), dim=1), f"{part}.merges.{level}", 2)

    def outputs(self, image: Mapping[str, Tensor]) -> Outputs:
        encoded = {name: self.encoder(image[name], f"encoders.{name}") for name in image}
        missing = [torch.zeros_like(own) for own in next(iter(encoded.values()))]
        maps, features, rising = {}, {}, None
        for level in (4, 3, 2, 1):
            stack = [encoded.get(name, missing)[level - 1] for name in ("FLAIR", "T1ce", "T1", "T2")]
            decoded = None if rising is None else self.up(rising, level, stack[0], "decoder")
            maps[level] = self.map(stack, decoded, f"decoder.maps.{level}")
            fused = self.fusion(stack, maps[level], f"decoder.fusions.{level}")
            features[level] = fused if decoded is None else self.merge(fused, decoded, level, "decoder")
            rising = self.calibrated(features[level], level) if self.heads else features[level]
        alone = {}
        for name, own in encoded.items():
            x = own[3]
            for level in (3, 2, 1):
                x = self.merge(own[level - 1], self.up(x, level, own[level - 1], "auxiliary"), level, "auxiliary")
            alone[name] = self.conv(x, "auxiliary.head")
        full = [self.enlarged(maps[level], 2 ** (level - 1), features[1]) for level in (1, 2, 3, 4)]
        return Outputs(
            self.conv(rising, "decoder.head"), tuple(full), alone, tuple(features[level] for level in (1, 2, 3, 4))
        )


@pytest.mark.parametrize("calibrated", [False, True])
def test_the_network_is_the_composition_written_out(calibrated: bool) -> None:
    network, image = build(["T2", "FLAIR", "T1ce"], calibrated=calibrated).double(), random(2, 3, *SIZE).double()
    found = network.outputs(image)
    expected = Reference(network).outputs({"FLAIR": image[:, 1:2], "T1ce": image[:, 2:], "T2": image[:, :1]})
    for own, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(own, reference)


def test_logits_always_but_in_training_where_all_outputs_are_wanted() -> None:
    network = build()
    logits = network(IMAGE)
    assert isinstance(logits, Tensor)
    network.train()
    assert torch.equal(network(IMAGE), logits)
    network.all_outputs = True
    assert isinstance(network(IMAGE), Outputs)
    assert torch.equal(network(IMAGE)[0], logits), "nnU-Net's trainer takes the first item for the prediction"
    network.eval()
    assert torch.equal(network(IMAGE), logits)


def test_features_are_those_before_calibration() -> None:
    plain, calibrated = build(), build(seed=9, calibrated=True)
    copy_into(calibrated, snapshot(plain))
    one, other = plain.outputs(IMAGE), calibrated.outputs(IMAGE)
    assert torch.equal(one.features[3], other.features[3])
    assert not torch.allclose(one.features[2], other.features[2], atol=1e-2)
    assert not torch.allclose(one.logits, other.logits, atol=1e-2)


def test_a_case_does_not_depend_on_the_others_of_its_batch() -> None:
    network, images = build(calibrated=True), random(2, 4, *SIZE)
    torch.testing.assert_close(network(images)[1:], network(images[1:]), rtol=1e-4, atol=1e-4)


def test_gates_see_region_means_in_single_precision_also_under_autocast() -> None:
    with seeded(0):
        fusion = RegionFusion(4, 4, 2, padding_mode="zeros")
    stack, p = random(1, 4, 4, 4, 6, 8), random(1, 2, 4, 6, 8).softmax(dim=1)
    seen: list[Tensor] = []
    fusion.gates[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    result = fusion(stack, p)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = fusion(stack, p)
    assert torch.equal(*seen)
    torch.testing.assert_close(half.float(), result, rtol=0.1, atol=0.1)


def test_anchors_are_parameters_that_no_optimiser_moves() -> None:
    network = training(build(calibrated=True, attention_dropout=0.0))
    before = snapshot(network)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.1, weight_decay=0.1)
    network(IMAGE).logits.square().sum().backward()
    optimiser.step()
    after = snapshot(network)
    assert all(torch.equal(after[n], before[n]) for n in before if n.startswith("anchors."))
    assert not torch.equal(after["calibration.1.value.weight"], before["calibration.1.value.weight"])


def test_anchors_change_the_prediction() -> None:
    network = build(calibrated=True)
    before = network(IMAGE)
    copy_into(network, {"anchors.2": random(6, 4, seed=7)})
    assert not torch.allclose(network(IMAGE), before, atol=1e-3)


def test_only_ends_also_when_something_goes_wrong() -> None:
    network = build(["T1", "T2"])
    before = network(IMAGE[:, :2])
    with pytest.raises(ZeroDivisionError), network.only(["t2w"]):
        raise ZeroDivisionError
    assert torch.equal(network(IMAGE[:, :2]), before)


@pytest.mark.parametrize("sequences", [["FLAIR"], ["T1", "t1c"], []])
def test_only_sequences_that_the_site_has(sequences: list[str]) -> None:
    network = build(["T1", "T2"])
    expected = r"expected one or more of the site's \['T1', 'T2'\]"
    with pytest.raises(ValueError, match=expected), network.only(sequences):
        pass


def test_names_are_parts_of_encoders_decoder_auxiliary_calibration_and_anchors() -> None:
    names = named_tensors(build(["t1gd", "flair"], calibrated=True))
    assert {".".join(name.split(".")[:2]) for name in names} == {
        *("encoders.FLAIR", "encoders.T1ce"),
        *(f"decoder.{part}" for part in ("ups", "merges", "head", "maps", "fusions")),
        *(f"auxiliary.{part}" for part in ("ups", "merges", "head")),
        *(f"{part}.{level}" for part in ("calibration", "anchors") for level in (1, 2, 3, 4)),
    }
    assert set(build().state_dict()) == set(named_tensors(build()))


def test_initial_values() -> None:
    with seeded(0):
        network = FedMEPDNet(1, 4, ["T2"], calibrated=True)
        network.apply(network.initialize)
    tensors = named_tensors(network)
    attention = torch.cat(
        [own.flatten() for n, own in tensors.items() if n.startswith("calibration.") and "weight" in n]
    )
    assert float(attention.std()) == pytest.approx(0.001, rel=0.01)
    assert not any(own.any() for n, own in tensors.items() if n.startswith("calibration.") and n.endswith("bias"))
    assert not any(own.any() for n, own in tensors.items() if n.startswith("anchors."))
    convolution = tensors["encoders.T2.residual.3.0.conv.weight"]
    assert float(convolution.std()) == pytest.approx((2 / (27 * 128)) ** 0.5, rel=0.01)


def test_reflection_pads_every_convolution_of_three_voxels_and_no_other() -> None:
    network = build(padding_mode="reflect")
    wide = {m.kernel_size[0]: set() for m in network.modules() if isinstance(m, nn.Conv3d)}
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            wide[module.kernel_size[0]].add(module.padding_mode)
    assert wide == {1: {"zeros"}, 3: {"reflect"}}
    assert network(random(1, 4, 9, 9, 9)).shape == (1, 3, 9, 9, 9)


def test_nnu_net_builds_it_from_plans_and_loads_its_checkpoint_with_anchors() -> None:
    arguments = {"sequences": ["T1", "t1ce"], "features_per_stage": list(SMALL), "n_stages": 4, "calibrated": True}
    arguments |= {"deep_supervision": False, "anchors_per_class": 2, "heads": [1, 2, 2, 3]}
    source, planned = build(["T1", "T1ce"], calibrated=True), json.loads(json.dumps(arguments))
    path = f"{FedMEPDNet.__module__}.{FedMEPDNet.__qualname__}"
    network = get_network_from_plans(path, planned, [], 2, 3, deep_supervision=False).eval()
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    network.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(network(IMAGE[:, :2]), source(IMAGE[:, :2]))
    network.decoder.deep_supervision = True
    assert isinstance(network.train()(IMAGE[:, :2]), Tensor)
    assert list(network.keys_to_in_proj) == []


def test_a_shallower_network() -> None:
    network = build(n_stages=2, features_per_stage=(4, 8), heads=(1, 2), calibrated=True)
    outputs = network.outputs(random(1, 4, 3, 4, 5))
    assert outputs.logits.shape == (1, 3, 3, 4, 5)
    assert len(outputs.features) == len(outputs.probability_maps) == 2


@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        ((1, 3, 16, 16, 16), {}, r"input \(1, 3, 16, 16, 16\), expected \[B, 4, Z, Y, X\]"),
        ((1, 4, 16, 16), {}, "in three dimensions"),
        ((1, 4, 8, 8, 8), {}, r"patch \(8, 8, 8\) is \(1, 1, 1\) voxels at the lowest level.*more than 8 voxels"),
        ((1, 4, 16, 16, 8), {"padding_mode": "reflect"}, r"\(2, 2, 1\) voxels at the lowest level"),
    ],
)
def test_images_that_do_not_fit_are_refused(size: tuple[int, ...], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"FedMEPDNet: .*{message}"):
        build(**changes)(torch.zeros(size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_channels": 3}, "3 input channels and sequences"),
        ({"input_channels": 0, "sequences": []}, r"0 input channels and sequences \[\]"),
        ({"sequences": ["T1", "T2", "FLAIR", "CT"]}, r"\['CT'\] are no known MR sequences"),
        ({"sequences": ["T1", "T2", "FLAIR", "T1w"]}, r"\['T1', 'T1w'\] name one sequence twice"),
        ({"num_classes": 1}, "1 classes"),
        ({"deep_supervision": True}, "deep_supervision is true"),
        ({"n_stages": 3}, r"n_stages is 3 and features_per_stage \[16, 32, 64, 128\]"),
        ({"features_per_stage": (4, 8, 16, 30)}, "a multiple of 4 for each"),
        ({"padding_mode": "circular"}, "padding_mode is 'circular', expected one of"),
        ({"calibration": "multiply"}, "calibration is 'multiply', expected one of"),
        ({"anchors_per_class": 0}, "anchors_per_class is 0"),
        ({"heads": (4, 8, 8)}, r"heads are \[4, 8, 8\], expected at least 1 for each of 4 stages"),
        ({"heads": (4, 8, 8, 0)}, "expected at least 1 for each"),
        ({"attention_dropout": 1.0}, r"attention_dropout is 1.0, expected a number in \[0, 1\)"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    usual = {"input_channels": 4, "num_classes": 4, "sequences": SEQUENCES}
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        FedMEPDNet(**(usual | arguments))


def test_every_argument_may_come_from_json() -> None:
    defaults = {n: p.default for n, p in inspect.signature(FedMEPDNet).parameters.items() if p.default is not p.empty}
    with torch.device("meta"):
        FedMEPDNet(2, 4, ["T1", "T2"], **json.loads(json.dumps(defaults)))
