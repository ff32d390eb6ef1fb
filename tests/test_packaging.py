"""What is installed finds its kernels: from a wheel, an editable install and a bare checkout."""

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
BUILD = "import sys; from setuptools import build_meta; build_meta.{}(sys.argv[1])"
# -S and addsitedir: nothing is found but what was installed, and numpy and the like.
FIND = """
import site, sys
site.addsitedir(sys.argv[1])
sys.path += sys.argv[2:]
import cuflash
from cuflash import _jit
print(cuflash.__version__)
print(_jit.kernel_dir())
"""


def run(*arguments: str, cwd: Path) -> str:
    result = subprocess.run(arguments, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def kernel_dir(installed: Path) -> Path:
    """Where a fresh process that has `installed` on its path finds the kernels."""
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    output = run(sys.executable, "-S", "-c", FIND, str(installed), *libraries, cwd=installed)
    return Path(output.splitlines()[1])


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what a build reads."""
    folder = tmp_path_factory.mktemp("checkout") / "cuflash"
    for name in ("cuflash", "kernels_cu"):
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(CHECKOUT / name, folder / name, ignore=skip)
    for name in ("setup.cfg", "setup.py", "MANIFEST.in", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(CHECKOUT / name, folder / name)
    return folder


def install(checkout: Path, hook: str, folder: Path) -> Path:
    """What an installer does with a pure wheel: build it and unpack it."""
    pytest.importorskip("setuptools", reason="building a wheel needs setuptools")
    run(sys.executable, "-c", BUILD.format(hook), str(folder), cwd=checkout)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


@pytest.fixture(scope="module")
def site(checkout, tmp_path_factory) -> Path:
    return install(checkout, "build_wheel", tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_the_package_and_every_kernel_source(site):
    packed = {
        str(path.relative_to(site)) for path in site.rglob("*") if path.suffix in (".cu", ".cuh")
    }
    sources = {
        f"cuflash/{path.relative_to(CHECKOUT)}" for path in (CHECKOUT / "kernels_cu").rglob("*.cu*")
    }
    assert packed == sources and sources
    modules = {str(p.relative_to(CHECKOUT)) for p in (CHECKOUT / "cuflash").rglob("*.py")}
    installed = {str(p.relative_to(site)) for p in (site / "cuflash").rglob("*.py")}
    assert (site / "cuflash" / "py.typed").exists()
    assert installed == modules
    assert not (site / "tests").exists() and not (site / "kernels_cu").exists()


def test_the_wheel_brings_the_license_and_needs_no_cupy(site):
    (information,) = site.glob("cuflash-*.dist-info")
    assert list(information.rglob("LICENSE"))
    metadata = (information / "METADATA").read_text()
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert sorted(line.split(">")[0].split()[0] for line in required) == [
        "ml_dtypes",
        "numpy",
        "threadpoolctl",
    ]
    for extra in ("cuda12", "cuda13", "examples", "test"):
        assert f"Provides-Extra: {extra}" in metadata


def test_a_wheel_finds_its_kernels(site):
    assert kernel_dir(site) == (site / "cuflash" / "kernels_cu").resolve()


def test_a_wheel_built_again_is_the_same(checkout, site, tmp_path):
    def files(folder: Path) -> set[Path]:
        found = (p.relative_to(folder) for p in folder.rglob("*"))
        return {path for path in found if "__pycache__" not in path.parts}  # of whoever imports it

    assert files(install(checkout, "build_wheel", tmp_path)) == files(site)


def test_a_source_distribution_holds_the_kernels(checkout, tmp_path):
    run(sys.executable, "-c", BUILD.format("build_sdist"), str(tmp_path), cwd=checkout)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    kernels = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "kernels_cu").rglob("*.cu*")}
    assert kernels | {"setup.py", "cuflash/attention.py"} <= names


def test_an_editable_install_finds_its_kernels(checkout, tmp_path):
    site = install(checkout, "build_editable", tmp_path)
    assert not (site / "cuflash").exists()
    assert kernel_dir(site) == (checkout / "kernels_cu").resolve()


def test_an_editable_install_serves_the_folder_above(checkout, tmp_path):
    """Where the checkout is a folder of the package's name, without an __init__.py."""
    site = install(checkout, "build_editable", tmp_path)
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    script = "import sys; sys.path.insert(0, '');" + FIND
    arguments = (sys.executable, "-S", "-c", script, str(site), *libraries)
    version, kernels = run(*arguments, cwd=checkout.parent).splitlines()
    assert version and Path(kernels) == (checkout / "kernels_cu").resolve()


def test_a_bare_checkout_finds_its_kernels(checkout):
    assert kernel_dir(checkout) == (checkout / "kernels_cu").resolve()


def test_an_installation_without_kernels_says_so(monkeypatch, tmp_path):
    from cuflash import _jit

    monkeypatch.setattr(_jit, "__file__", str(tmp_path / "cuflash" / "_jit.py"))
    with pytest.raises(FileNotFoundError, match="installation is incomplete"):
        _jit.kernel_dir()


def test_importing_takes_neither_cupy_nor_long(checkout):
    # The importing thread's processor time (BLAS has threads that spin), and the least of five.
    script = """
import sys, time
start = time.thread_time()
import numpy, ml_dtypes
others, loaded = time.thread_time() - start, set(sys.modules)
import cuflash
packages = {name.partition(".")[0] for name in set(sys.modules) - loaded}
print(time.thread_time() - start - others, others, *packages - sys.stdlib_module_names)
"""
    run(sys.executable, "-m", "compileall", "-q", "cuflash", cwd=checkout)  # as installers do
    outputs = [run(sys.executable, "-c", script, cwd=checkout).split() for _ in range(5)]
    assert {tuple(packages) for _, _, *packages in outputs} == {("cuflash",)}
    own, others = (min(float(output[i]) for output in outputs) for i in (0, 1))
    # In all under 0.3 s, wherever NumPy takes its usual 0.25 s or less.
    assert own < 0.05, f"cuflash takes {own:.3f} s, after {others:.3f} s for what it needs"
