"""Adapters as PEFT's directories: written, read, and what PEFT and vLLM make of them."""
