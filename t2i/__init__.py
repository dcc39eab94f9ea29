"""t2i trains text-to-image models, from captioned shards to samples."""

__version__ = "0.1.0"
