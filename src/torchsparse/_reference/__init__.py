"""Every operation in plain PyTorch: the path on the CPU and the twin of each kernel."""
