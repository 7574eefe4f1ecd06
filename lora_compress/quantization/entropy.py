LAYERS = 6


def encode_entropy(*a, **k):
    raise NotImplementedError


def decode_entropy(*a, **k):
    raise NotImplementedError
