import pytest

for name in ("contract", "media_contract"):
    pytest.register_assert_rewrite(f"{__name__}.{name}")
