"""The packages: all under src/, the recipes, and conf/ as preftune.conf. The rest stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("src"), "preftune.conf", "recipes"],
    package_dir={"": "src", "preftune.conf": "conf", "recipes": "recipes"},
)
