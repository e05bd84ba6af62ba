"""The reference keeps the contract itself."""

import pytest

from kvjax.store.tier import Tier
from tests.store.contract import TierContract, fill
from tests.store.memory_tier import MemoryTier


class TestMemoryTier(TierContract):
    @pytest.fixture
    def tier(self) -> Tier:
        return fill(MemoryTier())
