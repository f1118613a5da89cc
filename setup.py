"""Everything is declared in pyproject.toml; extension modules, which cannot be, are declared here."""

from setuptools import setup

setup()
