"""Tests that compile for TPUs: they need libtpu (`make aot`), and run in .venv-aot."""

import importlib.util

import pytest

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed here; `make aot` has it")
