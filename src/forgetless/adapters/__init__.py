"""Attach an adapter to an untouched base, read it back exactly, and export it as plain LoRA."""
