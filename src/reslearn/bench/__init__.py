"""How fast: measured side by side with what people use, and with what the machine can do at most."""
