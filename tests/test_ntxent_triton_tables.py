"""The kernels of the loss with the tiles that GPUs get, and at the edges of their padding.

In Triton's interpreter on a CPU; on a GPU with its own tiles only.
"""

import pytest
import torch

pytest.importorskip("triton")

from triton_loss import DEVICE, assert_close_to_the_reference, by_kernels, by_reference

from simclr_kernels import ntxent_rows_triton, ntxent_triton
from simclr_kernels.ntxent_tile_table import TABLES, WHOLE, choose
from simclr_kernels.testing import LossCase

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
    pytest.mark.usefixtures("fresh_memory_holds_nan"),
]

# what each has of its own: tiles taller than wide, chunks, products
CASES = [
    ("sm_80", torch.float32, "ieee", 16, 0.005),
    ("sm_80", torch.float32, "tf32", 16, 0.005),
    ("sm_80", torch.float16, "ieee", 300, 0.1),
    ("sm_90", torch.float32, "ieee", 1, 0.1),
    ("sm_90", torch.float16, "ieee", 128, 0.1),
    ("sm_90", torch.float16, "ieee", 200, 0.1),
    ("sm_90", torch.float32, "tf32", 128, 0.1),
    ("sm_100", torch.float16, "ieee", 128, 0.1),
    ("sm_100", torch.float32, "tf32", 300, 0.1),
    ("gfx942", torch.float16, "ieee", 64, 0.1),
]


@pytest.mark.skipif(DEVICE == "cuda", reason="a gpu has its own tiles")
@pytest.mark.parametrize(("target", "dtype", "precision", "features", "tau"), CASES)
def test_tiles_of_every_gpu_give_the_loss(target, dtype, precision, features, tau, monkeypatch):
    monkeypatch.setattr(ntxent_rows_triton, "architecture_of", lambda device: target)
    z = LossCase("", 130, features, tau, "pairs").z().to(dtype)
    loss, dz, _ = by_kernels(z, tau, precision=precision)
    truth = by_reference(z.double(), tau)
    exact = dtype == torch.float32 and precision == "ieee"
    bound = 2e-5 if exact else 2e-4 / tau
    # one feature has no gradient but rounding
    size = truth[1].norm() if features > 1 else (1 / (tau * z.norm(dim=1))).norm()
    assert (loss - truth[0]).norm() <= bound * truth[0].norm()
    assert (dz - truth[1]).norm() <= bound * size


def test_tiles_divide_the_padding_and_chunks_the_rows():
    for table in TABLES.values():
        for choices in table:
            for kind, entries in choices.items():
                dtype = torch.float16 if kind == "half" else torch.float32
                for _, tiles in entries:
                    assert 128 % tiles.BLOCK_M == 0 and 128 % tiles.BLOCK_N == 0
                for width in (16, 32, 64, 128, 256, 320, 2048):
                    tiles = choose(choices, dtype, kind, width)
                    assert tiles is None or (tiles.BLOCK_D != WHOLE and width % tiles.BLOCK_D == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "tau"), [(2, 0.005), (4, 0.1), (4, 0.0129)])
def test_rows_far_from_each_other_have_finite_gradients(rows, tau, dtype):
    # all similarities are far below those of the zero rows that pad the views
    z = torch.eye(rows, 16) - 1 / rows if rows > 2 else torch.eye(1, 16) * torch.tensor([[1], [-1]])
    loss, dz, _ = by_kernels(z.to(dtype), tau)
    truth = by_reference(z.to(dtype).double(), tau)
    assert loss.isfinite().all() and dz.isfinite().all()
    assert (loss.cpu() - truth[0]).norm() <= 2e-3 * truth[0].norm()


@pytest.mark.parametrize("features", [33, 150])
def test_autocast_reaches_no_product(features):
    z = LossCase("", 34, features, 0.1, "pairs").z()
    expected = by_kernels(z, 0.1)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert all(map(torch.equal, by_kernels(z, 0.1)[:2], expected[:2]))


def test_ranks_whose_images_fill_the_padding():
    rows = 256
    z = LossCase("", rows, 16, 0.1, "pairs").z().to(DEVICE)
    tau = torch.tensor(0.1)
    top, mass, _ = ntxent_triton.negative_sums(
        z, tau, None, 2, 0, rows, True, False, precision="ieee"
    )
    loss, _ = ntxent_triton.finish_rows(z, tau, top, mass, 2, True, precision="ieee")
    truth = by_reference(z.cpu().double(), 0.1, pairs="interleaved")[0]
    torch.testing.assert_close(loss.cpu().double(), truth, rtol=1e-5, atol=1e-6)


def test_what_was_kept_may_be_strided():
    z = LossCase("", 34, 16, 0.1, "pairs").z().to(DEVICE)
    tau, layout = torch.tensor(0.1), ("halves", True, "mean", "ieee")
    loss, _, *kept = ntxent_triton.forward(z, tau, None, *layout, False)
    plain, _ = ntxent_triton.backward(loss, z, tau, None, *kept, *layout)
    strided = [torch.stack((x, x), -1)[..., 0] for x in kept]
    again, _ = ntxent_triton.backward(loss, z, tau, None, *strided, *layout)
    assert torch.equal(plain, again)


def test_negatives_far_below_every_row_change_nothing():
    z = LossCase("", 34, 16, 0.02, "pairs").z().abs()
    negatives = -z[:5]
    assert_close_to_the_reference(z, 0.02, negatives=negatives)
