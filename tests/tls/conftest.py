"""One tree of certificates for all tests of TLS."""

from __future__ import annotations

import pytest

from interop.certificates import Pki


@pytest.fixture(scope="session")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki.make(tmp_path_factory.mktemp("pki"))
