"""SegCompass for Hugging Face transformers."""
