"""Put the .pth file at the root of site-packages: pyproject.toml has no way to say it."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

PTH = "sglang_trinv_cpu_platform.pth"


class BuildWithPth(build_py):
    """``build_py`` that also copies the .pth file."""

    def run(self) -> None:
        """Build the package, then copy the .pth file beside it."""
        super().run()
        self.copy_file(str(Path(__file__).parent / PTH), str(Path(self.build_lib) / PTH))

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """List the .pth file too, so that an uninstall removes it."""
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / PTH)]


setup(cmdclass={"build_py": BuildWithPth})
