"""SCINet: partial multi-label learning with a CLIP backbone and fused semantic co-occurrence."""

__version__ = "0.1.0"
