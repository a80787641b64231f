"""llamatrain: distributed pretraining of the LLaMA family (arXiv 2302.13971), from raw text to a trained model."""

from llamatrain.version import VERSION as __version__

__all__ = ["__version__"]
