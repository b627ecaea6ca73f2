"""One file per operation: formula, reference, kernel, launcher. A kernel knows tensors, not requests."""

# transformers (a test oracle, never imported by the product) probes for a package called `kernels` and compares its
# version; "0" tells it that the one it means is not installed.
__version__ = "0"
