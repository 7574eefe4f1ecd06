"""Training LoRA with diffusers and PEFT, without sd-scripts."""
