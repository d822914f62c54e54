import re
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

version = re.search(r'__version__ = "(.+)"', Path("simclr_kernels/__init__.py").read_text())[1]

kernels = Pybind11Extension(
    "simclr_kernels._C",
    sources=sorted(map(str, Path("csrc").glob("*.cpp"))),
    depends=sorted(map(str, Path("csrc").glob("*.h"))),
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp"],
    extra_link_args=["-fopenmp"],
)

setup(
    version=version,
    packages=["simclr_kernels", "simclr_kernels.pipelines"],
    package_dir={"simclr_kernels.pipelines": "pipelines"},
    package_data={"simclr_kernels": ["py.typed"]},
    ext_modules=[kernels],
    cmdclass={"build_ext": build_ext},
)
