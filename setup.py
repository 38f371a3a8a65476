"""What pyproject.toml cannot say: source files are compiled in parallel, and one wheel serves Python 3.11 and every later version."""

import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError


class ParallelBuildExt(build_ext):
    """Compiles the source files of an extension module in parallel, which saves half a minute."""

    def build_extensions(self) -> None:
        compile_sources = self.compiler.compile

        def compile_source(source: str, **options: Any) -> list[str]:
            try:
                return compile_sources([source], **options)
            except CompileError:
                if not source.endswith("amx.cpp"):
                    raise
                # an assembler from before 2020 does not know its instructions; without them the rest is as it was
                return compile_sources([source], **{**options, "macros": [*(options.get("macros") or []), ("WITHOUT_AMX", None)]})

        def compile_in_parallel(sources: list[str], **options: Any) -> list[str]:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_source(source, **options), sources)
                return [path for paths in objects for path in paths]

        self.compiler.compile = compile_in_parallel
        super().build_extensions()


# the free-threaded Python has no stable ABI
stable_abi = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"bdist_wheel": {"py_limited_api": "cp311"}}
setup(cmdclass={"build_ext": ParallelBuildExt}, options=stable_abi)
