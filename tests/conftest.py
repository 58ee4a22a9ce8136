"""What every folder's tests share: hypothesis settings, and one tiny random-weight model pair on disk."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.tiny import Pair

settings.register_profile("ebbline", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.load_profile("ebbline")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> "Pair":
    """A base and an aligned Llama (2 layers, 64 wide, random) with a word tokenizer and a chat template."""
    from tests.tiny import build_pair  # brings torch, which most tests of the driver's side never load

    return build_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """48 short conversations as chat JSONL."""
    from tests.tiny import write_chats

    return write_chats(tmp_path / "chats.jsonl", 48)
