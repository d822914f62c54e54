"""What people install: a wheel that holds everything, and an import that costs little."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def python(code, **options):
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, **options
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_needs_nothing_optional_and_claims_no_other_name():
    loaded = python(
        "import sys, simclr_kernels\n"
        "print(*[name for name in ('triton', 'torch._dynamo', 'matplotlib', 'PIL', 'pyarrow',"
        " 'jsonargparse', 'torchvision', 'kornia', 'pipelines') if name in sys.modules])"
    )
    assert loaded.split() == []


def test_import_takes_little_longer_than_torch():
    seconds = python(
        "import time\n"
        "start = time.process_time(); import torch; middle = time.process_time()\n"
        "import simclr_kernels; print(middle - start, time.process_time() - middle)"
    )
    torch_alone, ours = map(float, seconds.split())
    assert ours < 0.25 * torch_alone


def test_the_pipelines_are_one_module_under_one_name():
    names = python(
        "import sys, simclr_kernels.pipelines.fused_views\n"
        "print('pipelines' in sys.modules, simclr_kernels.pipelines.__file__)"
    )
    assert names.split()[0] == "False"
    assert Path(names.split()[1]).parent == ROOT / "pipelines"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    # a copy: building leaves files in the folder it builds
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([*command, "-w", str(folder), str(source)], check=True)
    return next(folder.glob("*.whl"))


def test_a_wheel_holds_the_package_its_pipelines_and_the_extension(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("simclr_kernels/_C.") for name in names)
    for name in ("py.typed", "pipelines/fused_views.py", "ntxent_triton.py", "cli.py"):
        assert f"simclr_kernels/{name}" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"simclr_kernels"}


def test_an_unpacked_wheel_works_away_from_the_checkout(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    output = python(
        "import sys; sys.path.insert(0, 'site')\n"
        "import torch, simclr_kernels\n"
        "from simclr_kernels.pipelines.fused_views import FusedViews\n"
        "z = torch.randn(8, 4, requires_grad=True)\n"
        "simclr_kernels.fused_nt_xent(z, 0.1).backward()\n"
        "print(simclr_kernels.__file__, simclr_kernels.pipelines.__file__)",
        cwd=tmp_path,
    )
    assert all(name.startswith(str(tmp_path)) for name in output.split())
