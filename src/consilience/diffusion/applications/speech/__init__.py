"""One-step synthesis of mel-spectrograms from scores, after CoMoSpeech (Ye et al. 2023, arXiv:2305.06908)."""
