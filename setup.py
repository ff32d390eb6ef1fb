"""The kernels stand beside the package in a checkout, and inside it where it is installed."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithKernels(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "cuflash", "kernels_cu")
            shutil.rmtree(target, ignore_errors=True)  # of a build before
            shutil.copytree("kernels_cu", target)


setup(cmdclass={"build_py": BuildWithKernels})
