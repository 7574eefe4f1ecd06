"""Files of weights as such: their headers, their tensors, and how results are written whole. Nothing here knows what a LoRA is."""
