"""Speed, measured beside common PyTorch programs and the limits of the machine."""
