"""Every operation as kernels for GPUs, the twins of those in `_reference`."""
