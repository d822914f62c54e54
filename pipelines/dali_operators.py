"""The two graphs of DALI operators: files to pixels, and pixels to views. The only user of DALI.

Both are driven by hand, one batch in, the same batch out: no iterator of DALI, hence no last-batch
policy, no reset, nothing prefetched beyond an epoch. External sources take memory without a copy;
outputs belong to the tensors made of them by DLPack and outlive the graph (DALI's default
executor), so they may be kept or copied at leisure.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simclr_kernels.augment_config import AugmentConfig
from simclr_kernels.params import AugmentParams

try:
    import nvidia.dali.math
    from nvidia.dali import Pipeline, fn, types
    from nvidia.dali.backend import ReleaseUnusedMemory
except ImportError as error:
    raise ImportError(
        f"DALIViews needs NVIDIA DALI: pip install simclr-kernels[dali] ({error})"
    ) from error

KEPT_GRAPHS = 4


def new_graph(batch_size: int, threads: int, device: torch.device) -> Pipeline:
    """An empty graph of DALI whose outputs are those of the batch that was fed last."""
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    return Pipeline(
        batch_size=batch_size, num_threads=threads, device_id=device_id, prefetch_queue_depth=1
    )


def free_memory() -> None:
    """Gives what DALI's pools hold and nobody uses back to the system."""
    ReleaseUnusedMemory()


class UndecodableBatch(ValueError):
    """DALI has refused an image, and with it the whole batch."""


class DecodeOperators:
    """Decodes whole files, on the GPU by nvJPEG where the device is one.

    Args:
        batch_size: largest number of files at once.
        threads: of DALI's own pool.
        device: where the pixels lie.
    """

    def __init__(self, batch_size: int, threads: int, device: torch.device):
        self.batch_size, self.threads, self.device = batch_size, threads, device
        self._graph = None

    def __call__(self, files: list[bytes]) -> list[Tensor]:
        """(H, W, 3) uint8 of each file, RGB, upright; complete when this returns.

        Raises:
            UndecodableBatch: one of the files is damaged.
        """
        graph = self._graph or self._built()
        self._graph = None  # until this batch has gone well: DALI calls a failed graph invalid
        graph.feed_input("files", [np.frombuffer(data, np.uint8) for data in files])
        try:
            (images,) = graph.run()
        except RuntimeError as error:
            if "Failed to decode sample" in str(error) or "nvImageCodec failure" in str(error):
                raise UndecodableBatch(str(error)) from error
            raise
        self._graph = graph
        return [torch.from_dlpack(image) for image in images]

    def _built(self) -> Pipeline:
        graph = new_graph(self.batch_size, self.threads, self.device)
        with graph:
            files = fn.external_source(name="files", ndim=1, dtype=types.UINT8, no_copy=True)
            options = {"device": "cpu"}
            if self.device.type == "cuda":
                # the chroma of the CPU's decoder; and no share of a batch that is decoded by other
                # means than the rest, since pixels must not depend on the batch
                options = {"device": "mixed", "jpeg_fancy_upsampling": True, "hw_decoder_load": 1.0}
            graph.set_outputs(fn.decoders.image(files, output_type=types.RGB, **options))
        graph.build()
        return graph

    def close(self) -> None:
        """Ends the threads; a later call starts them again."""
        self._graph = None


class ViewOperators:
    """One view of each image by DALI's operators. See dali_augment.

    A graph is built when it is needed: for a number of images, a size and a set of operations.

    Args:
        threads: of DALI's own pool.
        device: of the images and the views.
    """

    def __init__(self, threads: int, device: torch.device):
        self.threads, self.device = threads, device
        self._graphs: dict[tuple, Pipeline] = {}

    def __call__(
        self, images: list[Tensor], params: AugmentParams, config: AugmentConfig
    ) -> Tensor:
        """(B, 3, S, S) float32 of (H, W, 3) uint8 images; params on the CPU."""
        radius = config.size // 10 // 2
        blurs = radius > 0 and bool((params.sigma_px > 0).any())
        solarizes = bool((params.solarize < 1).any())
        adds = config.brightness_mode == "add"
        key = (len(images), config.size, adds, blurs, solarizes, config.mean, config.std)
        graph = self._graphs.pop(key, None) or self._built(*key)
        inputs = {
            "start": params.crop[:, :2],
            "shape": params.crop[:, 2:],
            "mirror": params.flip.int(),
            "brightness": params.brightness,
            "contrast": params.contrast,
            # before brightness and contrast as after them: all three are linear
            "saturation": params.saturation * ~params.grayscale,
            "hue": params.hue_turns * 360,
        }
        if blurs:
            off = params.sigma_px <= 0
            inputs["sigma"] = params.sigma_px.masked_fill(off, 1.0)
            # a window of one pixel is the identity; sigma 0 would mean "by the window"
            inputs["window"] = torch.full_like(off, 2 * radius + 1, dtype=torch.int32)
            inputs["window"].masked_fill_(off, 1)
        if solarizes:
            inputs["solarize"] = params.solarize
        stream = None
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
        else:
            images = [image.numpy() for image in images]
        graph.feed_input("images", images, cuda_stream=stream)
        arrays = {name: value.contiguous().numpy() for name, value in inputs.items()}
        for name, value in arrays.items():
            graph.feed_input(name, value)
        (views,) = graph.run(stream)
        self._graphs[key] = graph
        if len(self._graphs) > KEPT_GRAPHS:
            del self._graphs[next(iter(self._graphs))]
        return torch.from_dlpack(views.as_tensor())

    def _built(self, batch_size, size, adds, blurs, solarizes, mean, std) -> Pipeline:
        graph = new_graph(batch_size, self.threads, self.device)
        with graph:
            device = "gpu" if self.device.type == "cuda" else "cpu"
            planes = fn.external_source(
                name="images", device=device, layout="HWC", dtype=types.UINT8, no_copy=True
            )
            planes = fn.slice(planes, _input("start"), _input("shape"), axes=[0, 1])
            planes = fn.resize(
                planes,
                size=[size, size],
                interp_type=types.INTERP_CUBIC,
                antialias=False,
                dtype=types.FLOAT,
            )
            planes = planes * np.float32(1 / 255)
            brightness = _input("brightness")
            if adds:
                planes, brightness = planes + brightness, 1.0
            planes = fn.color_twist(
                planes,
                brightness=brightness,
                contrast=_input("contrast"),
                saturation=_input("saturation"),
                hue=_input("hue"),
            )
            planes = nvidia.dali.math.clamp(planes, 0.0, 1.0)
            if blurs:
                planes = fn.gaussian_blur(
                    planes, sigma=_input("sigma"), window_size=_input("window")
                )
            if solarizes:
                threshold = _input("solarize")
                inverts = (planes >= threshold) * (threshold < 1.0)
                planes = planes + fn.cast(inverts, dtype=types.FLOAT) * (1.0 - 2.0 * planes)
            # last, where it costs nothing: no operation above knows left from right
            planes = fn.crop_mirror_normalize(
                planes,
                mirror=_input("mirror"),
                mean=list(mean or (0.0,)),
                std=list(std or (1.0,)),
                output_layout="CHW",
            )
            graph.set_outputs(planes)
        graph.build()
        return graph

    def close(self) -> None:
        """Ends the threads; a later call starts them again."""
        self._graphs.clear()


def _input(name: str):
    """One value per image, from the CPU: DALI takes arguments of operators from nowhere else."""
    return fn.external_source(name=name, no_copy=True)
