"""The two methods as PEFT tuners: :mod:`rep` (weight update) and :mod:`adp` (bottleneck adapter)."""

# PEFT first, which registers both methods: in the middle of a module below it would meet that module half done
import peft  # noqa: F401
