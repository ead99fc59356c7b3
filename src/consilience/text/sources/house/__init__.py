"""The house model: a tiny language model that ships with Consilience and runs on NumPy alone."""

from .llama import Generation, HouseModel
from .tokenizer import Tokenizer

__all__ = ["Generation", "HouseModel", "Tokenizer"]
