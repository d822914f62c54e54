"""The GPU kernels of the views: in Triton's interpreter, or on a GPU.

Their machine code for real GPUs: test_codegen.py.
"""

import sys
from dataclasses import replace
from itertools import permutations

import pytest
import torch

pytest.importorskip("triton")

from golden_arrays import largest_difference, whole_view
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction
from triton_views import (
    DEVICE,
    assert_close_to_the_reference,
    by_kernels,
    images_of,
    params_of,
)

import simclr_kernels
from benchmarks import codegen, view_calls
from simclr_kernels import augment_sample_triton, augment_triton
from simclr_kernels.augment import two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import (
    KERNEL_ARRAYS,
    AugmentParams,
    sample_params,
    sample_params_in_torch,
    triton_views,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("fresh_memory_holds_nan"),
]

PRESETS = {
    "simclr": AugmentConfig.simclr(24),
    "simclr_v1": AugmentConfig.simclr_v1(24),
    "cifar10": AugmentConfig.cifar10(),
    "byol": AugmentConfig.byol(24),
    "moco_v2": AugmentConfig.moco_v2(24),
    "torchvision": AugmentConfig.torchvision(24),
}
SIZES = ((30, 41), (33, 26))
# every operation happens to every image
BUSY = AugmentConfig(
    size=40,
    jitter=1.0,
    grayscale=0.0,
    blur=(1.0, 1.0),
    solarize=(1.0, 1.0),
    mean=(0.4, 0.5, 0.6),
    std=(0.5, 0.6, 0.7),
)


@pytest.fixture
def one_tile(monkeypatch):
    """Whole views in one tile of the second pass, which the interpreter takes fastest."""
    tiles = augment_triton.TILES[-1]._replace(
        STRIP=128, ROWS=128, COLUMNS=128, color_rows=128, color_block=16384, blur_block=16384
    )
    monkeypatch.setattr(augment_triton, "TILES", [tiles])


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_that_of_the_reference(name):
    config, images = PRESETS[name], images_of(*SIZES)
    view = 1 if name == "byol" else 0
    assert_close_to_the_reference(images, params_of(images, config, view), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels last"])
def test_every_dtype_and_memory_format_takes_all_passes(dtype, channels_last, one_tile):
    images = images_of(*SIZES)
    params = params_of(images, BUSY)
    params = replace(params, sigma_px=torch.tensor([1.3, 0.0]))
    assert_close_to_the_reference(images, params, BUSY, dtype, channels_last=channels_last)


def test_shipped_tiles_cut_a_view_and_give_the_same(one_tile):
    images = images_of((57, 90))
    params = params_of(images, BUSY)
    expected = by_kernels(images, params, BUSY, channels_last=True)
    tiles = augment_triton.TILES[0]._replace(
        STRIP=32, ROWS=16, COLUMNS=32, color_rows=32, color_block=1024, blur_block=1024
    )
    augment_triton.TILES[:] = [tiles]
    found = by_kernels(images, params, BUSY, channels_last=True)
    # the sums of the channels are added in another order
    assert (found - expected).abs().max() < 2e-6


@pytest.mark.parametrize("first", range(4))
def test_every_order_of_the_colors_is_that_of_the_reference(first):
    orders = [order for order in permutations(range(4)) if order[0] == first]
    config, images = AugmentConfig.simclr(8), images_of(*[(8, 8)] * len(orders))
    params = replace(
        params_of(images, replace(config, jitter=1.0)),
        order=torch.tensor(orders, dtype=torch.int8),
    )
    assert_close_to_the_reference(images, params, config)


def test_neutral_colors_are_skipped_with_their_clip(one_tile):
    images = images_of(*[(9, 9)] * 5)
    params = AugmentParams.identity(images.sizes.cpu())
    value = torch.tensor([1.0, 1.5, 1.0, 1.0, 1.0])
    params = replace(
        params,
        brightness=value,
        contrast=value.roll(1),
        saturation=value.roll(2),
        hue_turns=value.roll(3) - 1,
        order=torch.tensor([[1, 3, 0, 2]] * 5, dtype=torch.int8),
    )
    assert_close_to_the_reference(images, params, AugmentConfig.simclr(24))


@pytest.mark.parametrize("size", [5, 24])
def test_sources_of_any_size_and_place_in_memory(size):
    sizes = ((1, 1), (2, 3), (1, 700), (5, 4), (3, 1))
    config, images = AugmentConfig(size=size, jitter=0.0), images_of(*sizes)
    params = AugmentParams.identity(images.sizes.cpu())
    params = replace(params, flip=torch.arange(len(sizes)) % 2 == 1)
    assert_close_to_the_reference(images, params, config)
    if size == 24:
        return
    # images that begin at other bytes of a word
    buffer = torch.cat([images.buffer.new_full((1,), 255), images.buffer])
    moved = PackedImages(buffer[1:], images.offsets, images.sizes)
    assert torch.equal(by_kernels(moved, params, config), by_kernels(images, params, config))


def test_narrow_crops_read_nothing_from_outside_of_them():
    images = images_of((20, 30), (20, 30), (20, 30))
    crop = torch.tensor([[3, 28, 5, 2], [19, 0, 1, 1], [7, 11, 2, 3]], dtype=torch.int32)
    params = replace(AugmentParams.identity(images.sizes.cpu()), crop=crop)
    for i, (y, x, height, width) in enumerate(crop.tolist()):
        images[i][:y] = images[i][y + height :] = 255
        images[i][:, :x] = images[i][:, x + width :] = 255
    assert_close_to_the_reference(images, params, AugmentConfig(size=16))


def test_a_crop_outside_of_its_image_reads_only_the_image():
    config, params = AugmentConfig(size=8), AugmentParams.identity(torch.tensor([[400, 900]]))
    inside = images_of((6, 5))
    values = []
    for around in (0, 255):
        pad = inside.buffer.new_full((4000,), around)
        buffer = torch.cat([pad, inside.buffer, pad])
        moved = PackedImages(buffer, inside.offsets + 4000, inside.sizes)
        values.append(by_kernels(moved, params, config))
    # where no pixel has a weight the view is NaN
    assert torch.allclose(*values, rtol=0.0, atol=0.0, equal_nan=True)


def test_a_large_source_and_a_large_view(one_tile):
    images = images_of((4000, 5000))
    params = params_of(images, AugmentConfig.simclr(64))
    assert_close_to_the_reference(images, params, AugmentConfig.simclr(64))


def test_dense_images_have_the_bits_of_packed_ones_and_of_any_batch():
    images = images_of(*[(30, 26)] * 3)
    dense = images.buffer.view(3, 30, 26, 3)
    config = AugmentConfig.simclr(24)
    params = params_of(images, config)
    views = by_kernels(images, params, config)
    assert torch.equal(by_kernels(dense, params, config), views)
    turned = torch.tensor([2, 0])
    assert torch.equal(by_kernels(images.take(turned), params[turned], config), views[turned])


def test_a_white_frame_darkens_under_the_blur_of_the_original(one_tile):
    images = PackedImages.from_images([torch.full((50, 50, 3), 255, dtype=torch.uint8)] * 3)
    sigma = torch.tensor([2.0, 0.1, 1e-30])
    params = replace(AugmentParams.identity(images.sizes), sigma_px=sigma)
    assert_close_to_the_reference(images.to(DEVICE), params, AugmentConfig(size=64))


@pytest.mark.parametrize("group, size, tolerance", [("s96", 96, 5e-6), ("s96v1", 96, 2e-5)])
def test_views_are_those_of_tensorflow(golden, group, size, tolerance, one_tile):
    arrays = golden("full_view")
    for k in range(2):
        images, params, config, expected = whole_view(arrays, group, size, k)
        view = by_kernels(images.to(DEVICE), params, config)
        assert largest_difference(view[0].cpu(), expected) < tolerance


SAMPLED = {
    "simclr": AugmentConfig.simclr(),
    "byol, whole images": replace(AugmentConfig.byol(), crop=False),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_params_have_the_bits_of_the_torch_code(name, monkeypatch):
    if DEVICE == "cpu":
        # few programs, the last of them ragged
        monkeypatch.setattr(augment_sample_triton, "BLOCK", 512)
    config = SAMPLED[name]
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(200, 3000, (600, 1), generator=generator).repeat(1, 2)
    # of shapes for which a few attempts are enough
    sizes[:, 1] += sizes[:, 0] * torch.randint(-4, 8, (600,), generator=generator) // 12
    sizes[:3] = torch.tensor([[32, 32], [65535, 65521], [31, 40]])
    index = torch.randint(0, 1 << 32, (600,), generator=generator)
    for view, seed, epoch in ((0, 0, 0), (1, (1 << 64) - 1, (1 << 32) - 1)):
        expected = sample_params_in_torch(config, sizes, seed, epoch, index, view)
        given = torch.tensor([epoch], device=DEVICE) if view else epoch
        found = augment_triton.sample_params(
            config, sizes.to(DEVICE, torch.int32), seed, given, index.to(DEVICE), view
        )
        for name, (dtype, *_) in KERNEL_ARRAYS.items():
            own = getattr(found, name).cpu()
            assert own.dtype == dtype and torch.equal(own, getattr(expected, name)), name


def test_an_image_that_no_crop_fits_is_taken_whole_after_all_attempts():
    config, index = AugmentConfig.simclr(), torch.tensor([3], device=DEVICE)
    sizes = torch.tensor([[60, 1200]], device=DEVICE)
    params = augment_triton.sample_params(config, sizes, 0, 0, index, 0)
    assert params.crop.tolist() == [[0, 0, 60, 1200]]


def test_both_views_of_a_batch_have_the_params_of_their_view():
    images = images_of(*[(24, 30)] * 2)
    dense = images.buffer.view(2, 24, 30, 3)
    index = torch.tensor([7, 1 << 31])
    for config in (AugmentConfig.byol(8), AugmentConfig.moco_v2(8)):
        views = torch.empty(4, 3, 8, 8, device=DEVICE)
        augment_triton.fill_two_views(views, dense, config, 5, 2, index.to(DEVICE))
        for view in range(2):
            counter = {"seed": 5, "epoch": 2, "index": index, "view": view}
            params = sample_params(config, images.sizes.cpu(), **counter)
            own = views[2 * view : 2 * view + 2]
            assert torch.equal(by_kernels(dense, params, config), own)


class Operators(TorchDispatchMode):
    """Names of the torch operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("config", "launches"),
    [
        (AugmentConfig.simclr(224), 4),
        (AugmentConfig.byol(96), 4),
        (AugmentConfig.cifar10(), 2),
        (AugmentConfig.simclr(40, 0.5), 4),
    ],
    ids=["224", "byol at 96", "cifar10", "40"],
)
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_both_views_take_at_most_four_launches_and_no_operator_that_launches(
    config, launches, packed, monkeypatch
):
    started = []
    kernel = InterpretedFunction if DEVICE == "cpu" else JITFunction
    monkeypatch.setattr(kernel, "run", lambda self, *args, **options: started.append(self))
    images = images_of(*[(40, 50)] * 3)
    if not packed:
        images = images.buffer.view(3, 40, 50, 3)
    index = torch.arange(3, device=DEVICE)
    epoch = torch.zeros((), dtype=torch.int64, device=DEVICE)
    torch.use_deterministic_algorithms(False)
    for dtype in augment_triton.DTYPES:
        views = torch.empty(6, 3, config.size, config.size, dtype=dtype, device=DEVICE)
        started.clear()
        with Operators() as operators:
            augment_triton.fill_two_views(views, images, config, 0, epoch, index)
        assert len(started) == launches <= 4
        # they make tensors and views of them: nothing is computed, copied, or read back
        assert operators.names <= {"empty", "unbind", "view", "slice", "select", "detach"}


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_batches_of_any_number_size_and_place_in_memory_share_their_machine_code(
    packed, monkeypatch
):
    forms = {}

    def note(kernel, *args, grid, warmup, **given):
        if DEVICE == "cpu":
            kernel = JITFunction(kernel.fn, **kernel.kwargs)
        launch = codegen.specialise("sm_90", view_calls.LARGE, kernel, args, given)
        forms.setdefault(kernel.__name__, set()).add(launch.identity())

    monkeypatch.setattr(InterpretedFunction if DEVICE == "cpu" else JITFunction, "run", note)
    for B, H, W, first in ((1, 1, 1, 0), (16, 32, 48, 0), (37, 40, 50, 1)):
        images = images_of(*[(H, W)] * (B + first)).take(slice(first, None))
        if not packed:
            images = images.buffer[first * 3 * H * W :].view(B, H, W, 3)[:, :, : W - first]
        index = torch.arange(B + first, device=DEVICE)[first:]
        views = torch.empty(2 * B, 3, 40, 40, device=DEVICE)
        augment_triton.fill_two_views(views, images, BUSY, 0, B, index)
    assert {name: len(found) for name, found in forms.items()} == dict.fromkeys(
        ("_sample_kernel", "_crop_kernel", "_color_kernel", "_blur_kernel"), 1
    )


@pytest.mark.parametrize("shape", [(26755, 26755), (1, 1 << 21)])
def test_images_that_32_bits_cannot_count_are_refused(shape):
    images = torch.zeros(1, dtype=torch.uint8, device=DEVICE).expand(1, *shape, 3)
    params = AugmentParams.identity(torch.tensor([shape]))
    message = rf"less than 2\^31 bytes and sides of less than 2097152 .*, got {shape[0]}x{shape[1]}"
    with pytest.raises(ValueError, match=message):
        by_kernels(images, params, BUSY)


@pytest.mark.gpu
def test_a_captured_graph_draws_another_epoch_when_its_tensor_is_advanced():
    images = images_of(*[(40, 50)] * 5)
    config, index = AugmentConfig.simclr(224), torch.arange(5, device=DEVICE)
    epoch = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def step(epoch):
        return two_views(images, config, seed=1, epoch=epoch, index=index, dtype=torch.float16)

    step(epoch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        views = step(epoch)
    for number in range(3):
        epoch.fill_(number)
        graph.replay()
        assert torch.equal(views, step(number))


@pytest.mark.gpu
def test_a_gpu_takes_the_kernels():
    images = images_of((40, 50), (33, 20))
    config, index = AugmentConfig.byol(96), torch.arange(2)
    found = two_views(images, config, seed=1, epoch=0, index=index.to(DEVICE))
    expected = two_views(images.to("cpu"), config, seed=1, epoch=0, index=index)
    assert (found.cpu() - expected).abs().max() * min(config.std) < 1e-5


def test_an_epoch_may_be_a_tensor_beside_the_index():
    images, index = images_of((9, 9)).to("cpu"), torch.arange(1)
    config = AugmentConfig.cifar10(16)
    given = {"seed": 1, "index": index}
    expected = two_views(images, config, epoch=3, **given)
    assert torch.equal(two_views(images, config, epoch=torch.tensor([3]), **given), expected)
    with pytest.raises(TypeError, match="must be int64, got torch.int32"):
        two_views(images, config, epoch=torch.tensor(3, dtype=torch.int32), **given)
    with pytest.raises(ValueError, match=r"one number on cpu, got shape \(2,\) on cpu"):
        two_views(images, config, epoch=torch.tensor([3, 4]), **given)


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "simclr_kernels.augment_triton", None)
    monkeypatch.delattr(simclr_kernels, "augment_triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "simclr_kernels.augment_triton")
    with pytest.raises(ImportError, match="views on a GPU need triton"):
        triton_views()
