"""nnU-Net v2 behind one door: the only package that imports nnunetv2."""
