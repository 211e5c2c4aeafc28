"""Llama with Dynamic Memory Compression for transformers, and its form for ``trust_remote_code``."""
