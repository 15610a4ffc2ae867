"""Box-supervised instance segmentation: SIM (CVPR 2023) on Mask2Former."""
