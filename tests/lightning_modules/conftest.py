"""Prompts and random teachers of the tests of distillations."""

import pytest
from distilling import edm_folder, words_file
from tiny_networks import pipeline_folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    return words_file(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def sd(tmp_path_factory) -> str:
    return str(pipeline_folder(tmp_path_factory.mktemp("sd")))


@pytest.fixture(scope="module")
def edm(tmp_path_factory) -> str:
    return edm_folder(tmp_path_factory.mktemp("edm"), classes=10)
