"""Where the packages of the wheel are; everything else stands in pyproject.toml."""

from setuptools import find_packages, setup

# A top-level package called "convert" could shadow another's, so the folder goes in under a name of
# this project.
setup(
    packages=[*find_packages(include=["mlx_mla*"]), "mlx_mla.convert"],
    package_dir={"mlx_mla.convert": "convert"},
)
