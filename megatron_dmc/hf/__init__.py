"""Models with Dynamic Memory Compression for transformers, and their form for ``trust_remote_code``."""
