import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """What a class names in `slow`, tests or single cases, runs with the slow tests, for that class alone."""
    for item in items:
        slow = getattr(getattr(item, "cls", None), "slow", ())
        if item.name in slow or getattr(item, "originalname", None) in slow:
            item.add_marker(pytest.mark.slow)
