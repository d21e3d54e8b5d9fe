"""M-Unet: its published size, its shapes, sequences that are missing, its parts, and the loss it was published with."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedcmt.algorithms.fedbn import FedBN
from fedcmt.algorithms.fedper import FedPer
from fedcmt.models.cross_modality import ChannelAttention, CrossModality
from fedcmt.models.munet import MUNet
from fedcmt.models.munet_loss import published_loss
from fedcmt.models.scopes import ADAPTER_ENCODER_DECODER, ALL_SHARED, Partition, ScopeRules
from fedcmt.params import ParameterError, named_tensors, shapes, snapshot

RELEASED: Mapping[str, Any] = {"norm": "batch", "strict_compat": True}
SMALL: Mapping[str, Any] = {"n_stages": 3, "stem_features": 4, "features_per_stage": (8, 16, 32)}


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build(channels: int = 3, classes: int = 2, seed: int = 0, **changes: Any) -> MUNet:
    """Two narrow stages, as nnU-Net initialises them."""
    arguments: dict[str, Any] = {"n_stages": 2, "stem_features": 2, "features_per_stage": (4, 8)}
    with seeded(seed):
        network = MUNet(channels, classes, **(arguments | changes))
        network.apply(network.initialize)
    return network


def random(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def on_meta(**arguments: Any) -> MUNet:
    with torch.device("meta"):
        return MUNet(4, 4, **arguments)


def test_t10_the_released_network_has_71610354_parameters() -> None:
    network = on_meta(**RELEASED)
    assert count(network) == 71_610_354
    assert sum(buffer.numel() for buffer in network.buffers()) == 11_074
    assert (len(list(network.parameters())), len(network.state_dict())) == (206, 308)


def test_t10_the_parts_have_the_published_sizes() -> None:
    network = on_meta(**RELEASED)
    assert count(network.encoder.stems) == 768
    assert [count(stages) for stages in network.encoder.stages] == [1_574_304] * 4
    assert [count(f) for f in network.encoder.fusions] == [190_306, 749_252, 2_973_064, 11_844_368, 47_281_696]
    assert count(network.decoder.seg_layers) == 2_004
    assert count(network.decoder) - 2_004 == 2_271_680


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (SMALL, 286_434),
        ({"n_stages": 4, "features_per_stage": (32, 64, 128, 256)}, 17_897_934),
        ({"stem_features": 8, "features_per_stage": (16, 32, 64, 128, 256)}, 17_953_186),
    ],
)
def test_t10_other_sizes(arguments: Mapping[str, Any], expected: int) -> None:
    assert count(on_meta(**RELEASED, **arguments)) == expected


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
def test_t10_without_the_block_that_is_never_used(norm: str) -> None:
    assert count(on_meta(norm=norm)) == 71_605_698


def test_t10_attention_over_16_channels_with_two_heads_of_four() -> None:
    assert count(ChannelAttention(16, heads=2, head_width=4)) == 674


def test_t11_five_outputs_at_224_and_one_without_deep_supervision() -> None:
    network, image = on_meta(**RELEASED), torch.zeros(1, 4, 224, 224, device="meta")
    assert [tuple(o.shape) for o in network(image)] == [(1, 4, n, n) for n in (224, 112, 56, 28, 14)]
    network.decoder.deep_supervision = False
    assert network(image).shape == (1, 4, 224, 224)


def test_t11_the_small_network_at_32() -> None:
    network = on_meta(**RELEASED, **SMALL)
    assert [o.shape[-1] for o in network(torch.zeros(1, 4, 32, 32, device="meta"))] == [32, 16, 8]


@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
@pytest.mark.parametrize("strict", [True, False])
def test_t11_only_the_compatible_network_has_parameters_without_a_part(norm: str, strict: bool) -> None:
    network = build(norm=norm, strict_compat=strict)
    sum(o.square().sum() for o in network(random(2, 3, 16, 24))).backward()
    unused = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    block = {f"decoder.stages.1.{end}" for end in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")}
    assert unused == (block if strict else set())


def attention(dimensions: int = 2) -> ChannelAttention:
    with seeded(3):
        made = ChannelAttention(12, heads=3, head_width=2, dimensions=dimensions)
        nn.init.uniform_(made.temperature.weight, 0.5, 4)
    return made


@pytest.mark.parametrize("size", [(5, 7), (3, 4, 5)])
def test_t12_attention_is_between_the_channels_of_a_head_and_its_rows_sum_to_one(size: tuple[int, ...]) -> None:
    weights = attention(len(size)).weights(random(2, 12, *size))
    assert weights.shape == (2, 3, 2, 2)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 2))
    assert not torch.allclose(weights.sum(dim=-2), torch.ones(2, 3, 2), atol=1e-3)


def test_t12_without_positions_the_order_of_pixels_does_not_matter() -> None:
    made, maps = attention(), random(2, 12, 5, 7)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(4))

    def permuted(x: Tensor) -> Tensor:
        return x.flatten(2)[:, :, order].view(x.shape)

    assert not torch.allclose(made(permuted(maps)), permuted(made(maps)), atol=1e-3)
    nn.init.zeros_(made.position.weight)
    torch.testing.assert_close(made(permuted(maps)), permuted(made(maps)))


def test_t12_queries_and_keys_count_by_direction_alone() -> None:
    made, maps = attention(), random(2, 12, 5, 7)
    before = made(maps)
    with torch.no_grad():
        made.query.weight.mul_(10)
        made.key.weight.mul_(0.1)
    torch.testing.assert_close(made(maps), before)
    with torch.no_grad():
        made.value.weight.mul_(10)
    assert not torch.allclose(made(maps), before)


def test_the_cross_modality_module_is_the_composition_written_out() -> None:
    with seeded(5):
        module = CrossModality(3, 4, heads=2)
    p = {name: random(*t.shape, seed=i) / 3 for i, (name, t) in enumerate(snapshot(module).items())}
    module.load_state_dict(p)
    maps = [random(2, 4, 3, 5, seed=s) for s in (7, 8, 9)]
    x = torch.cat(maps, dim=1)

    moved = x + functional.conv2d(x, p["attention.position.weight"], padding=1, groups=12)
    tokens = moved.flatten(2)
    heads = {n: torch.einsum("id,bdp->bip", p[f"attention.{n}.weight"], tokens) for n in ("query", "key", "value")}
    fused = torch.zeros(2, 4, 15)
    for head, own in enumerate((slice(0, 2), slice(2, 4))):
        q, k = (heads[n][:, own] / heads[n][:, own].norm(dim=2, keepdim=True) for n in ("query", "key"))
        scores = torch.einsum("bip,bjp->bij", k, q) * p["attention.temperature.weight"][head]
        fused[:, own] = torch.einsum("bij,bjp->bip", scores.softmax(dim=2), heads["value"][:, own])
    out = torch.einsum("dc,bcp->bdp", p["attention.output.weight"], fused) + p["attention.output.bias"][:, None]
    y = x + out.view(x.shape)
    wide = functional.gelu(functional.conv2d(y, p["feed_forward.expand.weight"]))
    wide = functional.gelu(functional.conv2d(wide, p["feed_forward.depthwise.weight"], padding=1, groups=48))
    z = y + functional.conv2d(wide, p["feed_forward.reduce.weight"])
    last = functional.conv2d(z, p["output.conv.weight"], p["output.conv.bias"], padding=1)
    last = functional.instance_norm(last, weight=p["output.norm.weight"], bias=p["output.norm.bias"])
    torch.testing.assert_close(module(maps), torch.where(last > 0, last, 0.2 * last), rtol=1e-4, atol=1e-4)


def test_pre_ln_normalises_before_attention_and_before_the_feed_forward_part() -> None:
    plain, normed = build(), build(cmm_norm="pre_ln")
    assert {name for name in snapshot(normed) if name not in snapshot(plain)} == {
        f"encoder.fusions.{k}.norm{i}.{end}" for k in (0, 1) for i in (1, 2) for end in ("weight", "bias")
    }
    image = random(1, 3, 16, 16)
    for fusion in normed.encoder.fusions:
        fusion.feed_forward.register_forward_pre_hook(
            lambda _, inputs: torch.testing.assert_close(inputs[0].std(correction=0), torch.tensor(1.0))
        )
    normed(image)


MISSING = [{}, {"cmm_norm": "pre_ln"}, {"norm": "group"}, {"dimensions": 3}]


@pytest.mark.parametrize("changes", MISSING, ids=str)
def test_a_missing_sequence_has_no_encoder(changes: dict[str, Any]) -> None:
    network = build(**changes)
    image = random(2, 3, *(8,) * changes.get("dimensions", 2), seed=2).repeat(
        1, 1, *(2,) * changes.get("dimensions", 2)
    )
    image[1, 1] = 0
    before = network(image)
    with torch.no_grad():
        for part in (network.encoder.stems[1], network.encoder.stages[1]):
            for parameter in part.parameters():
                parameter.fill_(torch.nan)
    after = network(image)
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new[1], old[1], rtol=0, atol=0)
        assert new[0].isnan().any(), "the other case of the batch has this sequence"


def test_a_missing_sequence_is_a_map_of_zeros_at_every_scale() -> None:
    network, seen = build(), []
    for fusion in network.encoder.fusions:
        fusion.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = random(2, 3, 16, 24)
    image[0, 2] = 0
    network(image)
    for maps in seen:
        zero = [[not bool(own[case].any()) for own in maps] for case in (0, 1)]
        assert zero == [[False, False, True], [False, False, False]]


def test_a_missing_sequence_s_encoder_gets_no_gradient_and_an_empty_patch_finite_ones() -> None:
    network, image = build(), random(1, 3, 16, 16)
    image[:, 1] = 0
    network(image)[0].square().sum().backward()
    assert all(not p.grad.any() for p in network.encoder.stages[1].parameters())
    assert all(p.grad.abs().sum() > 0 for n, p in network.encoder.stages[0].named_parameters() if n.endswith("weight"))
    network.zero_grad()
    network(torch.zeros(1, 3, 16, 16))[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


def test_a_case_does_not_depend_on_the_others_of_its_batch() -> None:
    network, image = build(), random(2, 3, 16, 16)
    torch.testing.assert_close(network(image)[0][1:], network(image[1:])[0])


def test_modalities_share_no_weights_and_the_order_of_channels_counts() -> None:
    network, image = build(), random(1, 3, 16, 16)
    assert not torch.allclose(network(image)[0], network(image[:, [1, 0, 2]])[0], atol=1e-3)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_outputs_halve_from_full_resolution_down(dimensions: int) -> None:
    network = build(dimensions=dimensions, n_stages=3, features_per_stage=(4, 8, 8))
    size = (16, 24, 32)[-dimensions:]
    outputs = network(random(2, 3, *size))
    assert [tuple(o.shape) for o in outputs] == [(2, 2, *(s // f for s in size)) for f in (1, 2, 4)]
    network.decoder.deep_supervision = False
    assert torch.equal(network(random(2, 3, *size)), outputs[0])


def names_of(rules: ScopeRules, network: MUNet) -> set[str]:
    own = named_tensors(network)
    split = Partition(rules, shapes(own), modality="MR", channels=["A", "B", "C"], input_parameters=())
    assert set(split.wire_shapes) | split.personal == set(own)
    return set(split.personal)


@pytest.mark.parametrize(
    ("personal", "prefixes"),
    [
        ("none", ()),
        ("head", ("decoder.seg_layers.",)),
        ("head+last", ("decoder.seg_layers.", "decoder.stages.0.", "decoder.transpconvs.1.")),
        ("decoder", ("decoder.",)),
        ("all", ("",)),
    ],
)
def test_fedper_s_tops_are_found(personal: Any, prefixes: tuple[str, ...]) -> None:
    network = build()
    expected = {name for name in snapshot(network) if prefixes and name.startswith(prefixes)}
    assert names_of(FedPer(personal).scopes, network) == expected
    assert bool(expected) == (personal != "none")


def test_rules_of_fedavg_fedbn_and_fedcmt_cover_every_parameter() -> None:
    network = build(cmm_norm="pre_ln")
    assert names_of(ALL_SHARED, network) == set()
    norms = {n for n in snapshot(network) if n.split(".")[-2].startswith("norm")}
    assert names_of(FedBN.scopes, network) == norms
    assert {name.split(".")[-2] for name in norms} == {"norm", "norm1", "norm2"}
    assert names_of(ADAPTER_ENCODER_DECODER, network) == {n for n in snapshot(network) if n.startswith("decoder.")}


def test_names_are_parts_of_encoder_and_decoder_without_buffers_or_aliases() -> None:
    network = build(norm="group")
    assert {".".join(name.split(".")[:2]) for name in named_tensors(network)} == {
        *("encoder.stems", "encoder.stages", "encoder.fusions"),
        *("decoder.transpconvs", "decoder.stages", "decoder.seg_layers"),
    }
    assert set(network.state_dict()) == set(named_tensors(network))


def test_batch_norm_s_statistics_are_refused_by_what_reads_parameters() -> None:
    with pytest.raises(ParameterError, match=r"MUNet has buffers.*running_mean"):
        named_tensors(build(norm="batch"))


@pytest.mark.parametrize("size", [(12, 14), (10, 12)])
def test_a_patch_that_cannot_be_halved_is_refused_by_its_size(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"MUNet: patch \({size[0]}, {size[1]}\), expected multiples of 4 voxels"):
        build()(random(1, 3, *size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dimensions": 4}, r"dimensions is 4, expected one of \[2, 3\]"),
        ({"norm": "layer"}, "norm is 'layer', expected one of"),
        ({"cmm_norm": "post"}, "cmm_norm is 'post', expected one of"),
        ({"n_stages": 4}, r"n_stages is 4 and features_per_stage \[32, 64, 128, 256, 512\]"),
        ({"n_stages": 0, "features_per_stage": ()}, "expected at least 1 stage"),
        ({"stem_features": 12}, r"multiples of stem_features 12"),
        ({"strides": [[1, 1], [2, 2]]}, r"strides are \[\[1, 1\], \[2, 2\]\], expected \[\[1, 1\], \[2, 2\], \[2, 2\]"),
        ({"strides": [[1] * 3, *[[2] * 3] * 5]}, "in 2 dimensions"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"MUNet: .*{message}"):
        on_meta(**arguments)


def perfect(scales: int = 5) -> tuple[list[Tensor], list[Tensor]]:
    """All four labels at every scale, and logits that leave no doubt about them."""
    targets = [torch.arange(4.0).repeat(2, 1, 2 ** (scales - i), 2) for i in range(scales)]
    return [200 * functional.one_hot(t[:, 0].long(), 4).movedim(-1, 1).float() for t in targets], targets


def test_t13_perfect_logits_have_the_sum_of_the_weights() -> None:
    assert float(published_loss(*perfect())) == pytest.approx(-1.9375, abs=1e-6)


def test_t13_each_scale_counts_half_of_the_one_above() -> None:
    logits, targets = perfect()
    best = published_loss(logits, targets)
    spoilt = [published_loss([*logits[:i], 0 * logits[i], *logits[i + 1 :]], targets) - best for i in range(5)]
    # Equal chances for four labels of equal size: cross-entropy ln 4, and Dice 2 * 1/16 / (1/4 + 1/4) = 1/4, not 1.
    each = torch.tensor(4.0).log() + 3 / 4
    torch.testing.assert_close(torch.stack(spoilt), each / torch.tensor([1.0, 2, 4, 8, 16]), rtol=1e-4, atol=1e-6)


def test_dice_counts_the_batch_at_once_and_not_the_background() -> None:
    """The second case has no foreground: alone its Dice would be 0, here what it predicts is part of one sum."""
    target = torch.tensor([[[1.0, 1, 0, 0]], [[0.0, 0, 0, 0]]])
    chance = torch.tensor([[0.75, 0.75, 0.25, 0.25], [0.25] * 4])
    logits = torch.stack((torch.zeros(2, 4), torch.logit(chance)), dim=1)
    entropy = -torch.log(torch.tensor(0.75))
    dice = (2 * 1.5 + 1e-5) / (2 * 1.5 + (0.5 + 1.0) + 0.5 + 1e-5)
    assert float(published_loss([logits], [target])) == pytest.approx(float(entropy) - dice, abs=1e-6)


def test_half_precision_is_summed_in_single() -> None:
    logits = [random(1, 4, 300, 300).half()]
    target = [torch.zeros(1, 1, 300, 300)]
    assert published_loss(logits, target).dtype == torch.float32
    torch.testing.assert_close(published_loss(logits, target), published_loss([logits[0].float()], target))


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        ([(1, 4, 8, 8)], [], "logits at 1 scales and targets at 0"),
        ([], [], "at least one"),
        ([(1, 4, 8, 8)], [(1, 1, 8, 4)], r"target \(1, 1, 8, 4\) for logits \(1, 4, 8, 8\)"),
        ([(1, 4, 8, 8)], [(1, 4, 8, 8)], "one label per voxel"),
    ],
)
def test_scales_that_do_not_pair_up_are_named(
    logits: Sequence[tuple[int, ...]], targets: Sequence[tuple[int, ...]], message: str
) -> None:
    with pytest.raises(ValueError, match=f"published_loss: .*{message}"):
        published_loss([torch.zeros(size) for size in logits], [torch.zeros(size) for size in targets])
