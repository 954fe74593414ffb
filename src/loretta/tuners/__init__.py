"""The methods as PEFT tuners: :mod:`rep` (weight update), :mod:`adp` (bottleneck adapter) and :mod:`shared`."""

# PEFT first, which registers the methods: in the middle of a module below it would meet that module half done
import peft  # noqa: F401
