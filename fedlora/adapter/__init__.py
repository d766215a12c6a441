"""LoRA weights as values: their algebra, how far a broadcast is from the mean, base updates, a round's updates."""

from fedlora.adapter.weights import EVERY_PART, Adapter, Factors, Part

__all__ = ["EVERY_PART", "Adapter", "Factors", "Part"]
