"""Speed benchmarks against common PyTorch code and the limits of the machine."""
