import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Cases that a class names in `slow` run with the slow tests, for that class alone."""
    for item in items:
        if getattr(item, "originalname", None) in getattr(getattr(item, "cls", None), "slow", ()):
            item.add_marker(pytest.mark.slow)
