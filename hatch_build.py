"""The wheel's build: the native library is compiled where there is a compiler, else the wheel is Python alone.

GEMVG_NATIVE=0 leaves it out; GEMVG_NATIVE=1 makes a failure to compile an error, for wheels that are published.
"""

import importlib.util
import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = "gemvg_edge/engines/native"


class NativeLibrary(BuildHookInterface):
    """Compiles into the source folder, as `make native` does."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the libraries to a wheel; an editable install uses what `make native` left."""
        wanted = os.environ.get("GEMVG_NATIVE", "")
        if self.target_name != "wheel" or version == "editable" or wanted == "0":
            return
        path = Path(self.root) / FOLDER / "compiling.py"
        spec = importlib.util.spec_from_file_location("compiling", path)
        assert spec is not None
        assert spec.loader is not None
        compiling = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(compiling)
        try:
            compiling.compile_all(os.environ.get("CXX", "g++"), platform.machine())
        except compiling.CannotCompile as error:
            if wanted == "1":
                raise
            self.app.display_warning(f"without the native library: {error}")
            return
        build_data["artifacts"].append(f"/{FOLDER}/*.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
