"""Views of dense and packed images: dispatch, memory layout, replay, refusals."""

import copy
import dataclasses
import importlib

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from simclr_kernels import reference
from simclr_kernels.augment import augment, image_sizes, two_views
from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.packed_images import PackedImages
from simclr_kernels.params import AugmentParams, sample_params

# the package's attribute of that name is the function
module = importlib.import_module("simclr_kernels.augment")

# every operation happens to some image of a batch
BUSY = AugmentConfig(size=24, solarize=(0.3, 0.3), mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))


def dense_images(B=40, height=30, width=26):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (B, height, width, 3), dtype=torch.uint8, generator=generator)


def ragged_images():
    sizes = [(1, 1), (30, 26), (7, 50), (64, 3), (24, 24), (2, 1)] * 4
    return [dense_images(1, *size)[0] for size in sizes]


def params_of(images, config=BUSY, **counter):
    packed = isinstance(images, PackedImages)
    sizes = images.sizes if packed else torch.tensor([images.shape[1:3]]).expand(len(images), 2)
    counter = dict(seed=3, epoch=0, index=torch.arange(len(images)), view=0) | counter
    return sample_params(config, sizes, **counter)


def test_a_view_is_that_of_the_reference():
    images = dense_images()
    params = params_of(images)
    truth = reference.augment(images, params, BUSY, torch.float64)
    # of pixels divided by std 0.2
    assert (augment(images, params, BUSY) - truth).abs().max() < 5e-5


def test_the_same_params_give_the_same_pixels_again():
    images = dense_images()
    params = params_of(images)
    stored = copy.deepcopy(params)
    assert torch.equal(augment(images, params, BUSY), augment(images, stored, BUSY))


@pytest.mark.parametrize("pixels", [1, 5000, 1 << 30])
def test_the_size_of_the_pieces_does_not_matter(monkeypatch, pixels):
    packed = PackedImages.from_images(ragged_images())
    images = dense_images()
    expected = [augment(x, params_of(x), BUSY) for x in (images, packed)]
    monkeypatch.setattr(module, "PIECE_PIXELS", pixels)
    monkeypatch.setattr(module, "GPU_PIECE_PIXELS", pixels)
    for x, view in zip((images, packed), expected, strict=True):
        assert torch.equal(augment(x, params_of(x), BUSY), view)


def test_an_image_gets_the_same_view_alone_and_in_a_batch():
    images = dense_images()
    params = params_of(images)
    views = augment(images, params, BUSY)
    for i in (0, 7, 39):
        alone = augment(images[i : i + 1], params[i], BUSY)
        assert torch.equal(alone[0], views[i])


def test_packed_images_give_the_views_of_dense_ones():
    images = dense_images()
    packed = PackedImages.from_images(list(images.numpy()))
    params = params_of(images)
    assert torch.equal(augment(packed, params, BUSY), augment(images, params, BUSY))


def test_packed_images_of_different_sizes_equal_single_images():
    images = ragged_images()
    packed = PackedImages.from_images(images)
    params = params_of(packed)
    views = augment(packed, params, BUSY)
    for i, image in enumerate(images):
        assert torch.equal(views[i], augment(image[None], params[i], BUSY)[0])


def test_an_image_of_one_pixel_becomes_a_flat_view():
    images = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    identity = AugmentParams.identity(torch.tensor([[1, 1]]))
    view = augment(images, identity, AugmentConfig(size=16))
    expected = torch.tensor([1.0, 0.0, 0.2]).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    assert torch.allclose(view, expected, atol=1e-7)


def test_identity_of_the_same_size_returns_the_pixels():
    images = dense_images(3, 24, 24)
    for mode in ("multiply", "add"):
        identity = AugmentParams.identity(torch.tensor([[24, 24]]).expand(3, 2), mode)
        view = augment(images, identity, AugmentConfig(size=24, brightness_mode=mode))
        assert torch.equal(view, images.permute(0, 3, 1, 2) * (1 / 255))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_views_are_float32_views_rounded_once(dtype):
    images = dense_images()
    params = params_of(images)
    view = augment(images, params, BUSY, dtype)
    assert view.dtype == dtype
    assert torch.equal(view, augment(images, params, BUSY).to(dtype))


def test_float64_views_are_computed_in_float64():
    images = dense_images()
    params = params_of(images)
    view = augment(images, params, BUSY, torch.float64)
    assert torch.equal(view, reference.augment(images, params, BUSY, torch.float64))
    single = augment(images, params, BUSY)
    assert 0 < (view - single).abs().max() < 2e-5


def test_channels_last_changes_the_layout_only():
    images = dense_images()
    params = params_of(images)
    view = augment(images, params, BUSY, memory_format=torch.channels_last)
    assert view.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(view, augment(images, params, BUSY))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_two_views_are_view_major(memory_format):
    images = dense_images()
    index = torch.arange(100, 140)
    views = two_views(
        images,
        BUSY,
        seed=3,
        epoch=2,
        index=index,
        dtype=torch.float16,
        memory_format=memory_format,
    )
    assert views.shape == (80, 3, 24, 24) and views.is_contiguous(memory_format=memory_format)
    for view in (0, 1):
        params = params_of(images, epoch=2, index=index, view=view)
        expected = augment(images, params, BUSY, torch.float16)
        assert torch.equal(views[view * 40 : view * 40 + 40], expected)


def test_an_empty_batch_gives_no_views():
    images = dense_images(4)[:0]
    assert augment(images, params_of(images), BUSY).shape == (0, 3, 24, 24)
    none = torch.arange(0)
    assert two_views(images, BUSY, seed=0, epoch=0, index=none).shape == (0, 3, 24, 24)
    assert len(PackedImages.from_images([])) == 0


def test_views_of_a_constant_image_stay_in_range():
    config = dataclasses.replace(BUSY, mean=None, std=None)
    images = torch.full((50, 30, 30, 3), 255, dtype=torch.uint8)
    views = augment(images, params_of(images, config), config)
    assert views.min() >= 0 and views.max() <= 1


def test_packed_images_hand_out_the_images_they_were_made_of():
    images = ragged_images()
    packed = PackedImages.from_images([np.asarray(image) for image in images])
    assert len(packed) == len(images)
    for i, image in enumerate(images):
        assert torch.equal(packed[i], image)
    assert packed[1].data_ptr() == packed.buffer.data_ptr() + packed.offsets[1]
    some = packed.to("cpu").take(torch.tensor([3, 1]))
    assert torch.equal(some[0], images[3]) and torch.equal(some[1], images[1])
    assert some.buffer.data_ptr() == packed.buffer.data_ptr()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"buffer": torch.zeros(30)}, TypeError, r"buffer must be uint8, got torch.float32"),
        ({"offsets": torch.zeros(2).int()}, TypeError, r"offsets must be int64, got torch.int32"),
        ({"sizes": torch.ones(2, 2)}, TypeError, r"sizes must be int32 or int64"),
        ({"sizes": torch.ones(3, 2).int()}, ValueError, r"got \(30,\), \(2,\) and \(3, 2\)"),
        ({"sizes": torch.tensor([[2, 2], [0, 3]])}, ValueError, r"image 1 is empty: 0x3"),
        (
            {"offsets": torch.tensor([0, 19])},
            ValueError,
            r"image 1 reaches outside the buffer of 30 bytes: offset 19, 2x2 pixels",
        ),
        ({"offsets": torch.tensor([-1, 0])}, ValueError, r"image 0 reaches outside"),
        ({"sizes": torch.tensor([[2, 2], [1 << 40, 1 << 40]])}, ValueError, r"image 1 reaches"),
        (
            {"buffer": torch.zeros(60, dtype=torch.uint8)[::2]},
            ValueError,
            r"buffer must be contiguous, got stride \(2,\)",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_pack_that_reads_outside_its_buffer_cannot_be_made(change, error, message):
    arguments = dict(
        buffer=torch.zeros(30, dtype=torch.uint8),
        offsets=torch.tensor([0, 18]),
        sizes=torch.tensor([[2, 3], [2, 2]]),
    )
    PackedImages(**arguments)
    with pytest.raises(error, match=message):
        PackedImages(**(arguments | change))


@pytest.mark.filterwarnings("error")
def test_read_only_and_mirrored_arrays_can_be_packed():
    image = dense_images(1)[0].numpy()
    frozen = image.copy()
    frozen.flags.writeable = False
    packed = PackedImages.from_images([frozen, image[:, ::-1]])
    assert np.array_equal(packed[0], image) and np.array_equal(packed[1], image[:, ::-1])


def test_images_that_cannot_be_packed_are_refused():
    with pytest.raises(TypeError, match=r"images must be uint8, got torch.float32 for image 1"):
        PackedImages.from_images([dense_images(1)[0], torch.zeros(2, 2, 3)])
    with pytest.raises(ValueError, match=r"must be \(height, width, 3\), got \(4, 4\) for image 0"):
        PackedImages.from_images([torch.zeros(4, 4, dtype=torch.uint8)])


@pytest.mark.parametrize(
    "images, error, message",
    [
        (torch.zeros(40, 30, 26, 3), TypeError, r"images must be uint8, got torch.float32"),
        (dense_images().permute(0, 3, 1, 2), ValueError, r"got \(40, 3, 30, 26\)"),
        (dense_images()[:, :0], ValueError, r"with pixels, got \(40, 0, 26, 3\)"),
        (dense_images()[0], ValueError, r"images must be \(B, height, width, 3\)"),
        ([dense_images()[0]], TypeError, r"images must be a tensor or PackedImages, got list"),
        (dense_images(39), ValueError, r"as many images as there are: 39, got 40"),
    ],
    ids=["float", "planes first", "no pixels", "one image", "a list", "another count"],
)
def test_images_of_another_kind_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        augment(images, params_of(dense_images()), BUSY)


def test_a_dtype_that_is_not_floating_is_refused():
    images = dense_images()
    with pytest.raises(TypeError, match=r"dtype must be one of .*, got torch.uint8"):
        augment(images, params_of(images), BUSY, torch.uint8)
    with pytest.raises(TypeError, match=r"dtype must be one of .*, got torch.int32"):
        two_views(images, BUSY, seed=0, epoch=0, index=torch.arange(40), dtype=torch.int32)


@pytest.mark.parametrize(
    "crop", [[-1, 0, 4, 4], [0, 0, 31, 4], [0, 23, 4, 4], [0, 0, 0, 4], [2**31 - 1, 0, 4, 4]]
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_crop_outside_its_image_is_refused(crop, packed):
    images = dense_images(2)
    params = AugmentParams.identity(torch.tensor([[30, 26]]).expand(2, 2))
    params = dataclasses.replace(
        params, crop=torch.tensor([[0, 0, 30, 26], crop], dtype=torch.int32)
    )
    message = (
        rf"the crop of image 1 must lie inside its 30x26 pixels .* got y {crop[0]}, x {crop[1]}"
    )
    with pytest.raises(ValueError, match=message):
        augment(PackedImages.from_images(images) if packed else images, params, BUSY)


def test_tensors_on_different_devices_are_refused():
    images = dense_images(2)
    with pytest.raises(ValueError, match=r"images and params must be on one device, got cpu and"):
        augment(images, params_of(images).to("meta"), BUSY)
    with pytest.raises(ValueError, match=r"images and index must be on one device, got cpu and"):
        two_views(images, BUSY, seed=0, epoch=0, index=torch.arange(2, device="meta"))


def test_layouts_that_views_do_not_have_are_refused():
    images = dense_images(2)
    for layout in (torch.preserve_format, torch.channels_last_3d):
        with pytest.raises(ValueError, match=f"memory_format must be torch.cont.* got {layout}"):
            augment(images, params_of(images), BUSY, memory_format=layout)


def test_sizes_of_images_on_a_device_are_made_there_without_a_copy():
    class Calls(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    called = []
    with Calls():
        sizes = image_sizes(torch.empty(2, 9, 7, 3, dtype=torch.uint8, device="meta"))
    assert sizes.device.type == "meta" and sizes.shape == (2, 2)
    # a copy from the host waits for a GPU
    assert torch.full in called and not {torch.tensor, torch.Tensor.to} & set(called)
    assert image_sizes(dense_images(2)).tolist() == [list(dense_images(2).shape[1:3])] * 2


def test_augment_on_a_device_asks_for_no_sizes(monkeypatch):
    def refuse(images):
        raise AssertionError("sizes are for the checks on a CPU")

    images, filled = dense_images(2), []
    monkeypatch.setattr(module, "image_sizes", refuse)
    monkeypatch.setattr(module, "_fill", lambda *arguments: filled.append(arguments))
    augment(images.to("meta"), params_of(images).to("meta"), BUSY)
    assert len(filled) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_gpu_gives_the_views_of_the_reference(packed):
    images = PackedImages.from_images(ragged_images()) if packed else dense_images()
    params = params_of(images)
    truth = augment(images, params, BUSY, torch.float64)
    view = augment(images.to("cuda"), params.to("cuda"), BUSY).cpu()
    assert (view - truth).abs().max() < 5e-5
