"""The stages of tools/train_tiny_sd.py, one file each."""
