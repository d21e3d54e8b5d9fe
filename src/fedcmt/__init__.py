"""Federated nnU-Net for hospitals that do not own the same scanners, sequences or tasks."""
