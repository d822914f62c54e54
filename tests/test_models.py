import math
import re

import numpy as np
import pytest
import torch
from conftest import shared_path
from torch import nn

from simclr_kernels import reference
from simclr_kernels.models import ResNet, SimCLR, SmallResNet, build_encoder, projection_head

# every network of golden/resnet_forward: encoder, head, moving statistics of first and last norm
GOLDEN = [
    pytest.param("r18_cifar", "resnet18-cifar", "v2", id="r18-cifar"),
    pytest.param("r18_imagenet64", "resnet18", "nonlinear", id="r18-imagenet"),
    pytest.param("r50_imagenet64", "resnet50", "v2", id="r50-imagenet"),
]


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())


def conv_and_norm_pairs(encoder):
    """(convolution, batch norm) in the order in which the original creates them."""
    yield encoder.conv1, encoder.bn1
    for group in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
        for block in group:
            if block.downsample is not None:
                yield block.downsample[0], block.downsample[1]
            yield block.conv1, block.bn1
            yield block.conv2, block.bn2
            if hasattr(block, "conv3"):
                yield block.conv3, block.bn3


def linear_and_norm_pairs(head):
    layers = [m for m in head if not isinstance(m, nn.ReLU)]
    return zip(layers[0::2], layers[1::2], strict=True)


def as_original(name, head):
    """Our network with the two things of the original that torchvision's ResNet has differently."""
    encoder = build_encoder(name)
    if isinstance(encoder.maxpool, nn.MaxPool2d):
        pad_right_and_bottom = nn.ConstantPad2d((0, 1, 0, 1), -math.inf)
        encoder.maxpool = nn.Sequential(pad_right_and_bottom, nn.MaxPool2d(3, 2))
    if name.startswith("resnet18"):
        projection = nn.Conv2d(64, 64, 1, bias=False)
        encoder.layer1[0].downsample = nn.Sequential(projection, nn.BatchNorm2d(64))
    return SimCLR(encoder, projection_head(head, encoder.feature_dim))


def golden_tensors(model, names):
    """Our tensor for each variable of the original, found by its creation index."""
    convs, conv_norms = zip(*conv_and_norm_pairs(model.encoder), strict=True)
    linears, linear_norms = zip(*linear_and_norm_pairs(model.head), strict=True)
    norms = conv_norms + linear_norms
    attribute = {
        "gamma": "weight",
        "beta": "bias",
        "moving_mean": "running_mean",
        "moving_variance": "running_var",
    }
    for name in names:
        layer, kind = name.removesuffix(":0").split("/")[-2:]
        digits = re.search(r"_(\d+)$", layer)
        i = int(digits[1]) if digits else 0
        if kind == "kernel":
            yield (convs if layer.startswith("conv2d") else linears)[i].weight
        else:
            yield getattr(norms[i], attribute[kind])


def to_original_layout(tensor):
    """(out, in, kh, kw) to (kh, kw, in, out) and (out, in) to (in, out)."""
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(tensor.dim(), (0,))
    return tensor.detach().permute(*axes).numpy()


def from_original_layout(array):
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, (0,))
    return torch.from_numpy(array).permute(*axes)


def fill_golden_weights(model, golden, tag):
    names = golden[f"{tag}_names"]
    shapes = golden[f"{tag}_shapes"]
    seed = int(golden[f"{tag}_seed"])
    with torch.no_grad():
        for i, tensor in enumerate(golden_tensors(model, names)):
            shape = [n for n in shapes[i] if n]
            z = np.random.RandomState((seed + i) % 2**31).standard_normal(shape)
            kind = names[i].removesuffix(":0").split("/")[-1]
            value = {
                "kernel": lambda z=z: z * math.sqrt(2 / np.prod(z.shape[:-1])),
                "gamma": lambda z=z: 0.8 + 0.1 * z,
                "beta": lambda z=z: 0.1 * z,
                "moving_mean": lambda z=z: 0.1 * z,
                "moving_variance": lambda z=z: 1 + 0.2 * np.abs(z),
            }[kind]()
            tensor.copy_(from_original_layout(value.astype(np.float32)))


def golden_images(golden, tag):
    b, s = golden[f"{tag}_x_shape"][:2]
    r = np.random.RandomState(int(golden[f"{tag}_x_seed"]))

    def up(a):
        return a.repeat(s // a.shape[1], 1).repeat(s // a.shape[2], 2)

    x = r.random_sample((b, 1, 1, 3)) + 0.8 * (up(r.random_sample((b, 4, 4, 3))) - 0.5)
    x = x + 0.4 * (up(r.random_sample((b, 16, 16, 3))) - 0.5)
    x = np.clip(x, 0, 1).astype(np.float32)
    np.testing.assert_array_equal(x[0], golden[f"{tag}_x_sample0"])
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def assert_close_to_maximum(actual, expected, share):
    """The largest difference is at most `share` of the largest expected magnitude."""
    actual = actual.detach().numpy() if isinstance(actual, torch.Tensor) else actual
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= share * np.abs(expected).max()


@pytest.mark.parametrize("tag, encoder, head", GOLDEN)
def test_network_agrees_with_the_original_in_inference_and_in_training(tag, encoder, head):
    golden = np.load(shared_path("golden/resnet_forward.npz"))
    model = as_original(encoder, head)
    fill_golden_weights(model, golden, tag)
    x = golden_images(golden, tag)

    stages = []
    last_of_stem = model.encoder.maxpool
    hooks = [
        module.register_forward_hook(lambda m, i, out: stages.append(out[0].permute(1, 2, 0)))
        for module in (last_of_stem, *(getattr(model.encoder, f"layer{i}") for i in (1, 2, 3, 4)))
    ]
    model.eval()
    with torch.no_grad():
        h = model.features(x)
        z = model.head(h)
    for hook in hooks:
        hook.remove()
    for i, stage in enumerate(stages):
        expected = golden[f"{tag}_eval_stage{i}_sample0"]
        assert_close_to_maximum(stage[..., :3], expected, 2e-5)
    assert_close_to_maximum(h, golden[f"{tag}_eval_hidden"], 3e-5)
    assert_close_to_maximum(z, golden[f"{tag}_eval_proj"], 3e-5)

    deep = tag.startswith("r50")
    model.train()
    before = [m.clone() for m in golden_tensors(model, golden[f"{tag}_moving_first_names"])]
    z = model(x)
    # the original adds the two directions: twice the paper's mean
    loss = 2 * reference.nt_xent(z, 0.5)
    loss.backward()
    assert_close_to_maximum(z, golden[f"{tag}_train_proj"], 1e-2 if deep else 5e-4)
    assert loss.item() == pytest.approx(
        float(golden[f"{tag}_train_loss_tau0p5"]), rel=1e-3 if deep else 5e-5
    )

    after = golden_tensors(model, golden[f"{tag}_moving_first_names"])
    rows = x.shape[0] * (x.shape[2] // (2 if "imagenet" in tag else 1)) ** 2
    kinds = ["first_mean", "first_var", "last_mean", "last_var"]
    for kind, old, new, n in zip(kinds, before, after, (rows, rows, 24, 24), strict=True):
        if kind.endswith("var"):
            # the original averages the biased variance, torch the unbiased one
            new = 0.9 * old + (new - 0.9 * old) * (n - 1) / n
        expected = golden[f"{tag}_moving_{kind}"]
        assert_close_to_maximum(new, expected, 1e-4 if deep else 1e-5)

    grad_names = golden[f"{tag}_grad_names"]
    norms = [p.grad.norm().item() for p in golden_tensors(model, grad_names)]
    np.testing.assert_allclose(norms, golden[f"{tag}_grad_norm"], rtol=5e-2)
    first = to_original_layout(model.encoder.conv1.weight.grad)
    assert_close_to_maximum(first, golden[f"{tag}_grad_first"], 0.2)
    *_, (last, _) = linear_and_norm_pairs(model.head)
    rows_of_last = to_original_layout(last.weight.grad)[:8]
    assert_close_to_maximum(rows_of_last, golden[f"{tag}_grad_last_kernel"], 5e-3)


def test_parameter_counts_are_those_of_the_original():
    info = np.load(shared_path("golden/resnet_info.npz"))
    for i, (depth, width) in enumerate(zip(info["depth"], info["width"], strict=True)):
        stem = "cifar" if info["cifar_stem"][i] else "imagenet"
        with torch.device("meta"):
            encoder = ResNet(int(depth), int(width), stem)
            head = projection_head("v2", encoder.feature_dim)
        statistics = [b for n, b in encoder.named_buffers() if "running" in n]
        # the original projects in the first group of ResNet-18/34 too: a 1x1 convolution and a norm
        w = 64 * int(width)
        shortcut = w * w + 2 * w if depth < 50 else 0
        assert encoder.feature_dim == info["feature_dim"][i]
        assert parameter_count(encoder) + shortcut == info["resnet_trainable"][i]
        assert (
            sum(b.numel() for b in statistics) + (2 * w if depth < 50 else 0)
            == (info["resnet_nontrainable"][i])
        )
        assert parameter_count(head) == info["proj_trainable"][i]


def test_state_dict_has_the_keys_and_shapes_of_torchvision():
    # read off torchvision.models.resnet18 and resnet50: number of entries without fc, and samples
    with torch.device("meta"):
        r18 = {k: tuple(v.shape) for k, v in ResNet(18).state_dict().items()}
        r50 = {k: tuple(v.shape) for k, v in ResNet(50).state_dict().items()}
        r152 = ResNet(152).state_dict()
    assert (len(r18), len(r50), len(r152)) == (120, 318, 930)
    assert r18["conv1.weight"] == (64, 3, 7, 7)
    assert r18["layer1.0.conv2.weight"] == (64, 64, 3, 3)
    assert r18["layer2.0.downsample.0.weight"] == (128, 64, 1, 1)
    assert "layer1.0.downsample.0.weight" not in r18
    assert r50["layer1.0.downsample.1.running_var"] == (256,)
    assert r50["layer3.5.conv3.weight"] == (1024, 256, 1, 1)
    assert r50["layer4.2.bn3.num_batches_tracked"] == ()
    assert "layer3.35.conv1.weight" in r152
    assert not any(key.startswith("fc") for key in r50)


def test_fresh_residual_blocks_are_the_identity_after_their_shortcut():
    torch.manual_seed(0)
    x = torch.rand(2, 64, 8, 8)
    block = ResNet(18).layer1[0].eval()
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)
    for module in ResNet(50).layer2:
        assert module.bn3.weight.abs().max() == 0
        assert module.bn2.weight.min() == 1


def test_convolutions_start_with_the_variance_of_he_for_their_fan_out():
    torch.manual_seed(0)
    weight = ResNet(18).layer4[1].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)


@pytest.mark.parametrize(
    "name, size, feature_dim",
    [
        pytest.param("small", 24, 96, id="small"),
        pytest.param("small-w32", 24, 128, id="small-w32"),
        pytest.param("resnet18-cifar", 32, 512, id="cifar-stem"),
        pytest.param("resnet34", 64, 512, id="imagenet-stem"),
        pytest.param("resnet18x2-cifar", 32, 1024, id="wide"),
        pytest.param("resnet50", 33, 2048, id="odd-size"),
    ],
)
def test_encoder_by_name_gives_pooled_features_in_any_memory_format(name, size, feature_dim):
    torch.manual_seed(0)
    encoder = build_encoder(name).eval()
    x = torch.rand(2, 3, size, size)
    with torch.no_grad():
        h = encoder(x)
        h_last = encoder.to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last)
        )
    assert encoder.feature_dim == feature_dim
    assert h.shape == (2, feature_dim)
    torch.testing.assert_close(h_last, h, rtol=1e-4, atol=1e-4 * h.abs().max().item())


def test_small_encoder_has_about_170_thousand_parameters():
    assert parameter_count(build_encoder("small")) == 173_304


@pytest.mark.parametrize(
    "kind, linears, out_dim", [("linear", 1, 5), ("nonlinear", 2, 5), ("v2", 3, 5)]
)
def test_head_ends_in_a_norm_that_scales_but_does_not_shift(kind, linears, out_dim):
    torch.manual_seed(0)
    head = projection_head(kind, 16, 8, out_dim)
    z = head(torch.randn(64, 16))
    assert z.shape == (64, out_dim)
    assert sum(isinstance(m, nn.Linear) for m in head) == linears
    assert all(m.bias is None for m in head if isinstance(m, nn.Linear))
    assert head[-1].bias is None
    # unit gain and no shift: every column of a training batch has mean 0
    torch.testing.assert_close(z.mean(0), torch.zeros(out_dim), rtol=0, atol=1e-5)
    assert all(m.bias is not None for m in head[:-1] if isinstance(m, nn.BatchNorm1d))


def test_head_weights_start_with_standard_deviation_0_01():
    torch.manual_seed(0)
    head = projection_head("nonlinear", 512)
    assert head[0].weight.shape == (512, 512)
    assert head[0].weight.std().item() == pytest.approx(0.01, rel=0.01)


def test_head_survives_conversion_to_synchronised_norm():
    head = nn.SyncBatchNorm.convert_sync_batchnorm(projection_head("nonlinear", 16))
    assert list(head.state_dict()) == list(projection_head("nonlinear", 16).state_dict())


def test_identity_head_returns_the_features():
    model = SimCLR(SmallResNet(4), projection_head("identity", 16)).eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model(x), model.features(x))


def test_bfloat16_autocast_runs_forward_and_backward():
    model = SimCLR(SmallResNet(8), projection_head("nonlinear", 32, 16, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = model(torch.rand(4, 3, 16, 16))
    z.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build_encoder("resnet51"), "encoder must be one of small, .*got 'resnet51'"),
        (lambda: ResNet(20), "depth must be one of 18, 34, 50, 101, 152, got 20"),
        (lambda: ResNet(18, width=0), "width must be at least 1, got 0"),
        (lambda: SmallResNet(0), "width must be at least 1, got 0"),
        (lambda: ResNet(18, stem="stl"), "stem must be 'imagenet' or 'cifar', got 'stl'"),
        (lambda: projection_head("mlp", 8), "head must be one of identity, .*got 'mlp'"),
    ],
)
def test_wrong_names_are_refused_with_the_valid_ones(call, message):
    with pytest.raises(ValueError, match=message):
        call()
