"""All that is fuzzed, by name."""

from tests.fuzz import media_targets, record_targets, run_targets, text_targets, weights_targets

__all__ = ["TARGETS"]

TARGETS = {
    **weights_targets.TARGETS,
    **text_targets.TARGETS,
    **media_targets.TARGETS,
    **record_targets.TARGETS,
    **run_targets.TARGETS,
}
