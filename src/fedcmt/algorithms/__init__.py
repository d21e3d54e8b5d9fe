"""Federated algorithms: one paper, one file, both halves of it. No FLARE, no nnU-Net."""
