"""QLoRA fine-tuning: planned before it loads, exact across kills, exports proved by measurement."""

__version__ = "0.1.0"
