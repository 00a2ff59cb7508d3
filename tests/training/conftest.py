"""What the tests of training share beside what all share."""

import pytest
from helpers.data import picture, row

from bpo.models import checkpoint as checkpoints


@pytest.fixture
def rows():
    """Five pairs on two images of different sizes; the third asks something else of the first."""
    one, two = picture("disc", "red", 1), picture("box", "blue", 2, (64, 40))
    return [row(one, "red", "a big green box"), row(one, "red", "no"),
            row(one, "there is a disc on the mat", "yes", "describe the picture"),
            row(two, "blue", "red"), row(two, "a blue box", "a hot yellow cat with a dog")]


@pytest.fixture
def processor(model_folder):
    """One of its own for every test: some change it."""
    return checkpoints.load(model_folder).processor
