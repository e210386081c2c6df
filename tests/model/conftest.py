"""What tests of kernels for other hardware share."""

import pytest
from jax.experimental import pallas


@pytest.fixture
def interpreted(monkeypatch):
    """Pallas kernels run as plain jax, wherever they are called."""
    call = pallas.pallas_call
    monkeypatch.setattr(pallas, "pallas_call", lambda *args, **how: call(*args, **how | {"interpret": True}))
