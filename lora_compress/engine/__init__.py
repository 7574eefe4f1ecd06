"""The road from a LoRA to a smaller one: analyse its modules, plan their ranks and bits, encode them, write the result."""
