"""What measures a LoRA: small drawings to train and test on, and a probe that reads what a picture shows."""
