"""Shared by all tests: the project on the path, one thread (the models are tiny; two threads only wait for each other)."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: runs on a GPU only")
