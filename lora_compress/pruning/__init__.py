"""Which components, channels and modules survive: pure functions from spectra and factors to ranks and channel lists."""

from .channels import KeptChannels, select_channels
from .dynamic import dynamic_rank, knee_rank
from .layers import consumer_minimum, drop_layers
from .ranks import select_ranks

__all__ = ["KeptChannels", "consumer_minimum", "drop_layers", "dynamic_rank", "knee_rank", "select_channels", "select_ranks"]
