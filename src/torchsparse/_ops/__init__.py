"""One function per operation; each picks the implementation for its tensors."""
