"""The version of the package, for its metadata, its cards and its records."""

__version__ = "0.1.0"
