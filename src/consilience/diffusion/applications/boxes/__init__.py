"""Finding objects by denoising boxes, after ConsistencyDet (Jiang et al. 2024, arXiv:2404.07773) and DiffusionDet."""
