"""The operations as Triton kernels: each module has a twin of the same name in `_reference`."""
