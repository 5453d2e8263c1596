"""Fixtures that every test shares; nothing here needs a network or a GPU."""

import os
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from helpers import hub_server
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture
def policy_folder(tmp_path):
    """A saved tiny policy with its tokenizer."""
    folder = tmp_path / "policy"
    tiny_policy().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def scorer_folder(tmp_path):
    """A saved stock reward model with the policy's tokenizer."""
    folder = tmp_path / "scorer"
    tiny_reward_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in of the hub that huggingface_hub talks to, with a token that may write and a cache of its own."""
    from huggingface_hub import constants

    from rgtg.models.loading.hub import clear_snapshot_cache

    with hub_server.serve() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.WRITE)
        clear_snapshot_cache()
        yield served
    clear_snapshot_cache()


@pytest.fixture
def shared_data() -> Path:
    """Real preference data, where the checkout has it beside it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("real data (shared/data beside the checkout) is absent")
    return SHARED / "data"


@pytest.fixture
def stories_model() -> Path:
    """A real pretrained story model, where the checkout has it beside it."""
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip("the pretrained story model (shared/models beside the checkout) is absent")
    return folder


@pytest.fixture
def unprivileged(tmp_path):
    """A block in which file permissions hold, for the superuser too."""

    @contextmanager
    def block():
        if not hasattr(os, "geteuid") or os.geteuid():
            yield
            return
        for folder in (tmp_path, *tmp_path.parents[:3]):  # pytest's own folders are the user's alone
            folder.chmod(folder.stat().st_mode | 0o055)
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return block
