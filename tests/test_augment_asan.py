"""The C++ kernels of the views under AddressSanitizer and UBSan, on memory of the exact size."""

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from simclr_kernels import _C

TESTS = Path(__file__).parent
SOURCES = sorted((TESTS.parent / "csrc").glob("augment*.cpp"))
SOURCES += [TESTS.parent / "csrc" / name for name in ("instruction_sets.cpp", "parallel.cpp")]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
COMPILE = ["g++", "-std=c++17", "-O1", "-fopenmp", *SANITIZE]


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asan")
    (folder / "empty.cpp").write_text("int main() {}\n")
    try:
        able = run(*COMPILE, folder / "empty.cpp", "-o", folder / "empty").returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("no g++ with AddressSanitizer here")

    def compiled(source):
        target = folder / (source.stem + ".o")
        done = run(*COMPILE, "-c", source, "-o", target)
        assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, [*SOURCES, TESTS / "augment_fuzz.cpp"]))
    done = run(*COMPILE, *objects, "-o", folder / "fuzz")
    assert done.returncode == 0, done.stderr
    return folder / "fuzz"


@pytest.mark.parametrize("instruction_set", _C.instruction_sets())
def test_random_views_touch_no_memory_but_their_own(fuzzer, instruction_set):
    done = run(fuzzer, instruction_set)
    assert done.returncode == 0, done.stderr[-4000:]
    assert int(done.stdout.split()[0]) > 1000
