"""What a run will need, from the real model on the meta device, before any GPU is used (docs/layouts.md)."""
