"""The two methods as PEFT tuners: :mod:`rep` (weight update) and :mod:`adp` (bottleneck adapter)."""
