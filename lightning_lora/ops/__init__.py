"""The arithmetic of adapters: fast autograd paths and plain compositions. Imports nothing else from the package."""
