"""The C extension; everything else is in pyproject.toml.

It only makes copies faster: `optional` lets an installation without a C compiler succeed.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "kvbm_core.transfer._copy",
            sources=["kvbm_core/transfer/_copy.c"],
            extra_compile_args=["-O3"],
            optional=True,
        )
    ]
)
