"""Re-exports the one table of tolerances, `memzoo.layers.tolerances`; no test has tolerances of its own."""

from memzoo.layers.tolerances import assert_close, assert_finite

__all__ = ["assert_close", "assert_finite"]
