"""What measures a LoRA: distances of picture sets, paired measures, and the drawings and the probe that tiny-sd is tested with."""
